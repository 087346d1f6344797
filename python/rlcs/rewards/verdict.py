"""What a verifier says of one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Outcome = Literal["score", "wrong", "format", "error"]


@dataclass(frozen=True)
class Verdict:
    """``outcome`` decides what a trainer does with ``score`` in [0, 1]:

    ``score``: judged, worth ``score`` > 0. ``wrong``: judged, worth 0. ``format``: not judged, since the response is
    not of the form that training asks for; worth 0. ``error``: the verifier failed, which says nothing of the answer:
    mask the rollout, count it, and never take the 0 for a reward. ``detail`` says why, for people.
    """

    outcome: Outcome
    score: float = 0.0
    detail: str = ""

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            raise ValueError(f"verdict: outcome must be one of {', '.join(get_args(Outcome))}, got {self.outcome!r}")
        if not (0.0 <= self.score <= 1.0 if self.outcome == "score" else self.score == 0.0):
            due = "in [0, 1]" if self.outcome == "score" else "0"
            raise ValueError(f"verdict: score of {self.outcome!r} must be {due}, got {self.score}")
        if not isinstance(self.detail, str):  # it is written down, and travels as JSON
            raise ValueError(f"verdict: detail must be a text, got {type(self.detail).__name__}")

    @property
    def failed(self) -> bool:
        """Whether the rollout must be left out of the loss."""
        return self.outcome == "error"


def graded(score: float, detail: str = "") -> Verdict:
    """A score in [0, 1]; 0 is ``wrong``."""
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"verdict: score must be in [0, 1], got {score}")
    return Verdict("score", score, detail) if score > 0 else wrong(detail)


def right(detail: str = "") -> Verdict:
    return Verdict("score", 1.0, detail)


def wrong(detail: str = "") -> Verdict:
    return Verdict("wrong", 0.0, detail)


def judged(is_right: bool, detail: str = "") -> Verdict:
    return right(detail) if is_right else wrong(detail)
