"""Evidence for RLCS, row by row: ``python bench/bench_rlcs.py compare/uniform/seed0 ablate/kl --all --list --report``.

A row is one run in a process of its own, on one thread where its name says nothing else; its result is one line of
``bench/results/rlcs.jsonl`` with hardware, versions, commit, command and settings. Rows that are there are left alone,
so that the table grows over days. Runs are bounded by steps, never by the clock. All rows of a seed begin with the same
cold start, which is made once and kept in ``runs/bench`` (not part of the repository). ``rlcs_report.py`` makes the
page, ``rlcs_figures.py`` its figures; ``rlcs_rows.py`` says what each row does.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlcs_rows import prepared, rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "rlcs.jsonl"
LIMIT_S = 1800  # of a row: a run takes 4 minutes on a core of its own, more where others share it


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest result of each row."""
    if not path.exists():
        return {}
    return {row["row"]: row for row in map(json.loads, path.read_text().splitlines())}


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, on the disk when this returns; the lock keeps it apart from those that others append."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def one(name: str, work: Path, quick: bool) -> dict[str, Any]:
    """Runs a row here."""
    import torch
    import transformers

    import glm4v_ext

    torch.set_num_threads(1)
    what, seed, changes = rows()[name]
    prepared(work, seed, quick)
    wall, cpu = time.perf_counter(), time.process_time()
    metrics = what(work, work / "rows" / name.replace("/", "-"), seed, changes, quick)
    versions = {
        "glm4v_ext": glm4v_ext.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if "trl" in sys.modules:
        versions["trl"] = sys.modules["trl"].__version__
    return {
        "row": name,
        "seed": seed,
        "settings": changes,
        "quick": quick,
        "metrics": metrics,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "hardware": f"{_cpu()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        "commit": _commit(),
        "command": f"python bench/bench_rlcs.py {name}",
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def run(names: list[str], work: Path, results: Path, parallel: int, quick: bool) -> int:
    """Each row in a process; returns how many failed."""
    waiting, running, failed = list(names), dict[str, tuple[subprocess.Popen[bytes], float]](), 0
    (work / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                name = waiting.pop(0)
                log = work / "logs" / f"{name.replace('/', '-')}.log"
                places = ["--work", str(work), "--results", str(results)]
                command = [sys.executable, __file__, "--here", name, *places, *["--quick"] * quick]
                with open(log, "wb") as file:
                    started = subprocess.Popen(command, env=_environment(), stdout=file, stderr=file)
                running[name] = (started, time.monotonic())
            for name, (process, since) in list(running.items()):
                if process.poll() is None and time.monotonic() - since > LIMIT_S:
                    process.kill()
                    process.wait()
                if process.poll() is not None:
                    del running[name]
                    failed += process.returncode != 0
                    print(
                        f"{name}: {'done' if not process.returncode else 'failed'} in {time.monotonic() - since:.0f} s",
                        flush=True,
                    )
            time.sleep(0.2)
    finally:
        for process, _ in running.values():
            process.kill()
    return failed


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", "python", "glm4v_ext", "csrc")
    return git("rev-parse", "--short", "HEAD") + (" + changes" if changes else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names, or beginnings of names")
    parser.add_argument("--all", action="store_true", help="every row that is missing")
    parser.add_argument("--list", action="store_true", help="names, and which are there")
    parser.add_argument("--report", action="store_true", help="write bench/results/rlcs.md and its figures")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument(
        "--quick", action="store_true", help="tiny runs, to see that rows run; the result is printed, not kept"
    )
    parser.add_argument("--parallel", type=int, default=2, help="rows at a time")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench", help="cold starts, logs, run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines; page and figures lie beside them")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        result = one(asked.here, asked.work, asked.quick)
        print(json.dumps(result)) if asked.quick else append(asked.results, result)
        return 0
    known, there = rows(), read(asked.results)
    unknown = [name for name in asked.rows if not any(row.startswith(name) for row in known)]
    if unknown:
        print(f"bench_rlcs: rows must be names of --list or their beginnings, got {unknown[0]!r}", file=sys.stderr)
        return 2
    if asked.list:
        for name in known:
            print(f"{'done   ' if name in there else 'missing'} {name}")
    chosen = [name for name in known if asked.all or any(name.startswith(wanted) for wanted in asked.rows)]
    failed = run(
        [n for n in chosen if asked.again or asked.quick or n not in there],
        asked.work,
        asked.results,
        asked.parallel,
        asked.quick,
    )
    if asked.report:
        from rlcs_figures import figures
        from rlcs_report import page

        found = read(asked.results)
        drawn = figures(found, asked.results.parent)
        asked.results.with_suffix(".md").write_text(page(found, list(known), drawn))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
