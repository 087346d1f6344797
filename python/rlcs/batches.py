"""A packed micro-step as the model's arguments: positions of every token, and each picture once.

Dims: T tokens, N samples, S patches, I pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm4v.config import MERGE_SIZE

from .packing import Cost
from .prompts import Prompt
from .types import PackedBatch


def arguments(batch: PackedBatch, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Arguments of ``Glm4v.hidden``; sample n belongs to ``prompts[batch.sources[n]]``.

    Samples of one prompt share the features of its pictures, which are encoded once.
    """
    sources = [prompts[i] for i in batch.sources]
    lengths = [b - a for a, b in pairwise(batch.cu_seqlens.tolist())]
    positions = [_positions(prompt, length) for prompt, length in zip(sources, lengths, strict=True)]
    pixels, grid, rows = _pictures(batch.sources, prompts, "pixel_values", "image_grid_thw")
    frames, frame_grid, frame_rows = _pictures(batch.sources, prompts, "pixel_values_videos", "video_grid_thw")
    return {
        "input_ids": torch.from_numpy(batch.input_ids),
        "cu_seqlens": torch.from_numpy(batch.cu_seqlens),
        "position_ids": torch.cat(positions, dim=1),
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "image_rows": rows,
        "pixel_values_videos": frames,
        "video_grid_thw": frame_grid,
        "video_rows": frame_rows,
    }


def cost_of(cost: Cost, tokens: int, prompt: Prompt) -> float:
    """Of a sample of so many tokens after this prompt."""
    grids = [grid for grid in (prompt.image_grid_thw, prompt.video_grid_thw) if grid is not None]
    return cost(tokens, [h * w for grid in grids for t, h, w in grid.tolist() for _ in range(t)])


def _positions(prompt: Prompt, length: int) -> Tensor:
    """[3, length]: the prompt's, then one more along all axes with every token of the answer."""
    answer = torch.arange(prompt.next_position, prompt.next_position + length - len(prompt))
    return torch.cat([prompt.position_ids, answer.expand(3, -1)], dim=1)


def _pictures(
    sources: np.ndarray, prompts: Sequence[Prompt], pixels: str, grid: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Patches and grids of the prompts that have some, each once, and which feature each picture token takes."""
    patches, grids, spans, start = [], [], {}, 0
    for source in dict.fromkeys(sources.tolist()):
        values = getattr(prompts[source], pixels)
        if values is not None:
            patches.append(values)
            grids.append(getattr(prompts[source], grid))
            count = len(values) // MERGE_SIZE**2
            spans[source] = torch.arange(start, start + count)
            start += count
    if not patches:
        return None, None, None
    rows = torch.cat([spans[source] for source in sources.tolist() if source in spans])
    return torch.cat(patches), torch.cat(grids), rows
