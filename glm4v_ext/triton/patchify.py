"""Pictures to patches, a program per patch. Dims: F frames, H x W pixels, t x h x w patches, K values of a patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import checks


@triton.jit
def patchify_kernel(
    frames, out, count, h, w, frame_stride, row_stride, column_stride, channel_stride, mean0, mean1, mean2, std0, std1,
    std2, TEMPORAL: tl.constexpr, PATCH: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0)
    # Frame by frame, in each the merge blocks row by row, in each block its patches row by row.
    in_frame = patch % (h * w)
    block, in_block = in_frame // (MERGE * MERGE), in_frame % (MERGE * MERGE)
    row = block // (w // MERGE) * MERGE + in_block // MERGE
    column = block % (w // MERGE) * MERGE + in_block % MERGE
    first_frame = patch // (h * w) * TEMPORAL
    VALUES: tl.constexpr = 3 * TEMPORAL * PATCH * PATCH
    for start in range(0, VALUES, BLOCK):
        value = start + tl.arange(0, BLOCK)  # ordered (channel, frame, y, x)
        inside = value < VALUES
        x, y = value % PATCH, value // PATCH % PATCH
        frame = tl.minimum(first_frame + value // (PATCH * PATCH) % TEMPORAL, count - 1)
        channel = value // (PATCH * PATCH * TEMPORAL)
        at = frame.to(tl.int64) * frame_stride + (row * PATCH + y).to(tl.int64) * row_stride
        at += (column * PATCH + x).to(tl.int64) * column_stride + channel * channel_stride
        byte = tl.load(frames + at, mask=inside, other=0).to(tl.float32)
        mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
        std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
        # Rounded divisions: for a byte, the first one equals the definition's product in fp64.
        pixel = tl.div_rn(tl.div_rn(byte, 255.0) - mean, std)
        tl.store(out + patch.to(tl.int64) * VALUES + value, pixel.to(out.dtype.element_ty), mask=inside)


def patchify(
    frames: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int,
    patch_size: int,
    merge_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    checks.patchify(frames, mean, std, temporal_patch_size, patch_size, merge_size, dtype)
    count, height, width, _ = frames.shape
    t, h, w = triton.cdiv(count, temporal_patch_size), height // patch_size, width // patch_size
    values = 3 * temporal_patch_size * patch_size**2
    out = frames.new_empty((t * h * w, values), dtype=dtype)
    patchify_kernel[(t * h * w,)](
        frames, out, count, h, w, *frames.stride(), *mean, *std, temporal_patch_size, patch_size, merge_size,
        BLOCK=min(512, triton.next_power_of_2(values)), enable_fp_fusion=True,
    )  # fmt: skip
    grid_thw = frames.new_empty((1, 3), dtype=torch.int64)
    for axis, size in enumerate((t, h, w)):
        grid_thw[0, axis].fill_(size)  # on the device: a copy from the host would stop it
    return out, grid_thw
