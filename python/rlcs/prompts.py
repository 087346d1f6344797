"""Tasks as the model reads them: token ids, positions and patches, made once and kept while they are needed.

An outline is a prompt without its patches, made from headers: it has the token ids and all sizes, which is all that is
needed of what another process reads, or this one later. Its positions may not be final: a film may lie on its side.
Dims: T tokens of a prompt, P patches, I images.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm4v import Processor
from glm4v.config import TEMPORAL_PATCH_SIZE


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation up to where the assistant begins."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [3, T] int64
    next_position: int  # of the first answer token, along all three axes
    pixel_values: Tensor | None = None  # [P, 1176], of all images
    image_grid_thw: Tensor | None = None  # [I, 3]
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    read: Callable[[], Prompt] | None = None  # of an outline: what it stands for

    def __len__(self) -> int:
        return len(self.input_ids)

    def whole(self) -> Prompt:
        """With its patches; those of an outline are decoded now, unless they are kept."""
        return self if self.read is None else self.read()

    @property
    def patches(self) -> int:
        return sum(int(grid.prod(1).sum()) for grid in (self.image_grid_thw, self.video_grid_thw) if grid is not None)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))


class Prompts:
    """``prompts(id, messages) -> Prompt``, with the latest ``most_bytes`` kept under their task's id."""

    def __init__(self, processor: Processor, most_bytes: int = 1 << 30) -> None:
        self.processor = processor
        self._shelf = _Shelf(most_bytes)
        self._space = object()  # ids are its own

    def apart(self) -> Prompts:
        """Others under the same limit: tasks that may have the ids of these."""
        others = copy.copy(self)
        others._space = object()
        return others

    def __call__(self, id: str, messages: Sequence[Mapping[str, Any]], processor: Processor | None = None) -> Prompt:
        kept = self._shelf.get((self._space, id))
        if kept is None:
            kept = folded(make(messages, processor or self.processor))
            self.keep(id, kept)
        return replace(kept, pixel_values=_unfolded(kept.pixel_values))

    def outline(self, id: str, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """The same without its patches: nothing is decoded."""
        found = self._shelf.get((self._space, id)) or make(messages, self.processor, pixels=False)
        size = len(found), found.patches
        if not found.patches:
            return found

        def read() -> Prompt:
            whole = self(id, messages)
            if (len(whole), whole.patches) != size:
                raise ValueError(f"data: task {id!r}: pictures must stay as they were when the task was drawn")
            return whole

        return replace(found, pixel_values=None, pixel_values_videos=None, read=read)

    def __contains__(self, id: str) -> bool:
        """Whether it is kept; then it is among the latest."""
        return self._shelf.get((self._space, id)) is not None

    def keep(self, id: str, prompt: Prompt) -> None:
        """A prompt that was made elsewhere, `folded`."""
        self._shelf.put((self._space, id), prompt)


class _Shelf:
    """The prompts that were asked for last, at most ``most_bytes`` of them, and always the very last one. Threads may
    share it."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self.kept: OrderedDict[Any, Prompt] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Prompt | None:
        with self._lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def put(self, key: Any, prompt: Prompt) -> None:
        with self._lock:
            if key in self.kept:  # another thread was as quick
                return
            self.kept[key] = prompt
            self.bytes += prompt.nbytes
            while self.bytes > self.most_bytes and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes


def folded(prompt: Prompt) -> Prompt:
    """As it is kept."""
    return replace(prompt, pixel_values=_folded(prompt.pixel_values))


def _folded(patches: Tensor | None) -> Tensor | None:
    """``[P, 3, 196]`` of patches of still pictures, which hold each pixel once for each of their time slices."""
    if patches is None:
        return None
    slices = patches.view(len(patches), 3, TEMPORAL_PATCH_SIZE, -1)
    once = slices[:, :, 0]
    return once.clone() if torch.equal(slices, once.unsqueeze(2).expand_as(slices)) else patches


def _unfolded(patches: Tensor | None) -> Tensor | None:
    if patches is None or patches.ndim == 2:
        return patches
    return patches.unsqueeze(2).expand(-1, -1, TEMPORAL_PATCH_SIZE, -1).flatten(1)


def make(messages: Sequence[Mapping[str, Any]], processor: Processor, pixels: bool = True) -> Prompt:
    """One conversation through the processor; without ``pixels`` an outline that cannot be read."""
    batch = processor(list(messages), pixels)
    return Prompt(
        batch.input_ids,
        batch.position_ids,
        int(batch.next_positions[0]),
        batch.pixel_values,
        batch.image_grid_thw,
        batch.pixel_values_videos,
        batch.video_grid_thw,
    )


class Making:
    """``making(messages) -> Prompt``, `folded`, here or in another process: pickled it is the tokenizer's folder."""

    def __init__(self, processor: Processor, folder: Path) -> None:
        self.processor, self.folder = processor, folder

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        return folded(make(messages, self.processor))

    def __reduce__(self) -> Any:
        return _making_elsewhere, (self.folder, self.processor.dtype)


def _making_elsewhere(folder: Path, dtype: torch.dtype) -> Making:
    return Making(Processor.from_pretrained(folder, dtype=dtype), folder)


def packed(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Prompts one after the other, as the model takes them; outlines are read."""
    prompts = [prompt.whole() for prompt in prompts]
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
