"""Matrix product with a weight. Dims: M rows, K inputs, N outputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .autocast import autocast, lower
from .differentiable import differentiable
from .fake import fake
from .flops import flops, product

# Looked up once, as in rms_norm_add.
_linear = torch.ops.glm4v_ext.linear.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, by the path that reaches the machine's peak. A GPU computes gradients by torch's own.

    Large products in float32 on a CPU with AMX: every number as the exact sum of three in bfloat16, and the six largest
    of the nine products of two such sums. The error is half that of a chain of fused multiply-adds. Infinity, NaN and
    rows that are too large or too small for that (beyond about 2^50 or below 2^-50 on both sides) go by ``F.linear``.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16; any strides, transposed views are read in place.
        weight: ``[N, K]``, dtype of ``x``; likewise.
        bias: ``[N]``, dtype of ``x``, or None.

    Returns:
        ``[..., N]``, dtype of ``x``, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: torch's ``F.linear``.
    """
    return _linear(x, weight, bias)


def linear_backward(dout: Tensor, x: Any, weight: Any, needs: tuple[bool, bool, bool]):
    """Gradients of ``linear`` for x, weight and bias, None where not needed; each of x and weight needs the other."""
    # No flatten: batches of gradients (is_grads_batched) have no rule for it.
    dout_rows = dout.reshape(math.prod(dout.shape[:-1]), dout.shape[-1])  # [M, N]
    return (
        _linear(dout, weight.t(), None) if needs[0] else None,
        _linear(dout_rows.t(), x.reshape(dout_rows.shape[0], x.shape[-1]).t(), None) if needs[1] else None,
        dout_rows.sum(0) if needs[2] else None,
    )


@fake("linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx, inputs, output) -> None:
    x, weight = inputs[:2]
    needs_dx, needs_dweight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_dweight else None, weight if needs_dx else None)


def _backward(ctx, dout: Tensor):
    x, weight = ctx.saved_tensors
    return linear_backward(dout, x, weight, ctx.needs_input_grad)


differentiable("linear", _setup, _backward, on_gpu=torch.nn.functional.linear)
autocast("linear", lower)
flops("linear", product)
