"""Prompts and pictures as the model reads them: packed tensors, no padding.

Dims: T tokens, N sequences, P patches, I images, V videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, "Tensor | None"]):
    """Prompts, packed. As a mapping it holds the model's arguments: ``model(**batch)``.

    Attributes:
        input_ids: ``[T]`` int64, all prompts one after the other.
        cu_seqlens: ``[N + 1]`` int32, where each prompt starts, and T.
        position_ids: ``[3, T]`` int64, time, row and column of each token.
        pixel_values: ``[P, 1176]`` patches of all images, or None.
        image_grid_thw: ``[I, 3]`` int64 patches in time, rows and columns of each image, or None.
        pixel_values_videos: the same for videos.
        video_grid_thw: ``[V, 3]``.
        next_positions: ``[N]`` int64, where the first generated token of each prompt stands; not a model argument.
        prompts: texts of the prompts with one ``<|image|>`` per image token; not a model argument.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    pixel_values_videos: Tensor | None
    video_grid_thw: Tensor | None
    next_positions: Tensor
    prompts: tuple[str, ...]

    ARGUMENTS = (
        "input_ids",
        "cu_seqlens",
        "position_ids",
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
    )

    def __getitem__(self, name: str) -> Tensor | None:
        if name not in self.ARGUMENTS:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ARGUMENTS)

    def __len__(self) -> int:
        return len(self.ARGUMENTS)

    @property
    def rope_deltas(self) -> Tensor:
        """``[N]``: next position minus number of tokens, as transformers keeps it."""
        return self.next_positions - self.cu_seqlens.diff()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values.update({name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)})
        return Batch(**values)
