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
    assert listed.returncode == 0 and {"speed/threads1", "compare/rlcs/seed0", "ablate/kl/seed2", "demo/seed0"} <= set(
        names
    )
    wanted = ["compare/refill/seed0", "hack/alarms/seed0", "matrix/ocr/seed0", "ablate/no-forcing/seed0"]
    done = bench(*wanted, "--quick", "--parallel", 1, "--work", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in wanted:
        row = json.loads((tmp_path / "logs" / f"{name.replace('/', '-')}.log").read_text().splitlines()[-1])
        assert row["row"] == name and len(row["metrics"]["curve"]) == 3 and row["commit"] and row["hardware"]


def curve(*points):
    """Held-out means with what they had cost: [(score, rollouts)]."""
    return [
        {"step": i, "waves": 2 * i, "rollouts": rollouts, "seconds": 1.0 * i, "rewards": {"counting_lax": 0.5},
         "scores": {"counting": score, "all": score}}
        for i, (score, rollouts) in enumerate(points)
    ]  # fmt: skip


def test_the_page_of_what_is_there(tmp_path):
    curves = {
        "compare/rlcs": curve((0.3, 0), (0.4, 1000), (0.5, 2000)),  # to +0.05 in 500
        "compare/uniform": curve((0.3, 0), (0.3, 1000), (0.325, 2000), (0.375, 4000)),  # in 3000
        "compare/refill": curve((0.3, 0), (0.32, 2000)),  # never: counts with 2000
        "matrix/ocr": curve((0.3, 0), (0.35, 10)),
        "hack/none": curve((0.3, 0), (0.1, 10)),
    }
    rows = []
    for name, found in curves.items():
        for seed in range(3):
            rows.append({"row": f"{name}/seed{seed}", "seed": seed, "hardware": "a machine", "versions": {},
                         "commit": "abc", "metrics": {"curve": found, "alarms": []}})  # fmt: skip
    ends = {name: {"sampled/all": 0.4 + i / 10, "sampled/all/error": 0.01, "greedy/all": 0.5, "greedy/all/error": 0.01}
            for i, name in enumerate(("cold", "rlcs", "control"))}  # fmt: skip
    ways = {
        name: [{"step": i, "seconds": 9.0 * i, "sampled/all": 0.4, "greedy/all": 0.5} for i in range(3)]
        for name in ends
    }
    for name in ("demo", "demo/long"):
        rows.append({"row": f"{name}/seed0", "seed": 0, "hardware": "a machine", "versions": {}, "commit": "abc",
                     "metrics": {"ends": ends, "curves": ways}})  # fmt: skip
    results = tmp_path / "rlcs.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = bench("--results", results, "--report")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "rlcs.md").read_text()
    assert "| rlcs | 3 | 3 | 500 | 1 | 0 | +20.0 (20.00 to 20.00) | - | - |" in page
    assert (
        "| uniform | 3 | 3 | 3000 | 5 | 2 | +7.5 (7.50 to 7.50) | 0.17 (0.17 to 0.17) | 0.20 (0.20 to 0.20) |" in page
    )
    assert "| refill | 3 | 0 | >2000 |" in page and "| 0.25 (0.25 to 0.25) |" in page
    assert "| ocr | 3 | +5.0 | +5.0 |" in page and "30.0, 30.0, 10.0" in page and "- speed: speed/threads1" in page
    assert "| 0 | sampled | control | 60.0 ± 1.0 (+20.0) |" in page and "| twice as long, 0 | greedy |" in page
    for name in ("compare", "matrix", "hack", "demo"):
        assert f"![{name}](rlcs-{name}.svg)" in page and (tmp_path / f"rlcs-{name}.svg").stat().st_size > 1000


@pytest.mark.slow
def test_names_that_are_none():
    done = bench("compare/nothing")
    assert done.returncode == 2 and "got 'compare/nothing'" in done.stderr
