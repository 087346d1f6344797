"""What a model has read, kept for prompts that begin alike: the turns of a conversation, questions about one picture.

Dims: T tokens, P patches, I pictures.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import KVCache
from .config import MERGE_SIZE
from .positions import inside_videos

if TYPE_CHECKING:
    from .model import Glm4v

PATCHES = MERGE_SIZE**2  # of a token
Pictures = tuple[str, str, Tensor, Tensor, Tensor, Tensor]  # see _pictures


class PromptCache:
    """Keys and values of one sequence, from one call of `Glm4v.generate` or `Glm4v.stream` to the next.

    A prompt is read from where it differs from what the last call read and said. Pictures are alike when their patches
    are; those of earlier turns do not go through the vision tower again. A prompt without the thinking of earlier
    turns, as GLM-4.1V wants them, has their answers read anew, which are short.

    Answers are those without a cache, but for the rounding of products of other sizes. The weights must not change
    meanwhile: `clear` after a step of training. ``len`` is the number of tokens held.
    """

    def __init__(self) -> None:
        self.calls = 0  # each takes the cache over from the one before
        self.clear()

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Forgets everything and frees the memory."""
        self.calls += 1
        self._model: weakref.ref[Glm4v] | None = None
        self._cache: KVCache | None = None
        self._held: list[Hashable] = []  # see _contents; the cache may hold more, which nothing relies on

    @torch.inference_mode()
    def prefill(self, model: Any, batch: Mapping[str, Any], capacity: int) -> tuple[KVCache, Tensor]:
        """Reads what is new in one prompt: a cache with room for ``capacity`` tokens, and logits ``[1, V]``."""
        self.calls += 1
        pictures = list(_pictures(model, batch))
        contents = _contents(batch, pictures)
        cache = self._cache if self._is_of(model) else None
        past = 0 if cache is None else _beginning(model, batch, _alike(self._held, contents))
        if cache is None:
            cache = model.new_cache(1, capacity)
        # An interrupt may come anywhere: what is noted as held is never more than what the cache holds.
        self._model, self._cache, self._held = weakref.ref(model), cache, self._held[:past]
        cache.rewind(past)
        if cache.capacity < capacity:  # by half at least, so that not every turn moves it
            most = model.config.text_config.max_position_embeddings
            cache.grow(max(capacity, min(cache.capacity * 3 // 2, most)))
        logits = model.prefill(_rest(batch, pictures, past), cache)
        self._held = contents
        return cache, logits

    def append(self, token: int, position: int) -> None:
        """Notes a token of the answer that the cache has taken in, and where it stands along all three axes."""
        self._held.append((token, position, position, position))

    def _is_of(self, model: Glm4v) -> bool:
        cache = self._cache
        if cache is None or self._model is None or self._model() is not model:
            return False
        return (cache.k[0].dtype, cache.k[0].device) == (model.dtype, model.device)


def _pictures(model: Glm4v, batch: Mapping[str, Any]) -> Iterator[Pictures]:
    """For images and for videos, where there are any: names of patches and grids in the batch, places of the tokens
    ``[T']``, patches ``[P, 1176]``, grids ``[I, 3]``, and the number of tokens up to each picture's end ``[I]``."""
    arguments = {name: batch[name] for name in batch if name != "position_ids"}
    for names, (at, patches, grid) in model.pictures(**arguments).items():
        if patches is not None and grid is not None:
            yield *names, at, patches, grid, (grid.prod(1) // PATCHES).cumsum(0)


def _contents(batch: Mapping[str, Any], pictures: Sequence[Pictures]) -> list[Hashable]:
    """What each token stands for, its id, or its picture's patches and grid as a digest; and its three positions."""
    contents: list[Hashable] = batch["input_ids"].tolist()
    for _, _, at, patches, grid, ends in pictures:
        for (start, end), shape in zip(pairwise([0, *ends.tolist()]), grid.tolist(), strict=True):
            values = patches[PATCHES * start : PATCHES * end].detach().cpu().contiguous()
            digest = hashlib.blake2b(values.view(torch.uint8).numpy().tobytes())
            digest.update(f"{shape} {values.dtype}".encode())
            for token in at[start:end].tolist():
                contents[token] = digest.digest()
    return list(zip(contents, *batch["position_ids"].tolist(), strict=True))


def _alike(held: list[Hashable], contents: list[Hashable]) -> int:
    """How many tokens the two begin with alike; the last one of ``contents`` is new, since its logits are wanted."""
    pairs = zip(held, contents[:-1], strict=False)
    return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(held), len(contents) - 1))


def _beginning(model: Glm4v, batch: Mapping[str, Any], most: int) -> int:
    """The last of the first ``most`` tokens' ends that is inside no picture."""
    config, ids = model.config, batch["input_ids"]
    image = ids == config.image_token_id
    within = inside_videos(ids, batch["cu_seqlens"], config.video_start_token_id, config.video_end_token_id)
    within[:-1] |= image[:-1] & image[1:]  # the token after it is the same picture's
    return most - next((i for i, inside in enumerate(reversed(within[:most].tolist())) if not inside), most)


def _rest(batch: Mapping[str, Any], pictures: Sequence[Pictures], past: int) -> dict[str, Tensor | None]:
    """The prompt from token ``past`` on, which is inside no picture."""
    rest: dict[str, Tensor | None] = {
        "input_ids": batch["input_ids"][past:],
        "cu_seqlens": (batch["cu_seqlens"] - past).clamp(min=0),
        "position_ids": batch["position_ids"][:, past:],
    }
    for pixels_name, grid_name, at, patches, grid, ends in pictures:
        seen = int((at < past).sum())
        if seen < len(at):
            rest[pixels_name], rest[grid_name] = patches[PATCHES * seen :], grid[ends > seen]
    return rest
