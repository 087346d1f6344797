"""Patch embedding, a matrix product of torch's. Dims: P patches, C width, F frames of a patch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..build import checks


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, still: bool) -> Tensor:
    checks.patch_embed(patches, weight, bias)
    if not still:
        return F.linear(patches, weight.flatten(1), bias)
    # All frames are equal: the first one times the sum of the frames' weights.
    width, channels, frames = weight.shape[:3]
    pixels = weight.shape[3] * weight.shape[4]
    first = patches.reshape(patches.shape[0], channels, frames, pixels)[:, :, 0]
    return F.linear(first.flatten(1), weight.sum(2).reshape(width, channels * pixels), bias)
