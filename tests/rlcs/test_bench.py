"""The evidence's harness runs; by its command line, since tests don't import the bench."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "bench_rlcs.py"


def bench(*arguments):
    return subprocess.run([sys.executable, BENCH, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_rows_are_listed_and_run(tmp_path):
    listed = bench("--list")
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert listed.returncode == 0 and {"speed", "compare/rlcs/seed0", "ablate/kl/seed2", "demo/seed0"} <= set(names)
    wanted = ["compare/refill/seed0", "hack/alarms/seed0", "matrix/ocr/seed0", "ablate/no-forcing/seed0"]
    done = bench(*wanted, "--quick", "--parallel", 1, "--work", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in wanted:
        row = json.loads((tmp_path / "logs" / f"{name.replace('/', '-')}.log").read_text().splitlines()[-1])
        assert row["row"] == name and len(row["metrics"]["curve"]) == 3 and row["commit"] and row["hardware"]


@pytest.mark.slow
def test_names_that_are_none():
    done = bench("compare/nothing")
    assert done.returncode == 2 and "got 'compare/nothing'" in done.stderr
