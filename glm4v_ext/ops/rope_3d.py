"""Rotary embedding of the language model: time, row and column share out the frequencies of a head's first dims.

Dims: T tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autocast import autocast, widen
from .differentiable import differentiable
from .fake import fake
from .refuse import refuse_grad

# Looked up once: a decoding step calls the op per layer, and each attribute costs time.
_rope_3d = torch.ops.glm4v_ext.rope_3d.default
_rope_3d_ = torch.ops.glm4v_ext.rope_3d_.default


def rope_3d(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Sequence[int] = (8, 12, 12),
    theta: float = 1e4,
    rotary_dim: int = 64,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    """Turns pair ``i`` of every head's first ``rotary_dim`` dims by ``position * theta ** (-2 * i / rotary_dim)``.

    ``position`` is the token's time for the first ``sections[0]`` pairs, its row for the next ``sections[1]``, its
    column for the rest. Pair ``i`` is dims ``2i, 2i + 1``, or ``i, i + rotary_dim/2`` if not ``interleaved``. The other
    dims pass through. Angles are fp64, their cos and sin are rounded to fp32, the rotation is fp32 whatever the dtype.
    Differentiable in q and k.

    cos and sin are within an fp32 ulp of 1 where angles, and so positions, stay below 2^40 in magnitude (2^30 on CPUs
    without FMA); beyond, errors grow, from about 2^53 on without bound.

    Args:
        q: ``[T, H, D]``, float32, bfloat16 or float16. Any strides.
        k: ``[T, K, D]``, dtype of ``q``.
        position_ids: ``[3, T]`` int32 or int64: time, row, column.
        sections: three counts of pairs, ``rotary_dim / 2`` together.
        theta: base of the frequencies.
        rotary_dim: how many dims turn, even, at most D and at most 256.
        interleaved: pairs of adjacent dims (GLM-4.1V) or of two halves.

    Returns:
        The turned q and k, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.

    Source: Qwen2-VL's M-RoPE (arXiv 2409.12191) with GLM's pairs, as in transformers' ``modeling_glm4v``.
    """
    return _rope_3d(q, k, position_ids, *_three("rope_3d", sections), theta, rotary_dim, interleaved)


def rope_3d_(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Sequence[int] = (8, 12, 12),
    theta: float = 1e4,
    rotary_dim: int = 64,
    interleaved: bool = True,
) -> None:
    """:func:`rope_3d` written over q and k, for inference; views into a packed qkv need no copy.

    Args:
        q: ``[T, H, D]`` as in :func:`rope_3d`, dims of a head adjacent in memory.
        k: ``[T, K, D]``, the same, in memory of its own: views into a packed qkv may lie between each other.
        position_ids: ``[3, T]`` int32 or int64.
        sections: three counts of pairs.
        theta: base of the frequencies.
        rotary_dim: how many dims turn.
        interleaved: pairs of adjacent dims or of two halves.

    Raises:
        RuntimeError: as in :func:`rope_3d`, or an argument requires grad; nothing has been written then.
    """
    _rope_3d_(q, k, position_ids, *_three("rope_3d_", sections), theta, rotary_dim, interleaved)


def _three(op: str, sections: Sequence[int]) -> Sequence[int]:
    # The op sees three numbers: only here is it known how many there were.
    if not isinstance(sections, Sequence) or len(sections) != 3:
        raise RuntimeError(f"{op}: sections must be 3 counts of pairs, got {sections!r}")
    return sections


@fake("rope_3d")
def _fake(q: Tensor, k: Tensor, *settings) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@fake("rope_3d_")
def _fake_in_place(*arguments) -> None:
    return None


def _setup(ctx, inputs, output) -> None:
    _, _, position_ids, *ctx.settings = inputs
    ctx.save_for_backward(position_ids)


def _backward(ctx, dq: Tensor, dk: Tensor):
    # A rotation's transpose turns the other way: the same op at the opposite positions.
    (position_ids,) = ctx.saved_tensors
    return *_rope_3d(dq, dk, -position_ids, *ctx.settings), *[None] * 7


differentiable("rope_3d", _setup, _backward)
autocast("rope_3d", widen)
refuse_grad("rope_3d_", inputs="q k", changed="q k", instead="rope_3d")
