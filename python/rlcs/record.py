"""A run folder as it was left, or as it is so far: metrics by kind, settings, rollouts, ledger. No torch.

Nothing of it need be there but a row of metrics: a run may go on, may be SFT alone, may hold null for numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .bounds import STEPS
from .logs import read_metrics

Row = dict[str, Any]
SECTIONS = ("model", "run", "rollout", "eval", "curriculum")  # of the settings, which are looked into


@dataclass(frozen=True)
class Result:
    """One domain's held-out score in one evaluation; ``error`` is a standard error, NaN where unknown."""

    mean: float
    error: float
    tasks: float

    def __sub__(self, other: Result) -> Result:
        """The difference as if both were independent: too large an error where the tasks are the same."""
        return Result(self.mean - other.mean, float(np.hypot(self.error, other.error)), self.tasks)


@dataclass(frozen=True)
class Record:
    """What stands in one run folder."""

    folder: Path
    name: str  # as readers shall see it
    rows: Sequence[Row]
    config: Row  # {} where there is none

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises ValueError where there is no run."""
        if not folder.is_dir():
            raise ValueError(f"run: {folder} must be a run folder, got {'a file' if folder.exists() else 'nothing'}")
        rows = read_metrics(folder)
        if not rows:
            raise ValueError(f"run: {folder} must hold a row of metrics.jsonl, got none")
        return cls(folder, folder.resolve().name, rows, _config(folder / "config.yaml"))

    def of(self, kind: str) -> list[Row]:
        """Rows of one kind, in the order of steps."""
        return sorted((row for row in self.rows if row["kind"] == kind), key=lambda row: row.get("step") or 0)

    @cached_property
    def waves(self) -> list[Row]:
        return self.of("wave")

    @cached_property
    def sft(self) -> list[Row]:
        return self.of("sft")

    @cached_property
    def evals(self) -> list[Row]:
        return self.of("eval")

    @property
    def method(self) -> str:
        """What was done, in a word."""
        if self.waves or "tasks" in self.config:
            if self.config.get("refill"):
                return "GRPO with refill"
            curriculum = self.config.get("curriculum") or {}
            plain = curriculum.get("weighting") is False and curriculum.get("expansion") == "off"
            return "uniform GRPO" if plain else "RLCS"
        return "pre-training" if self.config.get("all_tokens") else "SFT"

    @property
    def seconds(self) -> float:
        """Of training."""
        return _highest(column(self.rows, "seconds"))

    @property
    def steps(self) -> int:
        """Waves of RL, optimizer steps of SFT."""
        return int(_highest(column(self.waves or self.sft or self.evals, "step")))

    @property
    def progress(self) -> float:
        """Share of the run that is behind it; NaN where the settings are not known."""
        run = self.config.get("run") or {}
        seconds, steps = number(run.get("seconds")), number(run.get("steps"))
        if run.get("seconds") is None and run.get("steps", "") is None:
            steps = STEPS
        ends = [done / most for done, most in ((self.seconds, seconds), (self.steps, steps)) if most > 0]
        return min(max(ends), 1.0) if ends else math.nan

    def total(self, name: str) -> float:
        """The newest of the waves' running totals."""
        return _highest(column(self.waves, f"total/{name}"))

    # --- evaluations ---

    @property
    def domains(self) -> list[str]:
        """Of the evaluations, or else of the waves."""
        found = [key.split("/")[1] for row in self.evals for key in row if key.startswith(("sampled/", "greedy/"))]
        found = found or [key.split("/", 1)[1] for row in self.waves for key in row if key.startswith("reward/")]
        return [name for name in dict.fromkeys(found) if name != "all"]

    @property
    def modes(self) -> list[str]:
        return [mode for mode in ("sampled", "greedy") if any(f"{mode}/all" in row for row in self.evals)]

    def rollouts_at(self, step: int) -> float:
        """Rollouts made up to a step."""
        return _highest(column([row for row in self.waves if row.get("step", 0) <= step], "total/rollouts"))

    @property
    def model(self) -> Path | None:
        """What the run started from, as it was told."""
        path = (self.config.get("model") or {}).get("path")
        return None if path is None else Path(str(path))

    @property
    def origin(self) -> Path | None:
        """Where that stands. A relative path was one from where the run was started, which the run's own tells; where
        that is another, it is one from here."""
        if self.model is None:
            return None
        place, out = self.folder.resolve().parts, Path(str((self.config.get("run") or {}).get("out", ""))).parts
        start = Path(*place[: -len(out)]) if out and place[-len(out) :] == out else Path()
        return (start / self.model).resolve()

    # --- rollouts ---

    @cached_property
    def steps_shown(self) -> list[int]:
        """Waves whose rollouts are kept."""
        files = (self.folder / "rollouts").glob("*.jsonl")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def groups(self, step: int) -> list[Row]:
        """Groups of one wave; `pictures` finds their files. Raises ValueError where the wave isn't kept."""
        if step not in self.steps_shown:
            raise ValueError(f"run: step must be one of {_ranges(self.steps_shown)} of {self.folder}, got {step}")
        path = self.folder / "rollouts" / f"{step:06d}.jsonl"
        rows = _rows(path)
        for number, row in enumerate(rows, 1):
            for name in ("prompt", "answers"):
                found = row.get(name) or []
                if not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
                    raise ValueError(f"run: {path}, group {number}: {name} must be objects, got {row[name]!r:.60}")
        return rows

    @cached_property
    def ledger(self) -> list[Row]:
        """One row a prompt, as last saved."""
        path = self.folder / "ledger.jsonl"
        return _rows(path) if path.exists() else []


