"""Every op in plain PyTorch: the definition, the oracle of the tests and the baseline of the benchmarks.

Each function takes the arguments of the public op of its name and works in the dtype of its inputs, so that the same
code run in float64 is the exact answer and run in bfloat16 is what plain PyTorch makes of it.
Dims: T tokens, H query heads, K kv heads, D head dim, C width, P patches, I images, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32 for the training dtypes, fp64 where the oracle asks for it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.to(_statistics_dtype(x))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
