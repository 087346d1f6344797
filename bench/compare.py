"""Two runs of the benchmarks: what became slower, with confidence. ``python -m bench compare A.json B.json``.

A change is the ratio of the medians of our time in B and in A; its interval comes from resampling the rounds of both
(bootstrap, 95 %). It is a regression where the whole interval lies beyond the threshold, and then the exit code is 1;
where no row has the rounds to tell, it is 2. Machines drift: with ``--relative`` our time is taken over the baseline's
of the same round, which drifts along.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.rates import read_run

RESAMPLES, LEAST_ROUNDS = 4000, 3


@dataclass(frozen=True)
class Change:
    """B over A: 1.1 is a tenth more. NaN where too few rounds say nothing of the interval."""

    ratio: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        if np.isnan(self.low):
            return "undecided"
        if self.low > 1 + threshold:
            return "slower"
        return "faster" if self.high < 1 / (1 + threshold) else ""

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.ratio - 1:+.1%} (few rounds)"
        return f"{self.ratio - 1:+.1%} ({self.low - 1:+.1%} to {self.high - 1:+.1%})"


def change(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Change:
    """Of the medians of two sets of rounds."""
    before, after = np.asarray(a, float), np.asarray(b, float)
    ratio = float(np.median(after) / np.median(before))
    if min(len(before), len(after)) < LEAST_ROUNDS:
        return Change(ratio, float("nan"), float("nan"))
    draw = np.random.default_rng(seed)
    medians = [np.median(draw.choice(x, (RESAMPLES, len(x))), axis=1) for x in (before, after)]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return Change(ratio, float(low), float(high))


def compared(a: dict[str, Any], b: dict[str, Any], relative: bool) -> tuple[Change | None, Change | None]:
    """How a row changed, and how its baseline did: the first peer that both runs have."""
    before, after = a["rounds_s"], b["rounds_s"]
    ours, *others = before
    baseline = next((name for name in others if name in after), None)
    of_baseline = None if baseline is None else change(before[baseline], after[baseline])
    if not relative:
        return change(before[ours], after[ours]), of_baseline
    if baseline is None:
        return None, None
    over = [[x / y for x, y in zip(run[ours], run[baseline], strict=True)] for run in (before, after)]
    return change(*over), of_baseline


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else than the code may explain a change."""
    return [
        f"{name}: {a.get(name)} and {b.get(name)}"
        for name in ("hardware", "threads", "isa", "versions")
        if a.get(name) != b.get(name)
    ]


def _ours(row: dict[str, Any]) -> str:
    return next(iter(row["rounds_s"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="JSON of the run before")
    parser.add_argument("b", type=Path, help="JSON of the run after")
    parser.add_argument("--threshold", type=float, default=0.05, help="slower by more is a regression (0.05)")
    parser.add_argument("--relative", action="store_true", help="our time over the baseline's of the same round")
    asked = parser.parse_args(arguments)
    if not 0 <= asked.threshold < float("inf"):
        said = f"--threshold must be a finite number of 0 or more, got {asked.threshold}"
        print(f"bench compare: {said}", file=sys.stderr)
        return 2
    try:
        (run_a, rows_a), (run_b, rows_b) = read_run(asked.a), read_run(asked.b)
        shared = [name for name in rows_b if name in rows_a]
        if not shared:
            raise ValueError(f"{asked.a} and {asked.b} must have a row in common, got none")
        renamed = [name for name in shared if _ours(rows_a[name]) != _ours(rows_b[name])]
        if len(renamed) == len(shared):
            raise ValueError(f"{asked.b} must have the first peers of {asked.a}, got others in every row in common")
    except ValueError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    for line in differences(run_a["machine_info"], run_b["machine_info"]):
        print(f"The runs differ in {line}")
    for path, rows, others in ((asked.a, rows_a, rows_b), (asked.b, rows_b, rows_a)):
        if alone := [name for name in rows if name not in others]:
            print(f"Only in {path}: {', '.join(alone)}")
    if renamed:
        print(f"Another peer is the first: {', '.join(renamed)}")
    found = {name: compared(rows_a[name], rows_b[name], asked.relative) for name in shared if name not in renamed}
    changes = {name: (ours, baseline) for name, (ours, baseline) in found.items() if ours is not None}
    if bare := [name for name in found if name not in changes]:
        print(f"No baseline in both runs: {', '.join(bare)}")
    if not changes:
        print("bench compare: --relative must find a baseline that both runs have, got none", file=sys.stderr)
        return 2
    show(changes, rows_a, rows_b, asked.threshold)
    verdicts = [ours.verdict(asked.threshold) for ours, _ in changes.values()]
    slower, undecided = verdicts.count("slower"), verdicts.count("undecided")
    told = f", {undecided} undecided: fewer than {LEAST_ROUNDS} rounds" if undecided else ""
    print(f"{len(changes)} rows, {slower} slower by more than {asked.threshold:.0%}{told}")
    if undecided == len(changes):
        print(f"bench compare: runs must have rows of {LEAST_ROUNDS} rounds or more, got none", file=sys.stderr)
        return 2
    return 1 if slower else 0


def show(
    changes: dict[str, tuple[Change, Change | None]],
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    threshold: float,
) -> None:
    """The worst first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("row", "A", "B", "change (95 %)", "baseline's change", "")
    for name, (ours, baseline) in sorted(changes.items(), key=lambda item: -item[1][0].ratio):
        times = [f"{np.median(next(iter(rows[name]['rounds_s'].values()))) * 1e6:.1f} us" for rows in (before, after)]
        told = "" if baseline is None else str(baseline)
        table.add_row(f"{after[name]['op']}: {after[name]['case']}", *times, str(ours), told, ours.verdict(threshold))
    console = Console(markup=False)  # cases may have brackets
    console.width = max(console.width, 160)
    console.print(table)
