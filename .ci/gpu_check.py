"""Everything that a GPU has to show, in one record under bench/results/: `make gpu-check`, or this file by any Python
that has torch and the tests' packages.

Builds the library where it has no CUDA kernels, then: tests of the ops and of the model on the device, the ops' again
on their Triton twins, repeated runs bit for bit, compute-sanitizer's memcheck and racecheck on small cases, side by
side as the cores allow; then benchmarks, alone. Each step is a process with its share of the budget; one that fails,
hangs or runs out of time is recorded with its reason and the others go on. Exit code 1 if any failed, 2 if it could not
begin.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Cases that compute-sanitizer can follow, at least one of each kernel.
SMALL = "grouped or without_keys or neighbours or views or (pages and 16) or expanded_gradients"
ATTENTION = ("flash_attn_varlen", "flash_attn_with_kvcache")
# Tests of the Triton twins that compile for minutes, in parts.
TWIN_PARTS = {
    "flash_attn_varlen": (
        "definition and (2-2-64 or 4-1-80)", "definition and (6-2-96 or 2-1-128)", "definition and (1-1-128 or 3-3-7)",
        "tiles and (17 or 80 or 96)", "tiles and not (17 or 80 or 96)", "not definition and not tiles",
    ),
    "flash_attn_with_kvcache": ("dtype3", "not dtype3"),  # of a GPU's two
}  # fmt: skip
PACKAGES = ("torch", "numpy", "pytest", "hypothesis")  # of every step; what one more needs, its own failure says
BENCHMARKS = {  # a process each
    "attention": ("flash_attn_varlen", "flash_attn_with_kvcache"),
    "rows": ("rope_2d", "rope_3d", "rms_norm", "add_rms_norm", "rms_norm_add", "swiglu"),
    "pictures and products": (
        "interpolate_pos_embed", "patchify", "linear", "patch_embed", "merge_patches", "token_logprob",
    ),
    "the model": ("model",),
    "the drop-in": ("integrations",),
}  # fmt: skip
# A test that hangs says where it does, and ends its step (with pytest 9) before it takes the time of others.
HANGS = [f"--override-ini=faulthandler_{setting}" for setting in ("timeout=60", "exit_on_timeout=true")]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *HANGS]
TOOLS = f"{os.environ.get('PATH', os.defpath)}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"


def run(command: list[str], timeout_s: float, **environment: str) -> tuple[int, str]:
    """Exit code and the end of what was said; 124 where time ran out, 127 where there is no such program."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    variables = {**os.environ, **ours, **environment}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            # A session of its own: whoever is left when time is up would keep the device.
            process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return 127, str(error)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
        output.seek(0)
        said = output.read().replace(f"{ROOT}/", "")
    # A record says what went wrong, not in which folders.
    said = re.sub(r"/[\w./-]*/(?=site-packages/|python3\.\d+/)", "", said)[-2000:]
    return code, said + f"\nran out of its {timeout_s:.0f} s" if code == 124 else said


