"""Which prompts to roll out next, how many, and which groups to train on: curriculum sampling. No torch.

Per prompt a ledger keeps a Beta posterior of the pass rate, fed by every rollout, those of discarded groups included.
From it come tiers ("very easy" to "very hard"), the weights of the next draw, the number of prompts that one wave must
hold so that enough groups are valid (neither all right nor all wrong), and the histogram of what was drawn.

The paper (arXiv 2507.01006, section 5) names ``not_valid_sample_rate``, ``expansion_ratio`` and
``expansion_ratio_ema`` and says that weights follow tiers and sub-categories. Numbers, the posterior, the averaging of
the rate in place of the ratio, the clamp and the slack are ours. Dims: P prompts, G rollouts of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

import numpy as np

from .ledger import TIERS, Ledger, Settings

VALID_SPREAD = 1e-6  # of the rewards in a group; continuous rewards are equal to rounding


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
            :data:`TIERS`), ``pass_rate`` with ``attempts`` (offline pass@k; 4 if not given; of 0 nothing is known).
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
        self._left_out: set[int] = set()  # prompts that cannot be asked
        self._last: dict[str, float] = {}

    # --- act ---

    def draw(self, n: int) -> list[str]:
        """Ids of one wave that should yield ``n`` valid groups; none twice, at most all of them."""
        if not isinstance(n, Integral) or n < 1:
            raise ValueError(f"draw: n must be a whole number of 1 or more, got {n!r}")
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
        most = len(chance)
        if self.settings.expansion == "off":
            return min(n, most)
        if self.settings.expansion == "ratio":
            return min(math.ceil(n * self.expansion_ratio_ema), most)
        sure = np.cumsum(chance) - self.settings.slack * np.sqrt(np.cumsum(chance * (1 - chance)))
        enough = np.flatnonzero(sure >= n)
        return min(most, max(n, int(enough[0]) + 1 if len(enough) else most))

    def weights(self) -> np.ndarray:
        """[P] of the next draw: the tier's weight times the category's, times what :meth:`scale` has set."""
        outside = np.array([self.factor(name) for name in self.ledger.categories])[self.ledger.category]
        outside[list(self._left_out)] = 0.0
        if not self.settings.weighting:
            return np.ones(len(self.ledger)) * outside
        tier = np.array(self.settings.tier_weights)[self.ledger.tier()]
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

    def leave_out(self, id: str) -> None:
        """Never draws a prompt again: it cannot be asked, and as nothing is learned of it, its weight would stay."""
        if id not in self.ledger.index:
            raise ValueError(f"leave_out: id must be one of the tasks, got {id!r}")
        self._left_out.add(self.ledger.index[id])

    def factor(self, category: str) -> float:
        """What :meth:`scale` has set for it and for what it is below."""
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
        known = np.array([r for r in rewards if r is not None])
        if known.dtype.kind not in "biuf" or not ((known >= 0) & (known <= 1)).all():
            raise ValueError(f"observe: rewards of {id!r} must be in [0, 1], got {list(rewards)}")
        known = known.astype(np.float64)
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
            "left_out": [self.ledger.ids[i] for i in sorted(self._left_out)],
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the state was saved. Tasks that came since keep their prior; those that went are dropped."""
        state = {"left_out": [], **state}  # which older runs did not save
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise ValueError(f"load_state_dict: state must hold what state_dict gives, {missing[0]} is missing")
        known = ("passed", "failed", "rollouts", "seen")
        if short := [name for name in known if len(state[name]) != len(state["ids"])]:
            raise ValueError(f"load_state_dict: {short[0]} must be one for each of the ids, got {len(state[short[0]])}")
        try:
            self._random.bit_generator.state = state["random"]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError("load_state_dict: random must be the state of numpy's generator, got another") from None
        at = {name: i for i, name in enumerate(state["ids"])}
        for i, name in enumerate(self.ledger.ids):
            if (j := at.get(name)) is not None:
                self.ledger.passed[i], self.ledger.failed[i] = state["passed"][j], state["failed"][j]
                self.ledger.rollouts[i], self.ledger.seen[i] = state["rollouts"][j], state["seen"][j]
        self._draws, self._rate, self._calibration = state["draws"], state["rate"], state["calibration"]
        self._valid, self._groups, self._expected = state["iteration"]
        self._chances = {self.ledger.index[n]: x for n, x in state["chances"].items() if n in self.ledger.index}
        self._factors, self._last = dict(state["factors"]), dict(state["last"])
        self._left_out = {self.ledger.index[name] for name in state["left_out"] if name in self.ledger.index}


def is_valid(rewards: Sequence[float | None]) -> bool:
    """Whether a group's rewards differ, beyond rounding."""
    known = [float(r) for r in rewards if r is not None]  # numpy and torch subtract no booleans
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
