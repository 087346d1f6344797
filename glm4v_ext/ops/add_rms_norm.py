"""Residual sum, then RMSNorm of it, in one pass. Dims: C width."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast, widen
from .fake import fake
from .refuse import refuse_second_grad, register_backward

# Looked up once: each attribute costs time, in decoding once per layer.
_add_rms_norm = torch.ops.glm4v_ext.add_rms_norm.default


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``total = x + residual``, then ``rms_norm(total, weight, eps)``: the step between two blocks of the vision tower.

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16.
        residual: like ``x``.
        weight: ``[C]``, dtype of ``x``.
        eps: added to the mean square, 0 or more.

    Returns:
        ``(norm, total)``, each ``[..., C]``, dtype of ``x``, contiguous. ``total`` is rounded before the norm reads it.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); order and rounding of transformers' ``Glm4vVisionBlock``.
    """
    return _add_rms_norm(x, residual, weight, eps)


@fake("add_rms_norm")
def _fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@fake("add_rms_norm_backward")
def _fake_backward(dout: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _backward(ctx, dout: Tensor, dsum: Tensor):
    dtotal, dweight = torch.ops.glm4v_ext.add_rms_norm_backward(dout, dsum, *ctx.saved_tensors, ctx.eps)
    return dtotal, dtotal, dweight, None


register_backward("add_rms_norm", _backward, _setup)
autocast("add_rms_norm", widen)
refuse_second_grad("add_rms_norm")
