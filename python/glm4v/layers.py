"""Modules that the vision tower and the language model share: a parameter or two and the op that uses them.

Dims: T rows (tokens or patches), C width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glm4v_ext import linear, rms_norm, swiglu

T = TypeVar("T")


class Linear(nn.Linear):
    """``x @ weight.T + bias`` through the op library."""

    def forward(self, input: Tensor) -> Tensor:  # [..., C_in] -> [..., C_out]
        return linear(input, self.weight, self.bias)


class Kernel(nn.Module):
    """Weight and bias of a convolution, in the checkpoint's shape; an op reads both."""

    def __init__(self, *shape: int) -> None:  # [C_out, C_in, ...]
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.02)
        self.bias = nn.Parameter(torch.zeros(shape[0]))


class RMSNorm(nn.Module):
    """Weight and eps of one norm; the fused ops read both."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [T, C]
        return rms_norm(x, self.weight, self.eps)


def run(block: Callable[..., T], recompute: bool, *inputs: Any) -> T:
    """``block(*inputs)``; with ``recompute`` its inner values are not kept for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


class Mlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up as one matrix.

    Without gradients, many rows go through in groups: their inner values, 5 to 7 times as wide as x, take less memory,
    which a CPU's allocator hands out again where it would map larger pieces anew.
    """

    group = 768  # rows at most: the tower's inner values stay below 32 MiB in fp32, and a product loses nothing
    group_on_gpu = 16384  # there, products and launches of fewer rows do lose

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(width, 2 * inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, C]
        groups = 1 if torch.is_grad_enabled() else max(1, -(-len(x) // (self.group if x.is_cpu else self.group_on_gpu)))
        parts = [self.down_proj(swiglu(self.gate_up_proj(part))) for part in x.tensor_split(groups)]
        return torch.cat(parts) if groups > 1 else parts[0]
