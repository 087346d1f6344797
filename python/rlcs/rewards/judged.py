"""Video, places, long documents: the same words, or a judge. General questions: a judge alone."""

from __future__ import annotations

from dataclasses import dataclass

from .choice import Words
from .judge import Judge
from .verdict import Verdict


@dataclass(frozen=True)
class Exact(Words):
    """As :class:`Words`: what no rule decides is wrong without a judge."""


@dataclass(frozen=True)
class Open:
    """An open question: nothing but a judge can tell, so without one the verifier fails, and says so."""

    judge: Judge | None = None

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        if self.judge is None:
            raise LookupError("this domain needs a judge: rlcs.rewards.use_judge(Judge([Endpoint(...)]))")
        return self.judge.grade(answer, truth, question)
