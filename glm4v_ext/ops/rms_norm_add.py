"""RMSNorm of a branch, added onto the residual. Dims: C width."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast, widen
from .fake import fake
from .refuse import register_backward

# Looked up once: each attribute costs time, in decoding once per layer.
_rms_norm_add = torch.ops.glm4v_ext.rms_norm_add.default


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``residual + rms_norm(x, weight, eps)``: how the decoder's sandwich layers close a branch.

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16.
        residual: like ``x``.
        weight: ``[C]``, dtype of ``x``.
        eps: added to the mean square, 0 or more.

    Returns:
        ``[..., C]``, dtype of ``x``, contiguous. The norm is rounded before the sum.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); order and rounding of transformers' ``Glm4vTextDecoderLayer``.
    """
    return _rms_norm_add(x, residual, weight, eps)


@fake("rms_norm_add")
def _fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    x, _, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout: Tensor):
    dx, dweight = torch.ops.glm4v_ext.rms_norm_backward(dout, *ctx.saved_tensors, ctx.eps)
    return dx, dout, dweight, None


register_backward("rms_norm_add", _backward, _setup)
autocast("rms_norm_add", widen)
