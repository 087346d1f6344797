"""Positions of tokens for the 3D rotary embedding: time, row and column.

Text advances all three by one. The tokens of a picture, an image or one temporal unit of a video, share the time p at
which it starts and lie at rows p + r and columns p + c of its merged grid; the next token is at p + max(rows, columns).
The definition is transformers' `Glm4vModel.get_rope_index`, for packed sequences and without a loop.
Dims: T tokens, N sequences, I images, V videos, G pictures (images and video units).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[T]``: the sequence of each token."""
    token = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


@dataclass(frozen=True)
class Keys:
    """Which tokens' keys the sequences see, where some go on from another."""

    rows: Tensor  # [Tk] among the tokens
    cu_seqlens: Tensor  # int32 [N + 1] into rows
    longest: int


def keys_behind_prefixes(cu_seqlens: Sequence[int], prefixes: Sequence[int]) -> Keys:
    """Each sequence's own tokens, those of its prefix before them; a prefix of -1 is none.

    Raises:
        ValueError: a prefix is no sequence without a prefix of its own.
    """
    if len(prefixes) != len(cu_seqlens) - 1:
        sequences = f"one for each of {len(cu_seqlens) - 1} sequences"
        raise ValueError(f"glm4v: prefixes must be {sequences}, got {len(prefixes)}")
    own = [np.arange(start, end) for start, end in pairwise(cu_seqlens)]
    seen, lengths = list[np.ndarray](), list[int]()
    for n, prefix in enumerate(prefixes):
        if not -1 <= prefix < len(own) or (prefix >= 0 and prefixes[prefix] >= 0):
            raise ValueError(f"glm4v: prefixes[{n}] must be a sequence without a prefix, or -1, got {prefix}")
        seen += [own[n]] if prefix < 0 else [own[prefix], own[n]]
        lengths.append(len(own[n]) + (len(own[prefix]) if prefix >= 0 else 0))
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    return Keys(torch.from_numpy(np.concatenate(seen)), ends, max(lengths))


def inside_videos(input_ids: Tensor, cu_seqlens: Tensor, video_start: int, video_end: int) -> Tensor:
    """``[T]`` bool: whether a token stands in a video; one that a sequence leaves open ends with it."""
    depth = ((input_ids == video_start).int() - (input_ids == video_end).int()).cumsum(0)
    before = F.pad(depth, (1, 0))[cu_seqlens[:-1]]
    return depth > before[sequence_ids(cu_seqlens, len(input_ids))]


def rope_positions(
    input_ids: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N + 1]
    image_grid_thw: Tensor | None,  # [I, 3]
    video_grid_thw: Tensor | None,  # [V, 3]
    image_token: int,
    video_start: int,
    video_end: int,
    merge_size: int = 2,
) -> tuple[Tensor, Tensor]:
    """``position_ids [3, T]`` and ``next_positions [N]``, where the token after each sequence stands.

    Grids count patches. A picture is a run of ``image_token``; it belongs to a video between ``video_start`` and
    ``video_end``.

    Raises:
        ValueError: runs of image tokens and grids are not the same pictures.
    """
    # Arrays: prompts are short, and a call of NumPy costs a fraction of one of torch.
    ids, limits = input_ids.numpy(), cu_seqlens.numpy().astype(np.int64)
    starts, lengths = limits[:-1], np.diff(limits)
    seen = ids == image_token
    first = seen.copy()
    first[1:] &= ~seen[:-1]
    first[starts[lengths > 0]] = seen[starts[lengths > 0]]
    first_tokens = first.nonzero()[0]  # [G]

    # Grids in the order of the pictures: an image's, or its video's with one time step.
    of_video = np.zeros(len(first_tokens), dtype=bool)
    if (ids == video_start).any():
        of_video = inside_videos(input_ids, cu_seqlens, video_start, video_end).numpy()[first_tokens]
    images, videos = (
        np.zeros((0, 3), dtype=np.int64) if grid is None else grid.numpy().astype(np.int64)
        for grid in (image_grid_thw, video_grid_thw)
    )
    units = videos.repeat(videos[:, 0], axis=0)
    found = int((~of_video).sum()), int(of_video.sum())
    if found != (len(images), len(units)):
        wanted = f"{found[0]} images and {found[1]} video units"
        raise ValueError(f"positions: grids must be of {wanted}, got {len(images)} and {len(units)}")
    grids = np.empty((len(first_tokens), 3), dtype=np.int64)
    grids[of_video], grids[~of_video] = units, images
    rows, columns = grids[:, 1] // merge_size, grids[:, 2] // merge_size  # [G]

    picture = first.cumsum()[seen] - 1  # of each image token
    counts = np.bincount(picture, minlength=len(grids))
    if not np.array_equal(counts, rows * columns):
        sizes = (rows * columns).tolist()
        raise ValueError(f"positions: pictures must have {sizes} tokens by their grids, got {counts.tolist()}")

    # Where each token's predecessor leaves off: text by one, a picture as a whole at its last token.
    ends = np.zeros(len(ids) + 1, dtype=np.int64)
    ends[1:] = ~seen
    ends[first_tokens + rows * columns] = np.maximum(rows, columns)
    ends = ends.cumsum()
    positions = np.tile(ends[:-1] - ends[starts].repeat(lengths), (3, 1))
    offset = seen.nonzero()[0] - first_tokens[picture]
    positions[1, seen] += offset // columns[picture]
    positions[2, seen] += offset % columns[picture]
    return torch.from_numpy(positions), torch.from_numpy(ends[limits[1:]] - ends[starts])
