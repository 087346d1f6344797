"""Modules that the vision tower and the language model share: a parameter or two and the op that uses them.

Dims: T rows (tokens or patches), C width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from glm4v_ext import linear, rms_norm, swiglu

T = TypeVar("T")


class Linear(nn.Linear):
    """``x @ weight.T + bias`` through the op library."""

    def forward(self, input: Tensor) -> Tensor:  # [..., C_in] -> [..., C_out]
        return linear(input, self.weight, self.bias)


def adjoin(layers: Sequence[Linear], dtype: torch.dtype, device: torch.device | str) -> None:
    """Gives layers that read the same rows new parameters, one behind the other in one tensor, without values yet."""
    for name in ("weight", "bias"):
        old = [layer.get_parameter(name) for layer in layers]
        rows = [len(parameter) for parameter in old]
        whole = torch.empty(sum(rows), *old[0].shape[1:], dtype=dtype, device=device)
        for layer, parameter, part in zip(layers, old, whole.split(rows), strict=True):
            # `.data`: autograd would take a change of one in place for a change of all.
            setattr(layer, name, nn.Parameter(part.data, requires_grad=parameter.requires_grad))


def products(layers: Sequence[Linear], x: Tensor) -> Sequence[Tensor]:
    """``[layer(x) for layer in layers]``: as columns of one product where `adjoin` has placed their parameters.

    A GPU makes one of many outputs faster than three of which two have few. Its bits may be others, so that only
    inference mode has it: what is computed with gradients is computed alike without them.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and all(map(_only_multiplies, layers)):
        weights = [layer.weight for layer in layers]
        weight = _whole(weights)
        bias = None if weight is None else _whole([layer.bias for layer in layers])
        if weight is not None and bias is not None:
            return linear(x, weight, bias).split([part.shape[0] for part in weights], -1)
    return [layer(x) for layer in layers]


def _only_multiplies(layer: nn.Module) -> bool:
    """Whether calling the layer is its product and nothing else: no adapter, no hook, no forward put in its place."""
    hooks = _has_any_global_hook() or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is Linear and not hooks and "forward" not in vars(layer)


def _whole(parts: Sequence[Tensor | None]) -> Tensor | None:
    """What parameters are the rows of, one behind the other; None where they are not, as after any move of one."""
    first = parts[0]
    if type(first) is not nn.Parameter:
        return None
    storage, begin = first.untyped_storage(), first.storage_offset()
    end = begin
    for part in parts:
        if type(part) is not nn.Parameter or part.untyped_storage() is not storage or part.dtype != first.dtype:
            return None
        if part.shape[1:] != first.shape[1:] or not part.is_contiguous() or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.as_strided([end - begin], [1]).view(-1, *first.shape[1:])


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

    group = 1536  # rows at most: the inner values stay small, and the weights are read seldom enough
    group_on_gpu = 16384  # there, products and launches of fewer rows do lose

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(width, 2 * inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [T, C]
        groups = 1 if torch.is_grad_enabled() else max(1, -(-len(x) // (self.group if x.is_cpu else self.group_on_gpu)))
        parts = [self.down_proj(swiglu(self.gate_up_proj(part))) for part in x.tensor_split(groups)]
        return torch.cat(parts) if groups > 1 else parts[0]
