"""The 2x2 downsample, a matrix product of torch's. Dims: P patches, C width, O output width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..build import checks


def merge_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    checks.merge_patches(x, weight, bias)
    merged, width, out_width = x.shape[0] // 4, x.shape[1], weight.shape[0]
    by_patch = weight.permute(0, 2, 3, 1)  # [O, 2, 2, C]
    if by_patch.is_contiguous():  # channels_last: the rows have the patches' own order
        return F.linear(x.reshape(merged, 4 * width), by_patch.reshape(out_width, 4 * width), bias)
    blocks = x.reshape(merged, 4, width).transpose(1, 2)  # [P/4, C, 4]: the smaller of the two takes the other's order
    return F.linear(blocks.reshape(merged, 4 * width), weight.reshape(out_width, 4 * width), bias)
