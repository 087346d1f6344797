"""Whether the Hopper kernels of the built library are what their sources say; reads their SASS and asks ptxas again.

Tensor cores fed by the TMA, the planned number of products and of waits (products that ptxas serialises have a wait
each), exponentials beside a product that is under way instead of behind the wait for it, the registers handed over, no
spills, and no warning of ptxas that products are serialised. Exit code 3 where cuobjdump is missing.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from typing import NamedTuple

from cuda_resources import LIBRARY, ROOT, cuobjdump


class Plan(NamedTuple):
    shared: int  # products whose first operand is in shared memory
    registers: int  # products whose first operand is in registers
    waits: int
    beside: int  # exponentials beside a product, at least


# By kernel, head dim and, of the forward, consumer groups. Products take 16 columns of the sum each; prologue, loop and
# epilogue are counted.
PLANS: dict[tuple[str, int] | tuple[str, int, int], Plan] = {}
for dim in (64, 80, 96, 128):
    for groups in (1, 2):
        PLANS["flash_attn_varlen_sm90_kernel", dim, groups] = Plan(2 * dim // 16, 2 * 4 * groups, 4, 32 * groups)
    PLANS["flash_attn_varlen_dkdv_sm90_kernel", dim] = Plan(4 * dim // 16, 4 * 4, 7, 2 * 32)
    PLANS["flash_attn_varlen_dq_sm90_kernel", dim] = Plan(4 * dim // 16, 2 * 6, 6, 2 * 48)
# Said where registers don't suffice, and where accumulators are touched or a function is called meanwhile. C7519, a
# fence that ptxas adds, is harmless.
SERIALISED = re.compile(r"\((C75(?:0[4-9]|1[0-8]))\)")


def functions(sass: str) -> dict[str, list[str]]:
    """Mangled name -> instructions, of cuobjdump's listing."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            found[name] = []
        elif name and (match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)):
            found[name].append(re.sub(r"^@!?U?P\w+\s+", "", match[1]))
    return found


def faults(instructions: list[str], plan: Plan) -> list[str]:
    """What differs from the plan."""
    found = []
    products = [i for i in instructions if i.startswith("HGMMA")]
    shared = sum("tnspB" not in i for i in products)
    waits = sum("WARPGROUP.DEPBAR" in i for i in instructions)
    for what, got, expected in (
        ("products of shared memory", shared, plan.shared),
        ("products of registers", len(products) - shared, plan.registers),
        ("waits", waits, plan.waits),
        ("changes of registers", sum(i.startswith("USETMAXREG") for i in instructions), 2),
        ("local loads and stores", sum(i.startswith(("LDL", "STL")) for i in instructions), 0),
    ):
        if got != expected:
            found.append(f"{what} must be {expected}, got {got}")
    if not any(i.startswith("UTMALDG") for i in instructions):
        found.append("tiles must come by UTMALDG, got none")
    under_way, beside = False, 0
    for i in instructions:
        if i.startswith("HGMMA"):
            under_way = True
        elif "WARPGROUP.DEPBAR" in i:
            under_way = not i.rstrip().endswith("0x0")
        elif i.startswith("MUFU.EX2"):
            beside += under_way
    if beside < plan.beside:
        found.append(f"exponentials beside a product must be at least {plan.beside}, got {beside}")
    return found


def warnings_of_ptxas() -> list[str]:
    """Compiles the Hopper kernels again, for what ptxas says of them; a warning of ours if it can't."""
    databases = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda p: p.stat().st_mtime)
    entries = json.loads(databases[-1].read_text()) if databases else []
    found, compiled = [], 0
    for entry in entries:
        command = shlex.split(entry["command"])
        if not entry["file"].endswith("_sm90.cu") or not any(part.endswith("nvcc") for part in command[:2]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            command[command.index("-o") + 1] = os.path.join(folder, "kernels.o")
            done = subprocess.run([*command, "-Xptxas=-v"], capture_output=True, text=True, cwd=entry["directory"])
        compiled += 1
        if done.returncode:
            found.append(f"{entry['file']}: {done.stderr}")
        found += [line for line in done.stderr.splitlines() if SERIALISED.search(line)]
    return found if compiled else [f"{ROOT}/build must hold the compile commands of the Hopper kernels, got none"]


def main() -> int:
    tool = cuobjdump()
    if tool is None:
        print("cuda_sass: cuobjdump must be on PATH or in the triton wheel, got neither", file=sys.stderr)
        return 3
    dump = subprocess.run([tool, "-sass", "-arch", "sm_90a", str(LIBRARY)], capture_output=True, text=True)
    kernels = {name: code for name, code in functions(dump.stdout).items() if "_sm90_kernel" in name}
    found = set()
    failed = 0
    for name, code in sorted(kernels.items()):
        match = re.search(r"\d(flash_attn_\w+?_sm90_kernel)I.*?((?:Li\d+E)+)(Lb1E)?", name)
        key = (match[1], *map(int, re.findall(r"\d+", match[2]))) if match else (name,)
        dtype = "bf16" if "4bf16" in name else "f16"
        wrong = faults(code, PLANS[key]) if key in PLANS else ["the kernel must have a plan, got none"]
        found.add(key)
        failed += bool(wrong)
        capped = " softcap" if match and match[3] else ""
        print("FAULT" if wrong else "ok   ", key[0], dtype, f"{' '.join(map(str, key[1:]))}{capped} {'; '.join(wrong)}")
    warnings = warnings_of_ptxas()
    print(*warnings, f"{len(kernels)} kernels, {failed} at fault, {len(warnings)} warnings of ptxas", sep="\n")
    return 1 if failed or warnings or found != set(PLANS) else 0


if __name__ == "__main__":
    sys.exit(main())
