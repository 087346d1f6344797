"""Who answers: the model of this process, or servers. One protocol for both, and for others that users write.

An engine holds weights of some version, the number of waves that they have learned from. `Engine.renew` is called
between waves, when no answer is under way; `Engine.rollouts` gives each group of answers once, when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..prompts import Prompt
from ..rollout import Answer, RolloutSettings
from ..types import Task

__all__ = ["Engine", "EngineFault"]


class EngineFault(RuntimeError):
    """Nobody answers, or not as asked. The text is one line: where, what came, what was expected."""


class Engine(Protocol):
    """What `rlcs.evaluate.answer` asks of those who answer."""

    def renew(self, version: int) -> int:
        """Takes in the trainer's weights as they are, of ``version`` waves; returns the version that answers come from,
        which may be older. To be called before the weights change and while no answers are made.

        Raises:
            EngineFault: the weights there are older than the settings allow, and stay so.
        """

    def share(self, count: int) -> range:
        """Which of so many tasks this process is to ask `rollouts` about, where the run has several."""

    def rollouts(
        self,
        tasks: Sequence[Task],
        prompts: Sequence[Prompt],
        group: int,
        seeds: Sequence[Sequence[int]],
        settings: RolloutSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As `rlcs.rollout.rollouts`; ``prompts[i]`` is ``tasks[i]`` as the trainer reads it. A log-probability that
        the engine doesn't know is NaN."""

    def metrics(self) -> dict[str, float]:
        """What has happened since it was last asked."""

    def close(self) -> None:
        """Nothing more is asked; what is under way is dropped."""
