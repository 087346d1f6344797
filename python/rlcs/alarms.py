"""Watches each domain for rewards that rise without competence: the paper's figure of one weak verifier stalling all.

A step's facts of a domain go in; what looks wrong comes out, with what to do about it. The paper shows the failure and
leaves detection open: signals and limits are ours. No torch.

A curriculum draws easier or harder prompts as it goes, and a step has few of each domain, so a rise of the reward is
taken within categories, and must stand out from noise. With n and m groups of a category in the halves of the window,
    rise = sum_c w_c (late_c - then_c) / sum_c w_c,   w_c = nm / (n + m),   its variance s^2 / sum_c w_c,
s^2 the variance of groups within categories and halves, pooled, with one more degree of freedom at 1/4, the most that
rewards in [0, 1] can have: where most categories have one group a half, the groups alone say little of it, or 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .bounds import expect_within

Action = Literal["warn", "down-weight", "quarantine"]
MOST_VARIANCE = 0.25  # of rewards in [0, 1]


@dataclass(frozen=True)
class Limits:
    """From where on a signal is an alarm."""

    window: int = 20  # steps that a trend is taken over
    reward_rise: float = 0.1  # of the training reward over the window ...
    proxy_rise: float = 0.02  # ... with a strict held-out score that rises less than this ...
    sigmas: float = 3.0  # ... and so many standard errors less
    proxy_fall: float = 0.1  # of the held-out score below its best ...
    fall_sigmas: float = 4.0  # ... and so many standard errors below: the best of many is lucky
    lenience: float = 0.1  # of what its verifier grants held-out answers beyond the strict one's score (and `sigmas`)
    error_rate: float = 0.05  # verifier errors among the rollouts
    duplicates: float = 0.5  # share of the most common answer where the truths differ more
    length_ratio: float = 2.0  # of mean lengths, now over then (or then over now)
    language_shift: float = 0.2  # of the share of Chinese characters
    patience: int = 3  # steps that an alarm stands before the action is stronger

    def __post_init__(self) -> None:
        least = {**dict.fromkeys(vars(self), 0), "window": 2, "length_ratio": 1}
        expect_within("alarms", self, **{name: (value, math.inf) for name, value in least.items()})


@dataclass(frozen=True)
class Alarm:
    domain: str
    signal: str
    detail: str
    action: Action


@dataclass(frozen=True)
class Facts:
    """One domain in one step. ``proxy`` is a held-out score in which this domain's verifier has no part, if known."""

    rewards: Sequence[tuple[str, float]]  # category and mean reward of each group that was judged
    errors: int
    rollouts: int
    answers: Sequence[str]
    truths: Sequence[str]
    proxy: float | None = None
    proxy_error: float = 0.0  # its standard error
    lenience: float | None = None  # mean of the domain's own verdicts on the proxy's answers, less that score, if known
    lenience_error: float = 0.0