def tests(
    arguments: list[str], timeout_s: float, program: Sequence[str] = PYTEST, **environment: str
) -> dict[str, Any]:
    """A run of pytest as a step: how many passed, failed and were skipped, and those that failed with their reasons."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        command = [*program, f"--junitxml={report}", *arguments]
        code, said = run(command, timeout_s, OMP_NUM_THREADS="2", **environment)  # beside others, and the GPU works
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        failures: list[str] = []
        if report.exists():
            suite = next(xml.etree.ElementTree.parse(report).iter("testsuite"))
            total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            counts = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
            for case in suite.iter("testcase"):
                for wrong in (*case.iter("failure"), *case.iter("error")):
                    reason = wrong.get("message", "").splitlines() or [""]
                    failures.append(f"{case.get('classname')}::{case.get('name')}: {reason[0][:200]}")
    ok = code == 0 and counts["passed"] > 0
    return {**counts, "ok": ok, "failures": failures, "said": "" if code == 0 else said}


def repeats(device: str, count: int) -> None:
    """The same bits `count` times, forward, backward and decode: a race would change some."""
    import torch

    from glm4v_ext import flash_attn_varlen_func, flash_attn_with_kvcache

    dtype = torch.bfloat16
    for heads, kv_heads, dim, causal in ((4, 4, 128, False), (16, 1, 128, True), (2, 2, 64, True), (4, 2, 80, False)):
        lengths = torch.tensor([0, 300, 0, 17, 129])
        cu = lengths.cumsum(0).int().to(device)
        q, k, v = (
            torch.randn(int(cu[-1]) + 5, h, dim, device=device).to(dtype).requires_grad_()
            for h in (heads, kv_heads, kv_heads)
        )
        dout = torch.randn_like(q)
        cache = [torch.randn(3, 700, kv_heads, dim, device=device).to(dtype) for _ in "kv"]
        used = torch.tensor([1, 300, 700], dtype=torch.int32, device=device)
        one = torch.randn(3, 1, heads, dim, device=device).to(dtype)

        def results(q=q, k=k, v=v, cu=cu, dout=dout, cache=cache, used=used, one=one, causal=causal):
            out = flash_attn_varlen_func(q, k, v, cu, cu, 300, 300, causal=causal)
            with torch.inference_mode():
                step = flash_attn_with_kvcache(one, *cache, cache_seqlens=used, causal=True)
            return [out.detach(), step, *torch.autograd.grad(out, (q, k, v), dout)]

        first = results()
        for turn in range(count):
            for i, (a, b) in enumerate(zip(results(), first, strict=True)):
                assert torch.equal(a, b), f"result {i} of {(heads, kv_heads, dim, causal)} differs in turn {turn}"


def probes(timeout_s: float) -> dict[str, Any]:
    """One primitive of Hopper at a time, for a GPU that is one: how many values of each are wrong."""
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        return {"ok": True, "said": "for Hopper alone"}
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "probes.so")
        source = [str(ROOT / "tests/probes/hopper.cu"), "-I", str(ROOT / "csrc")]
        flags = ["-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
        code, said = run([shutil.which("nvcc", path=TOOLS) or "nvcc", *source, *flags, "-o", library], timeout_s)
        if code:
            return {"ok": False, "said": said}
        wrong: dict[str, int | str] = {}
        for name in ("copy", "products", "tiles"):
            program = f"import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).probe_{name}())"
            code, said = run([sys.executable, "-c", program, library], 30)
            wrong[name] = int(said.split()[-1]) if code == 0 else f"exit code {code}: {said}"
    return {"ok": not any(wrong.values()), "wrong": wrong, "said": str(wrong)}


def facts(device: str) -> dict[str, Any]:
    import torch

    import glm4v_ext

    def said(*command: str) -> str:
        code, text = run([*command], 30)
        return text.strip() if code == 0 else ""

    gpu = device == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "HEAD") or "unknown",
        "changed_files": len(said("git", "status", "--porcelain", "--untracked-files=no").splitlines()),
        "build": glm4v_ext.build_info(),
    }


def measured(ops: Sequence[str], device: str, timeout_s: float) -> dict[str, Any]:
    """Benchmarks of some ops as a step, with their tables' rows."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "bench.json"
        options = ["--device", device, "--dtype", "bf16", "--quick", f"--benchmark-json={report}"]
        files = [f"bench/bench_{op}.py" for op in ops]
        code, said = run([*PYTEST, *files, "-k", "not memory", *options], timeout_s, COLUMNS="200")
        said = said.replace(f"{folder}/", "")
        found = json.loads(report.read_text())["benchmarks"] if report.exists() and report.stat().st_size else []
    rows = [{name: value for name, value in row["extra_info"].items() if name != "rounds_s"} for row in found]
    return {"ok": code == 0 and bool(rows), "rows": rows, "said": "" if code == 0 else said}


