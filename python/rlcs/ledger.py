"""What is known of each prompt: a Beta posterior of its pass rate, fed by every rollout. No torch.

Dims: P prompts, G rollouts of a group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .files import whole

TIERS = ("very easy", "easy", "medium", "hard", "very hard")
TIER_LEAST = (0.9, 0.7, 0.3, 0.1, 0.0)  # lowest mean pass rate of each tier
TIER_PASS_RATE = (0.95, 0.8, 0.5, 0.2, 0.05)  # what a human's tier says of the pass rate


@dataclass(frozen=True)
class Settings:
    """Every number that the paper leaves open."""

    group_size: int = 8  # answers to each prompt, G
    forget: float = 0.75  # of what was known of a prompt, at each new group of it
    fade: float = 0.99  # of what was known of every prompt, at each draw: the model moves on
    prior: float = 2.0  # rollouts that the mean of a prompt's category counts as
    offline: float = 4.0  # rollouts that an offline pass rate or a human's tier counts as, at most
    tier_weights: tuple[float, ...] = (0.1, 0.6, 1.0, 0.7, 0.15)  # in a draw, "very easy" to "very hard"
    category_floor: float = 0.2  # least factor of a category in a draw
    ema: float = 0.3  # weight of the newest iteration's rates
    most_expansion: float = 4.0  # prompts of a draw for each valid group that is wanted, at most
    slack: float = 1.0  # standard deviations of the number of valid groups that a draw keeps in hand
    # How many prompts a draw holds: what should yield enough, the paper's ratio of late, or as many as are wanted.
    expansion: Literal["expected", "ratio", "off"] = "expected"
    weighting: bool = True  # draw by tier and category; otherwise all prompts alike

    def __post_init__(self) -> None:
        for name, least, most in (
            ("group_size", 2, 1 << 16), ("forget", 0, 1), ("fade", 0, 1), ("prior", 1e-3, 1e6), ("offline", 0, 1e6),
            ("category_floor", 0, 1), ("ema", 1e-6, 1), ("most_expansion", 1, 1e3), ("slack", 0, 10),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"curriculum: {name} must be from {least} to {most}, got {value}")
        weights = self.tier_weights
        if len(weights) != len(TIERS) or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"curriculum: tier_weights must be {len(TIERS)}, not below 0 nor all 0, got {weights}")
        if self.expansion not in ("expected", "ratio", "off"):
            raise ValueError(f"curriculum: expansion must be expected, ratio or off, got {self.expansion!r}")


class Ledger:
    """What is known of each prompt: its category, and rollouts passed and failed, in which fractions count in parts."""

    def __init__(self, tasks: Iterable[Any], settings: Settings) -> None:
        rows = [_row(task) for task in tasks]
        if not rows:
            raise ValueError("curriculum: tasks must hold at least one, got none")
        self.ids = [row["id"] for row in rows]
        self.index = {name: i for i, name in enumerate(self.ids)}
        if len(self.index) != len(self.ids):
            twice = next(name for i, name in enumerate(self.ids) if self.index[name] != i)
            raise ValueError(f"curriculum: ids must differ, got {twice!r} twice")
        self.categories = list(dict.fromkeys(row["category"] for row in rows))
        place = {name: i for i, name in enumerate(self.categories)}
        self.category = np.array([place[row["category"]] for row in rows])  # [P]
        self.settings = settings
        rate = np.array([row["rate"] for row in rows])
        weight = np.minimum(settings.offline, [row["attempts"] for row in rows])
        self.passed = np.where(weight > 0, rate * weight, 0.0)  # [P]
        self.failed = np.where(weight > 0, (1 - rate) * weight, 0.0)
        self.rollouts = np.zeros(len(rows), dtype=np.int64)
        self.seen = np.full(len(rows), -1, dtype=np.int64)  # the draw that last observed it

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, at: int, rewards: np.ndarray, draw: int) -> None:
        """Takes in the rewards ``[G]`` in [0, 1] of prompt ``at``, seen after so many draws."""
        keep = self.settings.forget
        self.passed[at] = self.passed[at] * keep + rewards.sum()
        self.failed[at] = self.failed[at] * keep + (1 - rewards).sum()
        self.rollouts[at] += len(rewards)
        self.seen[at] = draw

    def age(self) -> None:
        """Lets all that is known fade, once for each draw."""
        self.passed *= self.settings.fade
        self.failed *= self.settings.fade

    def category_rate(self) -> np.ndarray:
        """[categories] mean pass rate, a half where nothing is known."""
        count = len(self.categories)
        passed = np.bincount(self.category, self.passed, count)
        failed = np.bincount(self.category, self.failed, count)
        return (passed + 1) / (passed + failed + 2)

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), each [P]; the category's mean is the prior."""
        prior = self.settings.prior
        rate = self.category_rate()[self.category]
        return self.passed + prior * rate, self.failed + prior * (1 - rate)

    def pass_rate(self) -> np.ndarray:
        """[P] mean of each prompt's posterior."""
        alpha, beta = self.posterior()
        return alpha / (alpha + beta)

    def tier(self) -> np.ndarray:
        """[P] index into :data:`TIERS`."""
        return tiers_of(self.pass_rate())

    def valid_chance(self) -> np.ndarray:
        """[P] chance that a group of G is neither all right nor all wrong: 1 - E[p^G] - E[(1 - p)^G]."""
        alpha, beta = self.posterior()
        steps = np.arange(self.settings.group_size)[:, None]
        every = np.prod((alpha + steps) / (alpha + beta + steps), axis=0)
        none = np.prod((beta + steps) / (alpha + beta + steps), axis=0)
        return np.clip(1 - every - none, 0.0, 1.0)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a prompt, for people and files."""
        alpha, beta = self.posterior()
        rate, tier = alpha / (alpha + beta), self.tier()
        spread = np.sqrt(rate * (1 - rate) / (alpha + beta + 1))
        return [
            {
                "id": name,
                "category": self.categories[self.category[i]],
                "pass_rate": float(rate[i]),
                "pass_rate_std": float(spread[i]),
                "tier": TIERS[tier[i]],
                "rollouts": int(self.rollouts[i]),
                "last_draw": int(self.seen[i]),
            }
            for i, name in enumerate(self.ids)
        ]

    def export(self, path: str | Path) -> None:
        """Writes :meth:`rows` as ``.jsonl`` or ``.parquet`` (needs pyarrow), whole or not at all."""
        path = Path(path)
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"curriculum: path must end in .jsonl or .parquet, got {path}")
        with whole(path) as part:
            if path.suffix == ".jsonl":
                with open(part, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
            else:
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows()), part)


def tiers_of(pass_rate: np.ndarray) -> np.ndarray:
    """Index into :data:`TIERS` of each pass rate."""
    return np.argmax(pass_rate[..., None] >= np.array(TIER_LEAST), axis=-1)


def _row(task: Any) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        return task.get(name, default) if isinstance(task, Mapping) else getattr(task, name, default)

    if isinstance(task, str):
        return {"id": task, "category": "all", "rate": 0.5, "attempts": 0.0}
    name = get("id")
    if not isinstance(name, str) or not name:
        raise ValueError(f"curriculum: a task's id must be a text, got {name!r}")
    domain, category = get("domain") or "all", get("category")
    known, prior = 0.0, 0.5  # rollouts that say something of the pass rate, and their mean
    tier, rate = get("tier"), get("pass_rate")
    if tier is not None:
        if tier not in TIERS:
            raise ValueError(f"curriculum: tier of {name!r} must be one of {', '.join(TIERS)}, got {tier!r}")
        known, prior = 2.0, TIER_PASS_RATE[TIERS.index(tier)]
    attempts = 4 if (given := get("attempts")) is None else given
    if rate is not None and attempts != 0:  # of none, nothing is known
        known_both = isinstance(rate, Real) and isinstance(attempts, Real)
        if not (known_both and 0 <= rate <= 1 and 0 < attempts < math.inf):
            raise ValueError(
                f"curriculum: pass_rate of {name!r} must be in [0, 1], got {rate!r} of {attempts!r} attempts"
            )
        known, prior = known + attempts, (prior * known + rate * attempts) / (known + attempts)
    return {
        "id": name,
        "category": domain if category in (None, "") else f"{domain}/{category}",
        "rate": prior,
        "attempts": known,
    }
