"""Rotary embedding of the vision tower: rows turn the first half of a head's pairs, columns the second.

Dims: P patches, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast, widen
from .differentiable import differentiable
from .fake import fake
from .refuse import refuse_grad

# Looked up once: a decoding step calls the op per layer, and each attribute costs time.
_rope_2d = torch.ops.glm4v_ext.rope_2d.default
_rope_2d_ = torch.ops.glm4v_ext.rope_2d_.default


def rope_2d(q: Tensor, k: Tensor, position_ids: Tensor, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """Turns dims ``j`` and ``j + D/2`` of every head by ``position * theta ** (-4 * (j % (D/4)) / D)``.

    ``position`` is the patch's row for ``j < D/4`` and its column for ``D/4 <= j < D/2``. Angles are fp64, their cos
    and sin are rounded to fp32, the rotation is fp32 whatever the dtype. Differentiable in q and k.

    cos and sin are within an fp32 ulp of 1 where angles, and so positions, stay below 2^40 in magnitude (2^30 on CPUs
    without FMA); beyond, errors grow, from about 2^53 on without bound.

    Args:
        q: ``[P, H, D]``, float32, bfloat16 or float16; D a multiple of 4, at most 256. Any strides.
        k: ``[P, K, D]``, dtype of ``q``.
        position_ids: ``[P, 2]`` int32 or int64, row and column of each patch.
        theta: base of the frequencies.

    Returns:
        The turned q and k, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: RoFormer (arXiv 2104.09864) along two axes, as in transformers' ``apply_rotary_pos_emb_vision``.
    """
    return _rope_2d(q, k, position_ids, theta)


def rope_2d_(q: Tensor, k: Tensor, position_ids: Tensor, theta: float = 1e4) -> None:
    """:func:`rope_2d` written over q and k, for inference; views into a packed qkv need no copy.

    Args:
        q: ``[P, H, D]`` as in :func:`rope_2d`, dims of a head adjacent in memory.
        k: ``[P, K, D]``, the same, in memory of its own: views into a packed qkv may lie between each other.
        position_ids: ``[P, 2]`` int32 or int64.
        theta: base of the frequencies.

    Raises:
        RuntimeError: as in :func:`rope_2d`, or an argument requires grad; nothing has been written then.
    """
    _rope_2d_(q, k, position_ids, theta)


@fake("rope_2d")
def _fake(q: Tensor, k: Tensor, position_ids: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@fake("rope_2d_")
def _fake_in_place(q: Tensor, k: Tensor, position_ids: Tensor, theta: float) -> None:
    return None


def _setup(ctx, inputs, output) -> None:
    _, _, position_ids, ctx.theta = inputs
    ctx.save_for_backward(position_ids)


def _backward(ctx, dq: Tensor, dk: Tensor):
    # A rotation's transpose turns the other way: the same op at the opposite positions.
    (position_ids,) = ctx.saved_tensors
    return *_rope_2d(dq, dk, -position_ids, ctx.theta), None, None


differentiable("rope_2d", _setup, _backward)
autocast("rope_2d", widen)
refuse_grad("rope_2d_", inputs="q k", changed="q k", instead="rope_2d")
