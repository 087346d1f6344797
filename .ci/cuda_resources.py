"""What every CUDA kernel of the built library takes, per architecture; fails where one has a stack (spills, frames),
and where code or PTX is missing of an architecture that the library was built for.

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
sys.path.insert(0, str(ROOT))
from glm4v_ext import build_info  # noqa: E402


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


def held(tool: str) -> set[str]:
    """What the library holds, by architecture: "code of sm_80", "PTX of sm_100"."""
    found = set()
    for kind, name in (("elf", "code"), ("ptx", "PTX")):
        listed = subprocess.run([tool, f"--list-{kind}", str(LIBRARY)], capture_output=True, text=True).stdout
        found |= {f"{name} of {arch}" for arch in re.findall(r"\.(sm_\w+)\.", listed)}
    return found


def wanted(archs: list[str]) -> set[str]:
    """What CMake's list of architectures asks for: 80-real, 100-virtual, or both by 100 alone."""
    return {f"code of sm_{a.removesuffix('-real')}" for a in archs if not a.endswith("-virtual")} | {
        f"PTX of sm_{a.removesuffix('-virtual')}" for a in archs if not a.endswith("-real")
    }


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
    present = held(tool)
    absent = wanted(build_info()["cuda_archs"]) - present
    print(f"{len(found)} kernels, {faults} with a stack; {', '.join(sorted(present))}; missing: {sorted(absent)}")
    return 1 if faults or absent or not found else 0


if __name__ == "__main__":
    sys.exit(main())
