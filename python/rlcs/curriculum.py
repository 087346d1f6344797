"""Which prompts to roll out next, how many, and which groups to train on: curriculum sampling. No torch.

Per prompt a ledger keeps a Beta posterior of the pass rate, fed by every rollout, those of discarded groups included.
From it come tiers ("very easy" to "very hard"), the weights of the next draw, the number of prompts that one wave must
hold so that enough groups are valid (neither all right nor all wrong), and the histogram of what was drawn.

The paper (arXiv 2507.01006, section 5) names ``not_valid_sample_rate``, ``expansion_ratio`` and
``expansion_ratio_ema`` and says that weights follow tiers and sub-categories. Numbers, the posterior, the averaging of
the rate in place of the ratio, the clamp and the slack are ours. Dims: P prompts, G rollouts of a group.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

TIERS = ("very easy", "easy", "medium", "hard", "very hard")
TIER_LEAST = (0.9, 0.7, 0.3, 0.1, 0.0)  # lowest mean pass rate of each tier
TIER_PASS_RATE = (0.95, 0.8, 0.5, 0.2, 0.05)  # what a human's tier says of the pass rate
TIER_WEIGHT = (0.1, 0.6, 1.0, 0.7, 0.15)
VALID_SPREAD = 1e-6  # of the rewards in a group; continuous rewards are equal to rounding


@dataclass(frozen=True)
class Settings:
    """Every number that the paper leaves open."""

    group_size: int = 8  # G
    forget: float = 0.75  # of what was known of a prompt, at each new group of it
    fade: float = 0.99  # of what was known of every prompt, at each draw: the model moves on
    prior: float = 2.0  # rollouts that the mean of a prompt's category counts as
    offline: float = 4.0  # rollouts that an offline pass rate or a human's tier counts as, at most
    category_floor: float = 0.2  # least factor of a category
    ema: float = 0.3  # weight of the newest iteration's rates
    most_expansion: float = 4.0
    slack: float = 1.0  # standard deviations of the number of valid groups that a draw keeps in hand
    expansion: Literal["expected", "ratio", "off"] = "expected"
    weighting: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (
            ("group_size", 2, 1 << 16), ("forget", 0, 1), ("fade", 0, 1), ("prior", 1e-3, 1e6), ("offline", 0, 1e6),
            ("category_floor", 0, 1), ("ema", 1e-6, 1), ("most_expansion", 1, 1e3), ("slack", 0, 10),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"curriculum: {name} must be from {least} to {most}, got {value}")
        if self.expansion not in ("expected", "ratio", "off"):
            raise ValueError(f"curriculum: expansion must be expected, ratio or off, got {self.expansion!r}")


class Ledger:
    """What is known of each prompt: rollouts passed and failed (fractions count in parts), and by which category."""

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
        keep = self.settings.forget
        self.passed[at] = self.passed[at] * keep + rewards.sum()
        self.failed[at] = self.failed[at] * keep + (1 - rewards).sum()
        self.rollouts[at] += len(rewards)
        self.seen[at] = draw

    def age(self) -> None:
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
        part = path.with_name(path.name + ".part")
        if path.suffix == ".jsonl":
            with open(part, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
                file.flush()
                os.fsync(file.fileno())
        elif path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows()), part)
        else:
            raise ValueError(f"curriculum: path must end in .jsonl or .parquet, got {path}")
        os.replace(part, path)


class Curriculum:
    """Draws prompts, learns from their rewards, and says which groups to train on.

    ::

        curriculum = Curriculum(tasks, seed=0)
        while True:
            groups = [(id, rollout(id)) for id in curriculum.draw(64)]  # one wave, already expanded
            for id, rewards in groups:
                curriculum.observe(id, rewards)
            train(curriculum.select(groups, 64))

    Args:
        tasks: ids, or mappings or objects with ``id`` and, if known, ``domain``, ``category``, ``tier`` (one of
            :data:`TIERS`), ``pass_rate`` with ``attempts`` (offline pass@k).
        seed: of the draws; the same seed and observations give the same draws.
        settings: see :class:`Settings`.
    """

    def __init__(self, tasks: Iterable[Any], seed: int = 0, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.ledger = Ledger(tasks, self.settings)
        self._random = np.random.default_rng(seed)
        self._draws = 0
        self._rate: float | None = None  # EMA of not_valid_sample_rate
        self._calibration = 1.0  # EMA of valid groups over those expected
        self._valid, self._groups, self._expected = 0, 0, 0.0  # since the last draw
        self._chances: dict[int, float] = {}  # prompt of the last draw -> chance that its group is valid
        self._factors: dict[str, float] = {}  # of domains or categories, set from outside
        self._last: dict[str, float] = {}

    # --- act ---

    def draw(self, n: int) -> list[str]:
        """Ids of one wave that should yield ``n`` valid groups; none twice, at most all of them."""
        if n < 1:
            raise ValueError(f"draw: n must be at least 1, got {n}")
        self._end_iteration()
        weights = self.weights()
        # Largest u^(1/w) first is a weighted draw without replacement (Efraimidis and Spirakis 2006).
        keys = np.log(self._random.random(len(weights))) / np.maximum(weights, 1e-300)
        order = np.argsort(-keys, kind="stable")[: math.ceil(n * self.settings.most_expansion)]
        order = order[weights[order] > 0]
        raw = self.ledger.valid_chance()[order]
        chance = np.clip(raw * self._calibration, 0.0, 1.0)
        count = self._wave(n, chance)
        chosen = order[:count]
        self._chances = {int(i): float(x) for i, x in zip(chosen, raw, strict=False)}
        self._note(chosen, weights, chance[:count], n)
        self._draws += 1
        return [self.ledger.ids[i] for i in chosen]

    def _wave(self, n: int, chance: np.ndarray) -> int:
        """How many of the prompts in this order to roll out."""
        most = min(len(chance), math.ceil(n * self.settings.most_expansion))
        if self.settings.expansion == "off":
            return min(n, most)
        if self.settings.expansion == "ratio":
            return min(math.ceil(n * self.expansion_ratio_ema), most)
        sure = np.cumsum(chance) - self.settings.slack * np.sqrt(np.cumsum(chance * (1 - chance)))
        enough = np.flatnonzero(sure >= n)
        return min(most, max(n, int(enough[0]) + 1 if len(enough) else most))

    def weights(self) -> np.ndarray:
        """[P] of the next draw: the tier's weight times the category's, times what :meth:`scale` has set."""
        outside = np.array([self._factor(name) for name in self.ledger.categories])[self.ledger.category]
        if not self.settings.weighting:
            return np.ones(len(self.ledger)) * outside
        tier = np.array(TIER_WEIGHT)[self.ledger.tier()]
        rate = self.ledger.category_rate()
        category = np.maximum(self.settings.category_floor, 4 * rate * (1 - rate))[self.ledger.category]
        return tier * category * outside

    def scale(self, name: str, factor: float) -> None:
        """Multiplies the weights of a category (or of all below a name, up to a ``/``); 0 is a quarantine."""
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"scale: factor must be 0 or positive, got {factor}")
        if not any(f"{category}/".startswith(f"{name}/") for category in self.ledger.categories):
            raise ValueError(f"scale: name must be a category or a domain of the tasks, got {name!r}")
        self._factors[name] = factor

    def _factor(self, category: str) -> float:
        return math.prod(x for name, x in self._factors.items() if f"{category}/".startswith(f"{name}/"))

    def select(self, groups: Sequence[Any], n: int) -> list[Any]:
        """At most ``n`` valid groups, in their order, whose right and wrong rollouts are closest to equal in number.

        A group is ``(id, rewards)`` or has ``rewards``; None among them is a verifier error and does not count.
        Continuous rewards are balanced around a half. Groups without spread are never chosen: they teach nothing.
        """
        sums = [_surplus(_rewards(group)) if is_valid(_rewards(group)) else None for group in groups]
        valid = [i for i, x in enumerate(sums) if x is not None]
        chosen = balanced([sums[i] for i in valid], n)  # type: ignore[misc]
        return [groups[valid[i]] for i in sorted(chosen)]

    # --- observe ---

    def observe(self, id: str, rewards: Sequence[float | None]) -> None:
        """Takes in the rewards in [0, 1] of one group; None is a verifier error, which says nothing of the prompt."""
        if id not in self.ledger.index:
            raise ValueError(f"observe: id must be one of the tasks, got {id!r}")
        at = self.ledger.index[id]
        known = np.array([r for r in rewards if r is not None], dtype=np.float64)
        if len(known) and not ((known >= 0) & (known <= 1)).all():
            raise ValueError(f"observe: rewards of {id!r} must be in [0, 1], got {list(rewards)}")
        if not len(known):
            return
        if at in self._chances:  # expectations are known of what was drawn
            self._groups += 1
            self._valid += is_valid(rewards)
            self._expected += self._chances[at]
        self.ledger.add(at, known, self._draws)

    def _end_iteration(self) -> None:
        self.ledger.age()
        if not self._groups:
            return
        rate = 1 - self._valid / self._groups
        ema = self.settings.ema
        self._rate = rate if self._rate is None else (1 - ema) * self._rate + ema * rate
        if self._expected > 0:
            observed = min(2.0, max(0.25, self._valid / self._expected))
            self._calibration = (1 - ema) * self._calibration + ema * observed
        self._valid, self._groups, self._expected = 0, 0, 0.0

    @property
    def expansion_ratio_ema(self) -> float:
        """1 / (1 - not_valid_sample_rate), of the averaged rate, clamped; 1 before anything was observed."""
        if self._rate is None:
            return 1.0
        return min(self.settings.most_expansion, 1 / max(1 - self._rate, 1e-9))

    # --- state and metrics ---

    def _note(self, chosen: np.ndarray, weights: np.ndarray, chance: np.ndarray, n: int) -> None:
        drawn = np.bincount(self.ledger.tier()[chosen], minlength=len(TIERS))
        share = weights / weights.sum() if weights.sum() else weights
        self._last = {
            "drawn": float(len(chosen)),
            "expansion": len(chosen) / n,
            "expected_valid": float(chance.sum()),
            "effective_sample_size": float(1 / (share**2).sum()) if weights.sum() else 0.0,
        } | {f"drawn/{name}": float(count) for name, count in zip(TIERS, drawn, strict=True)}

    def metrics(self) -> dict[str, float]:
        """Of the last draw (its tiers, size and expectation) and of the ledger."""
        rate, tier = self.ledger.pass_rate(), np.bincount(self.ledger.tier(), minlength=len(TIERS))
        return {
            **self._last,
            "expansion_ratio_ema": self.expansion_ratio_ema,
            "not_valid_sample_rate_ema": self._rate or 0.0,
            "calibration": self._calibration,
            "pass_rate": float(rate.mean()),
            **{f"ledger/{name}": float(count) for name, count in zip(TIERS, tier, strict=True)},
            **{
                f"pass_rate/{n}": float(r)
                for n, r in zip(self.ledger.categories, self.ledger.category_rate(), strict=True)
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draw depends on, as JSON's types."""
        return {
            "settings": asdict(self.settings),
            "ids": list(self.ledger.ids),
            "passed": self.ledger.passed.tolist(),
            "failed": self.ledger.failed.tolist(),
            "rollouts": self.ledger.rollouts.tolist(),
            "seen": self.ledger.seen.tolist(),
            "random": self._random.bit_generator.state,
            "draws": self._draws,
            "rate": self._rate,
            "calibration": self._calibration,
            "iteration": [self._valid, self._groups, self._expected],
            "chances": {self.ledger.ids[i]: x for i, x in self._chances.items()},
            "factors": dict(self._factors),
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the state was saved. Tasks that came since keep their prior; those that went are dropped."""
        at = {name: i for i, name in enumerate(state["ids"])}
        for i, name in enumerate(self.ledger.ids):
            if (j := at.get(name)) is not None:
                self.ledger.passed[i], self.ledger.failed[i] = state["passed"][j], state["failed"][j]
                self.ledger.rollouts[i], self.ledger.seen[i] = state["rollouts"][j], state["seen"][j]
        self._random.bit_generator.state = state["random"]
        self._draws, self._rate, self._calibration = state["draws"], state["rate"], state["calibration"]
        self._valid, self._groups, self._expected = state["iteration"]
        self._chances = {self.ledger.index[n]: x for n, x in state["chances"].items() if n in self.ledger.index}
        self._factors, self._last = dict(state["factors"]), dict(state["last"])


def tiers_of(pass_rate: np.ndarray) -> np.ndarray:
    """Index into :data:`TIERS` of each pass rate."""
    return np.argmax(pass_rate[..., None] >= np.array(TIER_LEAST), axis=-1)


def is_valid(rewards: Sequence[float | None]) -> bool:
    """Whether a group's rewards differ, beyond rounding."""
    known = [r for r in rewards if r is not None]
    return len(known) > 1 and max(known) - min(known) > VALID_SPREAD


def balanced(surplus: Sequence[float], n: int) -> list[int]:
    """Indices of ``n`` entries whose sum is close to 0: the smallest ones, then swaps as long as one helps."""
    order = sorted(range(len(surplus)), key=lambda i: (abs(surplus[i]), i))
    inside, outside = order[:n], order[n:]
    total = sum(surplus[i] for i in inside)
    while outside:
        best, pair = abs(total) - 1e-12, None
        by_size = sorted(outside, key=lambda i: surplus[i])
        values = np.array([surplus[i] for i in by_size])
        for a, i in enumerate(inside):
            wanted = surplus[i] - total  # of the one that takes its place
            at = int(np.searchsorted(values, wanted))
            for b in (at - 1, at):
                if 0 <= b < len(values) and abs(total - surplus[i] + values[b]) < best:
                    best, pair = abs(total - surplus[i] + values[b]), (a, by_size[b])
        if pair is None:
            break
        a, j = pair
        total += surplus[j] - surplus[inside[a]]
        outside[outside.index(j)], inside[a] = inside[a], j
    return inside


def _surplus(rewards: Sequence[float | None]) -> float:
    """Right beyond wrong, in rollouts: the sum of reward - 1/2."""
    return sum(r - 0.5 for r in rewards if r is not None)


def _rewards(group: Any) -> Sequence[float | None]:
    if isinstance(group, Mapping):
        return group["rewards"]
    return group.rewards if hasattr(group, "rewards") else group[1]


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
    if rate is not None:
        attempts = float(get("attempts") or 4)
        if not (0 <= rate <= 1 and attempts > 0):
            raise ValueError(f"curriculum: pass_rate of {name!r} must be in [0, 1], got {rate} of {attempts} attempts")
        known, prior = known + attempts, (prior * known + rate * attempts) / (known + attempts)
    return {"id": name, "category": f"{domain}/{category}" if category else domain, "rate": prior, "attempts": known}
