"""Patch embedding, a matrix product of torch's. Dims: P patches, C width, F frames of a patch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..build import checks


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, still: bool) -> Tensor:
    checks.patch_embed(patches, weight, bias)
    return F.linear(patches, weight.flatten(1), bias)  # folding the weight of still patches gains nothing
