"""What every CUDA kernel of the built library takes, per architecture; fails where one has a stack (spills, frames).

Reads the library itself, with cuobjdump from the toolkit or the triton wheel; exit code 3 where neither is there.
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "glm4v_ext/libglm4v_ops.so"


def cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = pathlib.Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


def kernels(text: str) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, mangled name, resource -> amount) of every kernel in cuobjdump's report."""
    found, arch, name = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            found.append((arch, name, {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}))
            name = ""
    return found


def main() -> int:
    tool = cuobjdump()
    if tool is None:
        print("cuda_resources: cuobjdump must be on PATH or in the triton wheel, got neither", file=sys.stderr)
        return 3
    report = subprocess.run([tool, "--dump-resource-usage", str(LIBRARY)], capture_output=True, text=True, check=True)
    found = kernels(report.stdout)
    names = subprocess.run(["c++filt"], input="\n".join(k[1] for k in found), capture_output=True, text=True).stdout
    faults = 0
    for (arch, _, use), name in sorted(zip(found, names.splitlines(), strict=True), key=lambda row: (row[1], row[0])):
        fault = use["STACK"] > 0 or use["LOCAL"] > 0
        faults += fault
        short = re.sub(r"\(anonymous namespace\)::|glm4v::cuda::|glm4v::|^void |\(.*", "", name)
        print(f"{'FAULT' if fault else 'ok   '} {arch:7} {use['REG']:4} registers {use['SHARED']:6} B shared "
              f"{use['STACK']:4} B stack  {short}")  # fmt: skip
    print(f"{len(found)} kernels, {faults} with a stack")
    return 1 if faults or not found else 0


if __name__ == "__main__":
    sys.exit(main())
