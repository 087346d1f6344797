"""Tasks as the model reads them: token ids, positions and patches, made once and kept while they are needed.

Dims: P tokens of a prompt, S patches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm4v import Processor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation up to where the assistant begins."""

    input_ids: Tensor  # [P] int64
    position_ids: Tensor  # [3, P] int64
    next_position: int  # of the first answer token, along all three axes
    pixel_values: Tensor | None = None  # [S, 1176], of all images
    image_grid_thw: Tensor | None = None  # [I, 3]
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def patches(self) -> int:
        return sum(len(x) for x in (self.pixel_values, self.pixel_values_videos) if x is not None)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


class Prompts:
    """``prompts(messages) -> Prompt``, with the latest ``most_bytes`` kept under their task's id."""

    def __init__(self, processor: Processor, most_bytes: int = 1 << 30) -> None:
        self.processor, self.most_bytes = processor, most_bytes
        self._kept: OrderedDict[str, Prompt] = OrderedDict()
        self._bytes = 0

    def __call__(self, id: str, messages: Sequence[Mapping[str, Any]], processor: Processor | None = None) -> Prompt:
        if id in self._kept:
            self._kept.move_to_end(id)
            return self._kept[id]
        prompt = self._kept[id] = make(messages, processor or self.processor)
        self._bytes += prompt.nbytes
        while self._bytes > self.most_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return prompt


def make(messages: Sequence[Mapping[str, Any]], processor: Processor) -> Prompt:
    """One conversation through the processor."""
    batch = processor(messages)
    return Prompt(
        batch.input_ids,
        batch.position_ids,
        int(batch.next_positions[0]),
        batch.pixel_values,
        batch.image_grid_thw,
        batch.pixel_values_videos,
        batch.video_grid_thw,
    )


def packed(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Prompts one after the other, as the model takes them."""
    ends = np.cumsum([0, *map(len, prompts)], dtype=np.int32)
    batch: dict[str, Any] = {
        "input_ids": torch.cat([prompt.input_ids for prompt in prompts]),
        "cu_seqlens": torch.from_numpy(ends),
        "position_ids": torch.cat([prompt.position_ids for prompt in prompts], 1),
    }
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        parts = [x for prompt in prompts if (x := getattr(prompt, name)) is not None]
        batch[name] = torch.cat(parts) if parts else None
    return batch
