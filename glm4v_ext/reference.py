"""Every op in plain PyTorch: the definition, the oracle of the tests and the baseline of the benchmarks.

Each function takes the arguments of the public op of its name and works in the dtype of its inputs, so that the same
code run in float64 is the exact answer and run in bfloat16 is what plain PyTorch makes of it.
Dims: T tokens, H query heads, K kv heads, D head dim, C width, P patches, I images, N sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32 for the training dtypes, fp64 where the oracle asks for it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.to(_statistics_dtype(x))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return residual + rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, still: bool = False) -> Tensor:
    frames = patches.reshape(-1, *weight.shape[1:])  # [P, 3, 2, 14, 14]
    if still:  # both frames of a patch are equal: the first times the sum of the weight's two
        frames, weight = frames[:, :, :1], weight.sum(2, keepdim=True)
    return F.conv3d(frames, weight, bias).flatten(1)


def merge_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blocks = x.reshape(-1, 2, 2, x.shape[-1]).permute(0, 3, 1, 2)  # patches arrive block by block
    return F.conv2d(blocks, weight, bias).flatten(1)
