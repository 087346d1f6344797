"""Watches each domain for rewards that rise without competence: the paper's figure of one weak verifier stalling all.

A step's facts of a domain go in; what looks wrong comes out, with what to do about it. The paper shows the failure and
leaves detection open: signals and limits are ours. No torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["warn", "down-weight", "quarantine"]


@dataclass(frozen=True)
class Limits:
    """From where on a signal is an alarm."""

    window: int = 20  # steps that a trend is taken over
    reward_rise: float = 0.1  # of the training reward over the window ...
    proxy_rise: float = 0.02  # ... with a strict held-out score that rises less than this
    error_rate: float = 0.05  # verifier errors among the rollouts
    duplicates: float = 0.5  # share of the most common answer where the truths differ more
    length_ratio: float = 2.0  # of mean lengths, now over then (or then over now)
    language_shift: float = 0.2  # of the share of Chinese characters
    patience: int = 3  # steps that an alarm stands before the action is stronger


@dataclass(frozen=True)
class Alarm:
    domain: str
    signal: str
    detail: str
    action: Action


@dataclass(frozen=True)
class Facts:
    """One domain in one step. ``proxy`` is a held-out score in which this domain's verifier has no part, if known."""

    reward: float  # NaN where no rollout was judged
    errors: int
    rollouts: int
    answers: Sequence[str]
    truths: Sequence[str]
    proxy: float | None = None


class Alarms:
    """``observe(step's facts by domain) -> alarms``; the trainer acts on them, e.g. by ``Curriculum.scale``."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._past: dict[str, list[dict[str, float]]] = {}
        self._standing: dict[str, int] = {}  # "domain/signal" -> steps

    def observe(self, facts: Mapping[str, Facts]) -> list[Alarm]:
        alarms = []
        for domain, now in facts.items():
            past = self._past.setdefault(domain, [])
            past.append(_measures(now, past[-1] if past else None))
            del past[: -self.limits.window]
            found = self._signals(now, past)
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

    def _signals(self, now: Facts, past: list[dict[str, float]]) -> dict[str, str]:
        limits, found, last = self.limits, {}, past[-1]
        if now.rollouts and now.errors / now.rollouts > limits.error_rate:
            found["errors"] = f"{now.errors} verifier errors of {now.rollouts}"
        if last["duplicates"] > limits.duplicates:
            found["duplicates"] = f"{last['duplicates']:.0%} of the answers are one"
        if len(past) < limits.window:
            return found
        half = len(past) // 2
        then, late = (_means(part) for part in (past[:half], past[half:]))
        rise, proxy = late["reward"] - then["reward"], late["proxy"] - then["proxy"]
        if rise > limits.reward_rise and proxy < limits.proxy_rise:  # false where the proxy is not known (NaN)
            found["hacking"] = f"reward {rise:+.2f}, held out {proxy:+.2f} over {limits.window} steps"
        ratio = (late["length"] + 1) / (then["length"] + 1)
        if max(ratio, 1 / ratio) > limits.length_ratio:
            found["length"] = f"mean answer {then['length']:.0f} -> {late['length']:.0f} characters"
        shift = late["chinese"] - then["chinese"]
        if abs(shift) > limits.language_shift:
            found["language"] = f"share of Chinese {then['chinese']:.0%} -> {late['chinese']:.0%}"
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"past": {k: [dict(x) for x in v] for k, v in self._past.items()}, "standing": dict(self._standing)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past = {k: [dict(x) for x in v] for k, v in state["past"].items()}
        self._standing = dict(state["standing"])

    def metrics(self) -> dict[str, float]:
        return {f"alarms/{name}": float(steps) for name, steps in self._standing.items()}


def _measures(facts: Facts, before: dict[str, float] | None) -> dict[str, float]:
    count = max(1, len(facts.answers))
    text = "".join(facts.answers)
    letters = sum(char.isalpha() for char in text)
    proxy = facts.proxy if facts.proxy is not None else (before["proxy"] if before else math.nan)
    return {
        "reward": before["reward"] if before and math.isnan(facts.reward) else facts.reward,
        "proxy": proxy,
        "duplicates": max(0.0, _mode_share(facts.answers) - _mode_share(facts.truths))
        if len(facts.answers) > 3
        else 0.0,
        "length": len(text) / count,
        "chinese": sum("\u3400" <= char <= "\u9fff" for char in text) / letters if letters else 0.0,
    }


def _mode_share(texts: Sequence[str]) -> float:
    return Counter(texts).most_common(1)[0][1] / len(texts) if texts else 0.0


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