def result(row: Row | None, mode: str, domain: str) -> Result | None:
    """What an evaluation says of a domain; None where it says nothing."""
    mean = number((row or {}).get(f"{mode}/{domain}"))
    if row is None or not np.isfinite(mean):
        return None
    return Result(mean, number(row.get(f"{mode}/{domain}/error")), number(row.get(f"{mode}/{domain}/tasks")))


def before(record: Record, others: Sequence[Record] = ()) -> tuple[Row, str] | None:
    """The evaluation that a run's gains are counted from, and in words which one it is.

    Its own before the first step; else that of another run which started from the same model, or the last one of the
    run that made the model; else its own first one, if it has two.
    """
    if record.evals and not record.evals[0].get("step"):
        return record.evals[0], "before the first step"
    for other in others:
        if other is record or record.origin is None:
            continue
        if other.origin == record.origin and other.evals and not other.evals[0].get("step"):
            return other.evals[0], f"the same model, evaluated by {other.name}"
        if other.evals and other.folder.resolve() in record.origin.parents:
            return other.evals[-1], f"the end of {other.name}, whose model it starts from"
    if len(record.evals) > 1:
        return record.evals[0], f"the first evaluation, at step {record.evals[0]['step']}"
    return None


def span(record: Record, others: Sequence[Record], mode: str, domain: str) -> tuple[Result | None, Result | None]:
    """A domain's score before and after; one is None where there is nothing to count a gain from: no evaluation before,
    or none since."""
    start, last = before(record, others), record.evals[-1] if record.evals else None
    first = None if start is None else start[0]
    return result(first, mode, domain), None if last is first else result(last, mode, domain)


def number(value: Any) -> float:
    """NaN for whatever is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """[rows] float64 of one name; NaN where it is missing or null."""
    return np.array([number(row.get(name)) for row in rows], dtype=np.float64)


def names(rows: Sequence[Row], prefix: str) -> list[str]:
    """What follows the prefix, in the order of appearance."""
    return list(dict.fromkeys(key[len(prefix) :] for row in rows for key in row if key.startswith(prefix)))


def by_flag(settings: Row, at: str = "") -> Row:
    """Settings by their flags' names: ``{"run": {"seed": 0}}`` as ``{"run.seed": 0}``."""
    found: Row = {}
    for key, value in settings.items():
        found |= by_flag(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return found


def pictures(group: Row, folder: Path) -> list[tuple[str, list[Path]]]:
    """(kind, files) of a group's pictures, in their order; those written by the run stand in ``rollouts``."""
    found = []
    for part in group.get("prompt") or []:
        kind = part.get("type")
        if kind in ("image", "video"):
            source = part.get(kind)
            found.append((kind, [_place(one, folder) for one in (source if isinstance(source, list) else [source])]))
    return found


def said(group: Row) -> str:
    """A group's prompt without its pictures."""
    parts = [str(part.get("text", "")) for part in group.get("prompt") or [] if part.get("type") == "text"]
    return "\n".join(part for part in parts if part)


def mean_score(group: Row) -> float:
    """Over the answers that a verifier judged; NaN where none was."""
    known = [number(a.get("score")) for a in group.get("answers") or [] if a.get("outcome") != "error"]
    return float(np.mean(known)) if known else float("nan")


def _highest(values: np.ndarray) -> float:
    """0 where nothing is known."""
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else 0.0


def _place(source: Any, folder: Path) -> Path:
    """A file of a prompt: as it is seen from the rollouts, by the shorter of its names; or where its path leads."""
    inside = folder / "rollouts" / str(source)
    if not inside.exists():
        return Path(str(source))
    place = os.path.realpath(inside)
    return Path(min(os.path.relpath(place), place, key=len))


def _rows(path: Path) -> list[Row]:
    """The objects of a file of JSON lines."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"run: {path} must be JSON lines, got {error}") from None
    if other := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"run: {path} must hold objects, got {other[0]!r:.60}")
    return rows


def _config(path: Path) -> Row:
    if not path.exists():
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"run: {path} must be YAML, got {str(error).splitlines()[0]}") from None
    found = found if isinstance(found, dict) else {}
    for name in SECTIONS:
        if not isinstance(found.get(name) or {}, dict):
            raise ValueError(f"run: {path}: {name} must be a mapping, got {found[name]!r:.60}")
    return found


def _ranges(steps: Sequence[int]) -> str:
    """1-40, 45, 47-60: which numbers there are; nothing where there are none."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "the waves (none is kept)"
