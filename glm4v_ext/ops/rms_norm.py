"""RMSNorm over the last dimension. Dims: C width."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast, widen
from .fake import fake
from .refuse import refuse_second_grad, register_backward

# Looked up once: each attribute costs time, in decoding once per layer.
_rms_norm = torch.ops.glm4v_ext.rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``weight * (x * rsqrt(mean(x^2) + eps))``, the mean over the last dimension.

    Statistics are fp32; the normalised value is rounded to ``x.dtype`` before the weight multiplies it.

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16.
        weight: ``[C]``, dtype of ``x``.
        eps: added to the mean square, 0 or more.

    Returns:
        ``[..., C]``, dtype of ``x``, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); rounding order as in transformers' ``Glm4vRMSNorm``.
    """
    return _rms_norm(x, weight, eps)


@fake("rms_norm")
def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@fake("rms_norm_backward")
def _fake_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dout: Tensor):
    dx, dweight = torch.ops.glm4v_ext.rms_norm_backward(dout, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None


register_backward("rms_norm", _backward, _setup)
autocast("rms_norm", widen)
refuse_second_grad("rms_norm")
