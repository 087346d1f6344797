"""Answers by the model of this process; by a copy of its weights where they are made while it is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch

from glm4v import Glm4v

from .. import fsdp, parallel
from ..prompts import Prompt
from ..rollout import Answer, RolloutSettings, rollouts
from ..types import Task


class Native:
    """The engine that is the model itself.

    Args:
        model: the trainer's.
        apart: answers come from a copy, which `renew` brings up to date: a second model's memory.
    """

    def __init__(self, model: Glm4v, apart: bool = False) -> None:
        self.model, self.apart = model, apart
        self.speaker: Glm4v | None = None  # the copy

    @torch.no_grad()
    def renew(self, version: int) -> int:
        if not self.apart:
            return version
        if fsdp.sharded(self.model):
            self.speaker = None  # the old one goes before the new one is put together
            with fsdp.whole(self.model) as self.speaker:
                pass
        elif self.speaker is None:
            self.speaker = copy.deepcopy(self.model, {id(self.model.processor): self.model.processor})
            self.speaker.requires_grad_(False)
        else:
            held, new = self.speaker.state_dict(), self.model.state_dict()
            for name, tensor in held.items():
                tensor.copy_(new[name])
        return version

    def share(self, count: int) -> range:
        return parallel.share(count)

    def rollouts(
        self,
        tasks: Sequence[Task],
        prompts: Sequence[Prompt],
        group: int,
        seeds: Sequence[Sequence[int]],
        settings: RolloutSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, list[Answer]]]:
        if self.speaker is not None:
            yield from rollouts(self.speaker, prompts, group, seeds, settings, progress)
            return
        with fsdp.whole(self.model) as model:
            yield from rollouts(model, prompts, group, seeds, settings, progress)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
