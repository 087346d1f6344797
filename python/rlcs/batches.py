"""A packed micro-step as the model's arguments: what samples share is read once.

Dims: T tokens of the micro-step, U tokens that the model reads, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm4v import Glm4v
from glm4v.config import MERGE_SIZE

from .packing import Cost
from .prompts import Prompt, packed
from .types import PackedBatch, Sample


@dataclass(frozen=True)
class Inputs:
    """What the model reads for a micro-step."""

    arguments: dict[str, Any]  # of Glm4v.hidden
    rows: Tensor  # [T]: which of the U tokens read stands for each of the micro-step's


def inputs(batch: PackedBatch, prompts: Sequence[Prompt]) -> Inputs:
    """Each prompt once, with its pictures, which are decoded now if they aren't kept, and behind it the answers of its
    samples, which go on from it.

    Sample n belongs to ``prompts[batch.sources[n]]`` and begins with that prompt's tokens.
    """
    members = _by_source(batch.sources.tolist())
    starts = batch.cu_seqlens.tolist()
    ids, positions, lengths, prefixes = list[np.ndarray](), list[np.ndarray](), list[int](), list[int]()
    rows, read = np.empty(starts[-1], dtype=np.int64), 0
    whole = [prompts[source].whole() for source in members]
    for prompt, samples in zip(whole, members.values(), strict=True):
        prefix, first = len(lengths), read
        ids.append(prompt.input_ids.numpy())
        positions.append(prompt.position_ids.numpy())
        lengths.append(len(prompt))
        prefixes.append(-1)
        read += len(prompt)
        for n in samples:
            start, end = starts[n] + len(prompt), starts[n + 1]
            rows[starts[n] : start] = np.arange(first, first + len(prompt))
            rows[start:end] = np.arange(read, read + end - start)
            read += end - start
            answer = np.arange(prompt.next_position, prompt.next_position + end - start)
            ids.append(batch.input_ids[start:end])
            positions.append(np.broadcast_to(answer, (3, len(answer))))
            if len(samples) == 1:  # nothing to share: one sequence
                lengths[-1] += end - start
            else:
                lengths.append(end - start)
                prefixes.append(prefix)
    arguments = {
        **packed(whole),
        "input_ids": torch.from_numpy(np.concatenate(ids)),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "position_ids": torch.from_numpy(np.concatenate(positions, axis=1)),
        "prefixes": prefixes if len(prefixes) > len(members) else None,
    }
    return Inputs(arguments, torch.from_numpy(rows))


def units(samples: Sequence[Sample], prompts: Sequence[Prompt], budget: int) -> Iterator[tuple[list[int], int]]:
    """Indices of samples that share their prompt, as many as fit the budget together, and the tokens that they read."""
    for source, each in _by_source(sample.source for sample in samples).items():
        prefix, unit = len(prompts[source]), list[int]()
        tokens = prefix
        for i in each:
            more = len(samples[i]) - prefix
            if unit and tokens + more > budget:
                yield unit, tokens
                unit, tokens = [], prefix
            unit.append(i)
            tokens += more
        yield unit, tokens


def _by_source(sources: Iterable[int]) -> dict[int, list[int]]:
    """Indices of the samples of each prompt, in order."""
    members = dict[int, list[int]]()
    for i, source in enumerate(sources):
        members.setdefault(source, []).append(i)
    return members


def filler(model: Glm4v, pictured: bool, source: int) -> tuple[Sample, Prompt]:
    """One token, or the smallest picture: read like any other and learned from nowhere. Its gradients are zeros."""
    nothing = np.zeros(1, np.float32)
    token = model.config.image_token_id if pictured else 0
    pixels = torch.zeros(MERGE_SIZE**2, model.visual.patch_embed.proj.weight.shape[1:].numel()) if pictured else None
    grid = torch.tensor([[1, MERGE_SIZE, MERGE_SIZE]]) if pictured else None
    prompt = Prompt(torch.tensor([token]), torch.zeros(3, 1, dtype=torch.long), 1, pixels, grid)
    return Sample(prompt.input_ids.numpy(), nothing.astype(bool), nothing, 0.0, source, nothing), prompt


def cost_of(cost: Cost, lengths: Sequence[int], prompt: Prompt) -> float:
    """Of samples of so many tokens that share this prompt."""
    grids = [grid for grid in (prompt.image_grid_thw, prompt.video_grid_thw) if grid is not None]
    pictures = [h * w for grid in grids for t, h, w in grid.tolist() for _ in range(t)]
    again = cost(len(prompt)) * (len(lengths) - 1)  # the prompt is read once
    return sum(map(cost, lengths)) - again + cost(0, pictures)
