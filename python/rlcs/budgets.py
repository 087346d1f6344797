"""Thinking budgets of many answers, on the host. Dims: N prompts, A answers, B answers that run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm4v import Glm4v
from glm4v.answer import CLOSE_THINK, OPEN_ANSWER, OPEN_THINK
from glm4v.generate import ThinkingBudget

from .prompts import Prompt

NEVER = np.iinfo(np.int64).max


class Budgets:
    """`ThinkingBudget` for all answers at once: who must say what next.

    Args:
        model: its tokenizer spells the tags.
        prompts: whether a template has opened the thinking is seen at their end.
        answers: A.
    """

    def __init__(self, model: Glm4v, prompts: Sequence[Prompt], answers: int) -> None:
        spelt = {tag: _encode(model, tag) for tag in (OPEN_THINK, CLOSE_THINK, OPEN_ANSWER)}
        self.open, close, answer = spelt.values()
        self.ends = (close, answer)
        self.script = np.array([*self.open, *close, *answer, -1])
        opened = [ThinkingBudget(None, prompt.input_ids.tolist(), spelt.__getitem__).opened for prompt in prompts]
        self.opened = np.repeat(np.array(opened, dtype=bool), answers // max(1, len(prompts)))
        self.left = np.full(answers, NEVER)  # tokens of thinking that are allowed
        self.at = np.full(answers, len(self.script) - 1)  # what is forced next; the end says nothing

    def forced(self, answers: np.ndarray, token_ids: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The token ``[B]`` that each must say after ``length`` tokens, or -1. To be asked once per token."""
        left = self.left[answers]
        over = np.zeros(len(answers), dtype=bool)
        for tag in self.ends:
            over |= _stands(tag, token_ids, answers, length - len(tag))
        thought = length - len(self.open) * _stands(
            self.open, token_ids, answers, np.where(length < len(self.open), -1, 0)
        )
        due = ~over & (thought >= left)
        self.left[answers[over | due]] = NEVER
        unopened = (length == 0) & ~self.opened[answers]
        at = np.where(due, np.where(unopened, 0, len(self.open)), self.at[answers])
        self.at[answers] = np.minimum(at + 1, len(self.script) - 1)
        return self.script[at]


def _stands(tag: list[int], token_ids: np.ndarray, answers: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whether ``tag`` stands in each answer at ``at [B]``; nowhere where that is negative."""
    found = at >= 0
    for place, token in enumerate(tag):
        found = found & (token_ids[answers, np.maximum(at, 0) + place] == token)
    return found


def _encode(model: Glm4v, tag: str) -> list[int]:
    return model.processor.tokenizer.encode(tag, add_special_tokens=False).ids
