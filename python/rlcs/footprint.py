"""What training a model takes of a rank's memory, by the shapes of its weights alone: nothing is read or made.

Counted are weights, gradients and moments, not activations (`model.activation_checkpointing` keeps one hidden state a
block) nor the cache of rollouts. Dims: R shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glm4v import Glm4v
from glm4v.config import Config

from .parallel import blocks_of, embedding_of

FLOAT = 4  # bytes of fp32


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank."""

    parameters: int  # of the whole model, a count
    weights: int  # its rows, fp32
    gradients: int  # of its rows, fp32
    moments: int  # two of its rows, fp32
    gathered: int  # most that is whole at once in a step: weights and gradients of what runs, and what is being summed
    whole: int  # the plain model of the rollouts

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.moments + self.gathered

    @property
    def rollouts(self) -> int:
        return self.weights + self.moments + self.whole


def footprint(config: Config, shards: int, compute: torch.dtype = torch.bfloat16) -> Footprint:
    """Of a model of that configuration over so many shards, all of it trained."""
    model = Glm4v(config, device="meta")
    every, table = list(model.parameters()), embedding_of(model)
    blocks = [list(block.parameters()) for block in blocks_of(model)]
    late = [] if table is None else [list(table.parameters())]  # their gradients are summed when all else is done
    apart = {id(weight) for group in (*blocks, *late) for weight in group}
    late.append([weight for weight in every if id(weight) not in apart])  # the root's

    def rows(weights: Iterable[Tensor]) -> int:
        """The first rank's share, which none exceeds, in elements."""
        return sum(-(-len(weight) // shards) * weight[0].numel() for weight in weights)

    def count(weights: Iterable[Tensor]) -> int:
        return sum(weight.numel() for weight in weights)

    # The root's weights stay; beside them are a block and the next one, with its gradients as they came and in fp32,
    # which ranks sum up; at last all gradients that come late, one group of them in fp32 too.
    in_block = max(map(count, blocks)) * (3 * compute.itemsize + FLOAT)
    at_last = sum(map(count, late)) * compute.itemsize + max(map(count, late)) * FLOAT
    gathered = count(late[-1]) * compute.itemsize + max(in_block, at_last)
    mine = rows(every) * FLOAT
    return Footprint(count(every), mine, mine, 2 * mine, gathered if shards > 1 else 0, count(every) * compute.itemsize)


def table(model: Path, shards: Iterable[int] = (8, 16, 32, 64, 512), compute: torch.dtype = torch.bfloat16) -> str:
    """Lines to print, one for each number of shards, for the checkpoint in ``model``, of which config.json is read."""
    config = Config.from_pretrained(model)
    lines = ["ranks   weights  gradients    moments   gathered   training   rollouts  (GB a rank)"]
    for ranks in shards:
        f = footprint(config, ranks, compute)
        parts = (f.weights, f.gradients, f.moments, f.gathered, f.training, f.rollouts)
        lines.append(f"{ranks:5}" + "".join(f"{part / 1e9:11.2f}" for part in parts))
    return "\n".join(lines)
