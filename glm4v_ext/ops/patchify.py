"""Pictures to the patches that the vision tower reads. Dims: F frames, H x W pixels, P patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake import fake


def patchify(
    frames: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int = 2,
    patch_size: int = 14,
    merge_size: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``(frames / 255 - mean) / std``, cut into patches in merge-block order.

    A patch is ``temporal_patch_size`` frames of ``patch_size`` x ``patch_size`` pixels, ordered (channel, frame, y, x).
    Patches go time unit by time unit, in each the ``merge_size`` x ``merge_size`` blocks row by row, in each block its
    patches row by row. When the frames run out the last one repeats: an image is one frame, seen twice. The arithmetic
    rounds as transformers' image processor does, whatever ``dtype``, to which the result is rounded last.

    Args:
        frames: ``[F, H, W, 3]`` uint8, any strides; H and W multiples of ``patch_size * merge_size``.
        mean: of each channel, on the scale from 0 to 1.
        std: of each channel, positive.
        temporal_patch_size: frames per patch.
        patch_size: pixel side of a patch.
        merge_size: side of a merge block, in patches.
        dtype: float32, bfloat16 or float16.

    Returns:
        patches ``[P, 3 * temporal_patch_size * patch_size**2]`` (1176 by default) and grid_thw ``[1, 3]`` int64: time
        units, patch rows, patch columns, whose product is P.

    Raises:
        RuntimeError: a shape or dtype does not fit; the text names the argument.

    Source: transformers' ``Glm4vImageProcessor``.
    """
    return torch.ops.glm4v_ext.patchify(frames, mean, std, temporal_patch_size, patch_size, merge_size, dtype)


@fake("patchify")
def _fake(
    frames: Tensor, mean, std, temporal: int, patch: int, merge: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    f, h, w, _ = frames.shape
    patches = (f + temporal - 1) // temporal * (h // patch) * (w // patch)
    values = 3 * temporal * patch * patch
    return frames.new_empty((patches, values), dtype=dtype), frames.new_empty((1, 3), dtype=torch.int64)
