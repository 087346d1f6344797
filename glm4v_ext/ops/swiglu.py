"""SwiGLU of a fused projection. Dims: I inner width."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake import fake
from .refuse import refuse_second_grad, register_backward

# Looked up once: each attribute costs time, in decoding once per layer.
_swiglu = torch.ops.glm4v_ext.swiglu.default


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` where ``gate, up = gate_up.chunk(2, -1)``.

    Args:
        gate_up: ``[..., 2I]``, gate first, float32, bfloat16 or float16.

    Returns:
        ``[..., I]``, dtype of ``gate_up``, contiguous. ``silu(gate)`` is rounded before the product.

    Raises:
        RuntimeError: the shape or dtype does not fit; the text names the argument.

    Source: Shazeer 2020 (arXiv 2002.05202); rounding order as in transformers' ``Glm4vTextMLP``.
    """
    return _swiglu(gate_up)


@fake("swiglu")
def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@fake("swiglu_backward")
def _fake_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout: Tensor):
    return torch.ops.glm4v_ext.swiglu_backward(dout, *ctx.saved_tensors)


register_backward("swiglu", _backward, _setup)
refuse_second_grad("swiglu")
