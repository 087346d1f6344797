"""The tower's 2x2 downsample as one matrix product. Dims: P patches, C width, O output width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import autocast, lower
from .differentiable import differentiable
from .fake import fake
from .flops import flops, product
from .linear import linear_backward

# Looked up once, as in rms_norm_add.
_merge_patches = torch.ops.glm4v_ext.merge_patches.default


def merge_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``conv2d(block, weight, bias)`` for every block of four consecutive patches; kernel and stride are the block.

    Args:
        x: ``[P, C]`` in merge-block order, P a multiple of 4, float32, bfloat16 or float16.
        weight: ``[O, C, 2, 2]``, dtype of ``x``. In ``torch.channels_last`` it is used where it lies; in the default
            order the patches are rearranged instead, which costs a few percent.
        bias: ``[O]``, dtype of ``x``.

    Returns:
        ``[P/4, O]``, dtype of ``x``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: the ``downsample`` of transformers' ``Glm4vVisionModel``.
    """
    return _merge_patches(x, weight, bias)


@fake("merge_patches")
def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] // 4, weight.shape[0]))


def _rows(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one order of the 4C: patches, which are fewer, are rearranged unless the weight lies as they do."""
    blocks = x.reshape(x.shape[0] // 4, 4, x.shape[1])  # [P/4, 4, C]
    if weight.is_contiguous():
        return blocks.transpose(1, 2), weight  # [P/4, C, 4], [O, C, 2, 2]
    return blocks, weight.permute(0, 2, 3, 1)  # [O, 2, 2, C]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, dout: Tensor):
    x, weight = ctx.saved_tensors
    (blocks, rows), by_channel = _rows(x, weight), weight.is_contiguous()
    dx, dweight, dbias = linear_backward(dout, blocks.flatten(1), rows.flatten(1), ctx.needs_input_grad)
    if dx is not None:
        dx = dx.view(blocks.shape)
        dx = (dx.transpose(1, 2) if by_channel else dx).reshape(x.shape)
    if dweight is not None:
        dweight = dweight.view(rows.shape)
        dweight = dweight if by_channel else dweight.permute(0, 3, 1, 2)
    return dx, dweight, dbias


def on_gpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blocks, rows = _rows(x, weight)
    return F.linear(blocks.flatten(1), rows.flatten(1), bias)


differentiable("merge_patches", _setup, _backward, on_gpu)
autocast("merge_patches", lower)
flops("merge_patches", product)
