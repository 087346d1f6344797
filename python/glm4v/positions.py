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
    own = [torch.arange(start, end) for start, end in pairwise(cu_seqlens)]
    seen = []
    for n, prefix in enumerate(prefixes):
        if not -1 <= prefix < len(own) or (prefix >= 0 and prefixes[prefix] >= 0):
            raise ValueError(f"glm4v: prefixes[{n}] must be a sequence without a prefix, or -1, got {prefix}")
        seen.append(own[n] if prefix < 0 else torch.cat([own[prefix], own[n]]))
    lengths = list(map(len, seen))
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Keys(torch.cat(seen), ends, max(lengths))


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
    starts = cu_seqlens[:-1].long()
    tokens = torch.arange(len(input_ids), device=input_ids.device)
    sequence = sequence_ids(cu_seqlens, len(input_ids))
    seen = input_ids == image_token
    first = seen & ~F.pad(seen, (1, 0))[:-1]
    first |= seen & torch.isin(tokens, starts)
    first_tokens = first.nonzero().flatten()  # [G]

    # Grids in the order of the pictures: an image's, or its video's with one time step.
    of_video = inside_videos(input_ids, cu_seqlens, video_start, video_end)[first_tokens]
    none = torch.zeros(0, 3, dtype=torch.long, device=input_ids.device)
    images = none if image_grid_thw is None else image_grid_thw.long()
    videos = none if video_grid_thw is None else video_grid_thw.long()
    units = videos.repeat_interleave(videos[:, 0], 0)
    grids = torch.empty(len(first_tokens), 3, dtype=torch.long, device=input_ids.device)
    if (int(of_video.sum()), int((~of_video).sum())) != (len(units), len(images)):
        found = f"{int((~of_video).sum())} images and {int(of_video.sum())} video units"
        raise ValueError(f"positions: grids must be of {found}, got {len(images)} and {len(units)}")
    grids[of_video], grids[~of_video] = units, images
    rows, columns = grids[:, 1] // merge_size, grids[:, 2] // merge_size  # [G]

    picture = first.cumsum(0)[seen] - 1  # of each image token
    if not torch.equal(torch.bincount(picture, minlength=len(grids)), rows * columns):
        wanted, counts = (rows * columns).tolist(), torch.bincount(picture, minlength=len(grids)).tolist()
        raise ValueError(f"positions: pictures must have {wanted} tokens by their grids, got {counts}")

    # Where each token's predecessor leaves off: text by one, a picture as a whole at its last token.
    advance = (~seen).long()
    advance[first_tokens + rows * columns - 1] = torch.maximum(rows, columns)
    ends = F.pad(advance.cumsum(0), (1, 0))
    positions = (ends[:-1] - ends[starts][sequence]).expand(3, -1).clone()
    offset = tokens[seen] - first_tokens[picture]
    positions[1, seen] += offset // columns[picture]
    positions[2, seen] += offset % columns[picture]
    return positions, ends[cu_seqlens[1:].long()] - ends[starts]
