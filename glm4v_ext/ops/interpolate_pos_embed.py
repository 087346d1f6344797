"""The vision tower's adapted position embedding. Dims: P patches, I images, S side of the position table, C width."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast, widen
from .fake import fake
from .refuse import refuse_second_grad, register_backward


def interpolate_pos_embed(x: Tensor, table: Tensor, grid_thw: Tensor) -> Tensor:
    """``x + bicubic(table)`` at the centre of each patch of each image.

    Patch (row, column) of an h x w grid reads the S x S table at ``((row + 1/2) * S/h, (column + 1/2) * S/w) - 1/2``
    with Keys' kernel (a = -0.75) and taps clamped to the border, in fp32. The value is rounded to the dtype of x before
    it is added. Frames of a grid repeat it. Differentiable in x and table, deterministic.

    Args:
        x: ``[P, C]``, float32, bfloat16 or float16, patches in 2x2 merge-block order, image after image.
        table: ``[S*S, C]``, dtype of ``x``, S at most 512.
        grid_thw: ``[I, 3]`` int32 or int64: frames, patch rows and patch columns (even) of each image.

    Returns:
        ``[P, C]``, dtype of ``x``, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the grids do not hold P patches.

    Source: GLM-4.1V-Thinking (arXiv 2507.01006), section 2; transformers' ``Glm4vVisionEmbeddings``.
    """
    return torch.ops.glm4v_ext.interpolate_pos_embed(x, table, grid_thw)


@fake("interpolate_pos_embed")
def _fake(x: Tensor, table: Tensor, grid_thw: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@fake("interpolate_pos_embed_backward")
def _fake_backward(dout: Tensor, grid_thw: Tensor, cells: int) -> Tensor:
    return dout.new_empty((cells, dout.shape[1]))


def _setup(ctx, inputs, output) -> None:
    _, table, grid_thw = inputs
    ctx.cells = table.shape[0]
    ctx.save_for_backward(grid_thw)


def _backward(ctx, dout: Tensor):
    dtable = None
    if ctx.needs_input_grad[1]:
        dtable = torch.ops.glm4v_ext.interpolate_pos_embed_backward(dout, *ctx.saved_tensors, ctx.cells)
    return dout, dtable, None


register_backward("interpolate_pos_embed", _backward, _setup)
autocast("interpolate_pos_embed", widen)
refuse_second_grad("interpolate_pos_embed")
