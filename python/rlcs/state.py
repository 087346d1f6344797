"""What ``state.json`` of a checkpoint holds, as the trainers write it: held to it before a run goes on from there.

What a newer version has beside it is passed over; what an older one had not has a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, InstanceOf, TypeAdapter, ValidationError

from .bounds import WHOLE

Count = Annotated[int, Field(strict=True, ge=0, le=WHOLE)]
Number = Annotated[float, Field(strict=True)]  # NaN: not known
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = InstanceOf[str]  # may hold half a pair of UTF-16, as an answer may


@dataclass(frozen=True)
class Kept:
    """By every run."""

    config: dict[str, Any]
    seconds: Amount


@dataclass(frozen=True)
class KeptBySft(Kept):
    """A position in the data, see `stream`; the other numbers stand where a stream was read."""

    position: Count
    epoch: Count
    block: Count = 0
    file: Count = 0
    row: Count = 0
    taken: Count = 0


@dataclass(frozen=True)
class Curriculum:
    ids: list[str]
    passed: list[Amount]
    failed: list[Amount]
    rollouts: list[Count]
    seen: list[Annotated[int, Field(strict=True, ge=-1, le=WHOLE)]]
    random: dict[str, Any]
    draws: Count
    rate: Amount | None
    calibration: Amount
    iteration: tuple[Count, Count, Amount]
    chances: dict[str, Amount]
    factors: dict[str, Amount]
    last: dict[str, Number]
    left_out: list[str] = ()  # type: ignore[assignment]


@dataclass(frozen=True)
class Step:
    """One of those that the alarms look back on."""

    rewards: list[tuple[str, Number]]
    proxy: Number
    proxy_error: Number
    duplicates: Number
    length: Number
    chinese: Number


@dataclass(frozen=True)
class Alarms:
    past: dict[str, list[Step]]
    best: dict[str, tuple[Number, Number]]
    standing: dict[str, Count]


@dataclass(frozen=True)
class Rollout:
    token_ids: list[Count]
    logprobs: list[Number]
    sampled: list[Flag]
    text: Text
    finish_reason: str
    verdict: tuple[str, Number, Text]


@dataclass(frozen=True)
class Group:
    task: str
    wave: Count
    rollouts: list[Rollout]


@dataclass(frozen=True)
class Ahead:
    groups: list[Group]
    seconds: Amount


@dataclass(frozen=True)
class Totals:
    waves: Count
    rollouts: Count
    sampled_tokens: Count
    trained_tokens: Count
    optimizer_steps: Count


@dataclass(frozen=True)
class KeptByTrain(Kept):
    curriculum: Curriculum
    alarms: Alarms
    carried: list[Group]
    proxies: dict[str, tuple[Number, Number]]
    lenience: dict[str, tuple[Number, Number]]
    totals: Totals
    ahead: Ahead | None = None


def expect(kind: type[Kept], found: Any, path: Path) -> None:
    """Raises ValueError where a file holds anything else."""
    try:
        TypeAdapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"checkpoint: {path}: {at}: {first['msg']}, got {first['input']!r:.60}") from None