class Alarms:
    """``observe(step's facts by domain) -> alarms``; the trainer acts on them, e.g. by ``Curriculum.scale``."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._past: dict[str, list[dict[str, Any]]] = {}
        self._best: dict[str, tuple[float, float]] = {}  # held-out score and its error
        self._standing: dict[str, int] = {}  # "domain/signal" -> steps

    def observe(self, facts: Mapping[str, Facts]) -> list[Alarm]:
        alarms = []
        for domain, now in facts.items():
            past = self._past.setdefault(domain, [])
            past.append(_measures(now, past[-1] if past else None))
            del past[: -self.limits.window]
            if now.proxy is not None and now.proxy > self._best.get(domain, (-math.inf, 0.0))[0]:
                self._best[domain] = now.proxy, now.proxy_error
            found = self._signals(now, past, self._best.get(domain))
            for key in [k for k in self._standing if k.rsplit("/", 1)[0] == domain]:
                if key.rsplit("/", 1)[1] not in found:
                    del self._standing[key]
            for signal, detail in found.items():
                steps = self._standing[f"{domain}/{signal}"] = self._standing.get(f"{domain}/{signal}", 0) + 1
                alarms.append(Alarm(domain, signal, detail, self._action(steps)))
        return alarms

    def action(self, domain: str) -> Action | None:
        """The strongest action of the alarms that stand in a domain; None where none does.

        A quarantined domain is not drawn, so nothing ends its alarms: a person does, by turning the actions off.
        """
        steps = [n for key, n in self._standing.items() if key.rsplit("/", 1)[0] == domain]
        return self._action(max(steps)) if steps else None

    def _action(self, steps: int) -> Action:
        patience = self.limits.patience
        return "warn" if steps <= patience else "down-weight" if steps <= 2 * patience else "quarantine"

    def _signals(self, now: Facts, past: list[dict[str, Any]], best: tuple[float, float] | None) -> dict[str, str]:
        limits, last, found = self.limits, past[-1], dict[str, str]()
        if best is not None:  # a quick fall, which the means over a window would see late or never
            fall = best[0] - last["proxy"]
            if fall > max(limits.proxy_fall, limits.fall_sigmas * math.hypot(best[1], last["proxy_error"])):
                found["forgetting"] = f"held out {best[0]:.2f} -> {last['proxy']:.2f}"
        if now.lenience is not None and now.lenience > max(limits.lenience, limits.sigmas * now.lenience_error):
            found["lenience"] = f"its verifier grants {now.lenience:.2f} more than the strict one on the same answers"
        if now.rollouts and now.errors / now.rollouts > limits.error_rate:
            found["errors"] = f"{now.errors} verifier errors of {now.rollouts}"
        if last["duplicates"] > limits.duplicates:
            found["duplicates"] = f"{last['duplicates']:.0%} of the answers are one"
        if len(past) < limits.window:
            return found
        half = len(past) // 2
        halves = past[:half], past[half:]
        then, late = map(_means, halves)
        rise, variance = rise_within_categories(*([pair for row in part for pair in row["rewards"]] for part in halves))
        proxy = late["proxy"] - then["proxy"]
        noise = math.sqrt(variance + then["proxy_error"] ** 2 + late["proxy_error"] ** 2)
        apart = rise - proxy > limits.sigmas * noise  # false where the proxy is not known (NaN)
        if rise > limits.reward_rise and proxy < limits.proxy_rise and apart:
            found["hacking"] = f"reward {rise:+.2f}, held out {proxy:+.2f} over {limits.window} steps"
        ratio = (late["length"] + 1) / (then["length"] + 1)
        if max(ratio, 1 / ratio) > limits.length_ratio:
            found["length"] = f"mean answer {then['length']:.0f} -> {late['length']:.0f} characters"
        shift = late["chinese"] - then["chinese"]
        if abs(shift) > limits.language_shift:
            found["language"] = f"share of Chinese {then['chinese']:.0%} -> {late['chinese']:.0%}"
        return found

    def state_dict(self) -> dict[str, Any]:
        past = {domain: [dict(row) for row in rows] for domain, rows in self._past.items()}
        return {"past": past, "best": dict(self._best), "standing": dict(self._standing)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past = {k: [dict(x) for x in v] for k, v in state["past"].items()}
        self._best = {domain: (score, error) for domain, (score, error) in state["best"].items()}
        self._standing = dict(state["standing"])

    def metrics(self) -> dict[str, float]:
        return {f"alarms/{name}": float(steps) for name, steps in self._standing.items()}


def rise_within_categories(then: Sequence[tuple[str, float]], late: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Mean rise of the rewards of groups from ``then`` to ``late`` and its variance; (0, 0) where no category is in
    both."""
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for half, pairs in enumerate((then, late)):
        for category, reward in pairs:
            found[category][half].append(reward)
    both = [halves for halves in found.values() if all(halves)]
    weights = [len(a) * len(b) / (len(a) + len(b)) for a, b in both]
    if not both:
        return 0.0, 0.0
    means = [[sum(part) / len(part) for part in halves] for halves in both]
    rise = sum(w * (b - a) for w, (a, b) in zip(weights, means, strict=True)) / sum(weights)
    left = [
        (x - mean) ** 2
        for halves, pair in zip(both, means, strict=True)
        for part, mean in zip(halves, pair, strict=True)
        for x in part
    ]
    freedom = len(left) - 2 * len(both)
    return rise, (sum(left) + MOST_VARIANCE) / (freedom + 1) / sum(weights)


def _measures(facts: Facts, before: dict[str, Any] | None) -> dict[str, Any]:
    count = max(1, len(facts.answers))
    text = "".join(facts.answers)
    letters = sum(char.isalpha() for char in text)
    proxy = (facts.proxy, facts.proxy_error)
    if facts.proxy is None:
        proxy = (before["proxy"], before["proxy_error"]) if before else (math.nan, 0.0)
    return {
        "rewards": [[category, reward] for category, reward in facts.rewards],
        "proxy": proxy[0],
        "proxy_error": proxy[1],
        "duplicates": max(0.0, _mode_share(facts.answers) - _mode_share(facts.truths))
        if len(facts.answers) > 3
        else 0.0,
        "length": len(text) / count,
        "chinese": sum("\u3400" <= char <= "\u9fff" for char in text) / letters if letters else 0.0,
    }


def _mode_share(texts: Sequence[str]) -> float:
    return Counter(texts).most_common(1)[0][1] / len(texts) if texts else 0.0


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "rewards"}
