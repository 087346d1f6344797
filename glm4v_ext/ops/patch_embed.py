"""Patch embedding: the tower's Conv3d as one matrix product. Dims: P patches, C width, F frames of a patch."""

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
_patch_embed = torch.ops.glm4v_ext.patch_embed.default


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, still: bool = False) -> Tensor:
    """``conv3d(patch, weight, bias)`` for every patch; kernel and stride are the whole patch.

    Args:
        patches: ``[P, 3*F*h*w]`` in the order (channel, frame, row, column), float32, bfloat16 or float16; the model's
            are ``[P, 1176]``, two frames of 14 x 14 pixels.
        weight: ``[C, 3, F, h, w]``, dtype of ``patches``.
        bias: ``[C]``, dtype of ``patches``.
        still: the frames of every patch are equal, as they are for images. On a CPU only the first one is read, and
            multiplied by the sum of the frames' weights, half the work. Gradients reach the first frame's values alone.

    Returns:
        ``[P, C]``, dtype of ``patches``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: transformers' ``Glm4vVisionPatchEmbed``.
    """
    return _patch_embed(patches, weight, bias, still)


@fake("patch_embed")
def _fake(patches: Tensor, weight: Tensor, bias: Tensor, still: bool) -> Tensor:
    return patches.new_empty((patches.shape[0], weight.shape[0]))


def _setup(ctx, inputs, output) -> None:
    patches, weight, _, ctx.still = inputs
    ctx.save_for_backward(patches, weight)


def _backward(ctx, dout: Tensor):
    patches, weight = ctx.saved_tensors
    x, w = patches, weight.flatten(1)
    if ctx.still:
        frames = patches.reshape(patches.shape[0], *weight.shape[1:])  # [P, 3, F, h, w]
        x = frames[:, :, 0].flatten(1)
        if ctx.needs_input_grad[0]:  # alone wants the folded weight; images rarely do
            w = weight.sum(2).flatten(1)
    dpatches, dweight, dbias = linear_backward(dout, x, w, ctx.needs_input_grad)
    if ctx.still and dpatches is not None:
        dfirst = dpatches.view_as(frames[:, :, 0])
        dpatches = torch.stack([dfirst] + [torch.zeros_like(dfirst)] * (weight.shape[2] - 1), 2).view_as(patches)
    if ctx.still and dweight is not None:
        dweight = dweight.view_as(weight[:, :, 0]).unsqueeze(2).expand_as(weight)
    return dpatches, dweight if dweight is None else dweight.reshape(weight.shape), dbias, None


def on_gpu(patches: Tensor, weight: Tensor, bias: Tensor, still: bool = False) -> Tensor:
    if still and patches.requires_grad:
        frames = patches.reshape(patches.shape[0], *weight.shape[1:])
        patches = frames[:, :, :1].expand_as(frames).reshape(patches.shape)
    return F.linear(patches, weight.flatten(1), bias)


def _flops(patches: Tensor, weight: Tensor, bias: Tensor, still: bool) -> int:
    return product(patches, weight) // (weight.shape[2] if still else 1)


differentiable("patch_embed", _setup, _backward, on_gpu)
autocast("patch_embed", lower)
flops("patch_embed", _flops)