class Step(NamedTuple):
    name: str
    share: float  # most of the budget that it may take
    run: Callable[[float], dict[str, Any]]  # in the seconds given
    alone: bool = False  # it measures: nothing else may run


def steps(device: str, quick: bool) -> list[Step]:
    files = {path.stem[5:]: str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/ops").glob("test_*.py"))}
    ops = ["flash_attn_varlen", "rms_norm"] if quick else [*ATTENTION, *(op for op in files if op not in ATTENTION)]
    count = 2 if quick else 1000
    twins = [sys.executable, "tests/twins/served.py"]
    chosen = "grouped or bitwise" if quick else "not compile"  # compiling is the host's work: last

    def tested(files: list[str], chosen: str) -> Callable[[float], dict[str, Any]]:
        return lambda timeout_s: tests([*files, "-k", chosen, "--device", device], timeout_s)

    def twin(op: str, chosen: str) -> Callable[[float], dict[str, Any]]:
        return lambda timeout_s: tests(["--device=cuda", *HANGS, op, chosen], timeout_s, twins)

    def again(timeout_s: float) -> dict[str, Any]:
        command = [sys.executable, __file__, "--device", device, "--repeats", str(count)]
        code, said = run(command, timeout_s)
        return {"ok": code == 0, "repeats": count, "said": "" if code == 0 else said}

    def sanitized(tool: str, files: list[str]) -> Callable[[float], dict[str, Any]]:
        def step(timeout_s: float) -> dict[str, Any]:
            program = shutil.which("compute-sanitizer", path=TOOLS)
            if program is None:
                return {"ok": False, "said": "compute-sanitizer must be on PATH or in CUDA_HOME/bin, got none"}
            wrapped = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *PYTEST]
            arguments = [*files, "-k", SMALL, "--device", device]
            return tests(arguments, timeout_s, wrapped, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

        return step

    # A process each: what follows an illegal access in the same one fails, too. What takes longest begins first.
    plan: list[Step] = []
    if device == "cuda":
        plan.append(Step("primitives", 0.2, probes))
        for op in ops:
            for part in TWIN_PARTS.get(op, ("test",)):
                plan.append(Step(f"Triton twin of {op}" + f": {part}" * (part != "test"), 0.6, twin(op, part)))
        for tool in ("racecheck", "memcheck"):
            plan += [Step(f"{tool} of {op}", 0.6, sanitized(tool, [files[op]])) for op in ATTENTION]
            others = [path for op, path in files.items() if op not in ATTENTION]
            plan.append(Step(f"{tool} of the other ops", 0.6, sanitized(tool, others)))
    plan += [Step(f"tests of {op}", 0.5, tested([files[op]], chosen)) for op in ops]
    model = [f"tests/glm4v/test_{name}.py" for name in ("device", "layers")]
    plan.append(Step("tests of the model", 0.5, tested(model, "")))
    plan.append(Step("tests of the drop-in", 0.5, tested(["tests/integrations/test_any_version.py"], "")))
    plan.append(Step("repeated runs", 0.5, again))
    if not quick:
        plan.append(Step("opcheck and compile", 0.5, tested(["tests/ops"], "compile")))
    for name, group in ({"rms_norm": ("rms_norm",)} if quick else BENCHMARKS).items():
        plan.append(Step(f"bench {name}", 0.4, lambda t, ops=group: measured(ops, device, t), alone=True))  # type: ignore[misc]
    return plan


def text(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    about = record["facts"]
    lines = [
        f"# {about['device']}, {about['date']}",
        "",
        f"Driver {about['driver'] or '-'}, torch {about['torch']}, Python {about['python']}, commit {about['commit']}"
        + (f" with {about['changed_files']} files changed" if about["changed_files"] else "")
        + f". `{record['command']}`",
        "",
        "| step | result | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for step in record["steps"]:
        counts = " | ".join(str(step.get(name, "")) for name in ("passed", "failed", "skipped"))
        lines.append(f"| {step['name']} | {'ok' if step['ok'] else 'FAILED'} | {counts} | {step['seconds']:.0f} |")
    lines.append("")
    for step in record["steps"]:
        if not step["ok"]:
            reason = [line for line in step["said"].splitlines() if line.strip()] or ["nothing was run"]
            lines += [f"- {step['name']} failed: {reason[-1]}", *(f"  - {name}" for name in step.get("failures", []))]
    for step in record["steps"]:
        for row in step.get("rows", []):
            medians = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in row["median_s"].items())
            work, unit = {"compute": ("flops", "TFLOP/s"), "memory": ("bytes", "TB/s")}.get(row["bound"], ("", ""))
            seconds = next(iter(row["median_s"].values()))
            rate = f" ({row[work] / seconds / 1e12:.2f} {unit}, {row['share']:.0%} of the ceiling)" if work else ""
            name = row["case"] if row["case"].startswith(row["op"]) else f"{row['op']} {row['case']}"
            lines.append(f"- {name}: {medians} us{rate}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few tests and one benchmark, to try the script itself")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="steps whose name matches")
    parser.add_argument("--budget-s", type=float, default=480, help="for all steps together")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench/results")
    parser.add_argument("--repeats", type=int, help="only repeat the attention ops so often")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    if given.repeats:
        repeats(given.device, given.repeats)
        return 0
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        print(
            f"gpu_check: {sys.executable} must have {', '.join(PACKAGES)}, got no {', '.join(missing)}", file=sys.stderr
        )
        return 2
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=given.out).close()
    except OSError as error:
        print(f"gpu_check: --out must be a folder that can be written, got {error}", file=sys.stderr)
        return 2
    if given.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: torch must see a GPU, got none; --device cpu tries the script", file=sys.stderr)
            return 2
        code, said = run([sys.executable, "-c", "import glm4v_ext as g; exit(not g.build_info()['cuda'])"], 60)
        if code:
            code, said = run([sys.executable, "setup.py", "build_ext", "--inplace"], 600, GLM4V_CUDA="1")
        if code:
            print(f"gpu_check: the CUDA build must pass, got\n{said}", file=sys.stderr)
            return 2
    about = facts(given.device)  # before anything can go wrong
    began = time.monotonic()

    def done(step: Step) -> dict[str, Any]:
        left_s = given.budget_s - (time.monotonic() - began)
        at = time.monotonic()
        result = {"ok": False, "said": "no time was left"}
        try:
            if left_s > 5:
                result = step.run(min(step.share * given.budget_s, left_s))
        except Exception as error:  # a report cut off, a device that is gone: the record is written all the same
            result = {"ok": False, "said": f"{type(error).__name__}: {error}"}
        seconds = time.monotonic() - at
        print(f"{'ok    ' if result['ok'] else 'FAILED'} {step.name} {seconds:.0f} s\n{result['said']}".rstrip())
        return {"name": step.name, **result, "seconds": seconds}

    plan = [step for step in steps(given.device, given.quick) if given.only.search(step.name)]
    if not plan:
        print(f"gpu_check: --only must match a step, got {given.only.pattern!r}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as side_by_side:
        results = list(side_by_side.map(done, [step for step in plan if not step.alone]))
    results += [done(step) for step in plan if step.alone]
    arguments = [given.out.name if text == str(given.out) else text for text in sys.argv[1:]]
    command = " ".join(["python", os.path.relpath(__file__, ROOT), *arguments])
    record = {"facts": about, "command": command, "steps": results}
    stem = re.sub(r"[^a-z0-9]+", "-", f"{given.device} {record['facts']['device']}".lower()).strip("-")
    (given.out / f"check-{stem}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    (given.out / f"check-{stem}.md").write_text(text(record))
    print(given.out / f"check-{stem}.md")
    return 0 if all(step["ok"] for step in results) else 1


if __name__ == "__main__":
    sys.exit(main())
