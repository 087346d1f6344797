"""What goes from stage to stage of the trainer. Frozen; numpy and plain Python, no torch.

A token of a rollout is either sampled (it has a behaviour log-probability and is trained on) or inserted by the trainer
(forced answering; never trained on). Dims: T tokens of a packed batch, N samples, L tokens of one rollout, G rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rewards.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt with its truth. ``messages`` are chat messages as ``glm4v.Processor`` takes them."""

    id: str
    domain: str
    messages: Sequence[Mapping[str, Any]]
    truth: str
    category: str = ""
    tier: str | None = None  # one of curriculum.TIERS, a human's word
    pass_rate: float | None = None  # offline pass@k ...
    attempts: int | None = None  # ... of so many attempts
    question: str | None = None  # what the verifier may read: the prompt's text


@dataclass(frozen=True)
class Rollout:
    """One answer to a task, token by token."""

    token_ids: np.ndarray  # [L] int64, the stop token included
    logprobs: np.ndarray  # [L] float32, of the behaviour policy; 0 where inserted
    sampled: np.ndarray  # [L] bool
    text: str
    finish_reason: str  # stop, length or budget
    verdict: Verdict

    def __post_init__(self) -> None:
        for name in ("logprobs", "sampled"):
            if len(getattr(self, name)) != len(self.token_ids):
                raise ValueError(f"rollout: {name} must be as long as token_ids ({len(self.token_ids)})")

    @property
    def reward(self) -> float | None:
        """None where the verifier failed: the rollout is left out."""
        return None if self.verdict.failed else self.verdict.score

    @property
    def forced(self) -> bool:
        return not bool(self.sampled.all())


@dataclass(frozen=True)
class Group:
    """The rollouts of one task in one wave."""

    task: Task
    rollouts: tuple[Rollout, ...]
    wave: int  # whose policy sampled it; a group carried over keeps its own

    @property
    def rewards(self) -> list[float | None]:
        return [rollout.reward for rollout in self.rollouts]


@dataclass(frozen=True)
class Sample:
    """One sequence to train on: a prompt with one answer, or a document."""

    token_ids: np.ndarray  # [L] int64, images expanded to their placeholders
    trained: np.ndarray  # [L] bool: the token is learned from; never the first, which has no predecessor
    logprobs: np.ndarray  # [L] float32 of the behaviour policy, 0 where there is none
    advantage: float = 1.0
    source: int = 0  # which prompt of the step: its pictures are encoded once for all of its samples in a micro-step
    old: np.ndarray | None = None  # [L] float32 of the policy that the ratio is taken to, if not the behaviour's

    def __post_init__(self) -> None:
        for name in ("trained", "logprobs", *(("old",) if self.old is not None else ())):
            if len(getattr(self, name)) != len(self.token_ids):
                raise ValueError(f"sample: {name} must be as long as token_ids ({len(self.token_ids)})")
        if len(self.token_ids) == 0 or self.trained[0]:
            raise ValueError("sample: the first token must not be trained on: it has no predecessor")

    @classmethod
    def of_rollout(cls, prompt_ids: np.ndarray, rollout: Rollout, advantage: float, source: int = 0) -> Sample:
        """A prompt with one answer to it."""
        before = np.zeros(len(prompt_ids))
        return cls(
            np.concatenate([prompt_ids, rollout.token_ids]),
            np.concatenate([before.astype(bool), rollout.sampled]),
            np.concatenate([before.astype(np.float32), rollout.logprobs]),
            advantage,
            source,
        )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-step: samples one after the other, no padding. Token t predicts ``targets[t]``."""

    input_ids: np.ndarray  # [T] int64
    cu_seqlens: np.ndarray  # [N + 1] int32
    targets: np.ndarray  # [T] int64, the next token of the same sample
    trained: np.ndarray  # [T] bool: the target was sampled
    logprobs: np.ndarray  # [T] float32 of the targets under the behaviour policy
    advantages: np.ndarray  # [N] float32
    sources: np.ndarray  # [N] int64
    weight: float  # share of the step's samples that is here: gradients of micro-steps add up to the whole batch's
    old: np.ndarray | None = None  # [T] float32 of the targets under the policy that the ratio is taken to
