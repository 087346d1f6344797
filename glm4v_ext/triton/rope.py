"""Rotary embedding, a program per token turns its heads of q and of k; angles come from the positions.

Dims: T tokens, H query heads, K kv heads, D head dim. The arithmetic is csrc/common/rotary.h's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # pairs that a program turns at a time
_PER_TURN = tl.constexpr(2 / math.pi)
# pi/2 in two parts: the first one has 33 bits, so that its product with a whole number is exact.
_QUARTER_HIGH = tl.constexpr(float.fromhex("0x1.921fb544p0"))
_QUARTER_LOW = tl.constexpr(float.fromhex("0x1.0b4611a626331p-34"))
_SHIFTER = tl.constexpr(1.5 * 2.0**52)  # adding it rounds to a whole number, which is then in the low bits


@triton.jit
def cos_sin(angle):
    """cos and sin of fp64 angles, rounded to fp32: within one ulp for magnitudes below 2^40."""
    shifted = angle * _PER_TURN + _SHIFTER
    turns = shifted - _SHIFTER
    r = (angle - turns * _QUARTER_HIGH) - turns * _QUARTER_LOW
    r2 = r * r
    # Taylor's terms up to r^11 and r^10: the rest is below 2e-10 for |r| <= pi/4.
    sine = r + r * r2 * (-1 / 6 + r2 * (1 / 120 + r2 * (-1 / 5040 + r2 * (1 / 362880 - r2 * (1 / 39916800)))))
    cosine = 1 + r2 * (-0.5 + r2 * (1 / 24 + r2 * (-1 / 720 + r2 * (1 / 40320 - r2 * (1 / 3628800)))))
    quadrant = shifted.to(tl.int64, bitcast=True)
    swapped = (quadrant & 1) != 0
    c, s = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    c, s = tl.where(((quadrant + 1) & 2) != 0, -c, c), tl.where((quadrant & 2) != 0, -s, s)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def turn_heads(
    x, out, heads, head_stride, out_head_stride, cos, sin, DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turns the heads of one token, a few at a time; REST > 0 copies the dims behind the pairs."""
    pair = tl.arange(0, BLOCK)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        x_head, out_head = (
            x + head[:, None].to(tl.int64) * head_stride,
            out + head[:, None].to(tl.int64) * out_head_stride,
        )
        inside = (head < heads)[:, None] & (pair < PAIRS)[None, :]
        if INTERLEAVED:
            dim = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
            both = tl.load(x_head[:, :, None] + dim[None, :, :], mask=inside[:, :, None], other=0).to(tl.float32)
            a, b = tl.split(both)
            turned = tl.join(a * cos - b * sin, b * cos + a * sin).to(out.dtype.element_ty)
            tl.store(out_head[:, :, None] + dim[None, :, :], turned, mask=inside[:, :, None])
        else:
            a = tl.load(x_head + pair[None, :], mask=inside, other=0).to(tl.float32)
            b = tl.load(x_head + PAIRS + pair[None, :], mask=inside, other=0).to(tl.float32)
            tl.store(out_head + pair[None, :], (a * cos - b * sin).to(out.dtype.element_ty), mask=inside)
            tl.store(out_head + PAIRS + pair[None, :], (b * cos + a * sin).to(out.dtype.element_ty), mask=inside)
        if REST > 0:
            dim = 2 * PAIRS + tl.arange(0, REST)
            behind = (head < heads)[:, None] & (dim < DIM)[None, :]
            tl.store(out_head + dim[None, :], tl.load(x_head + dim[None, :], mask=behind), mask=behind)


# Pair i turns by position * theta^(-(i % FREQUENCIES) / FREQUENCIES), the position of the first axis below pair SECOND,
# of the second one below THIRD, then of the third; STEP is -log2(theta) / FREQUENCIES.
@triton.jit
def rope_kernel(
    q, k, q_out, k_out, position_ids, axis_stride, position_stride, q_heads, k_heads, q_token, q_head, k_token, k_head,
    q_out_token, q_out_head, k_out_token, k_out_head, DIM: tl.constexpr, PAIRS: tl.constexpr, FREQUENCIES: tl.constexpr,
    STEP: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    axis = (pair >= SECOND).to(tl.int64) + (pair >= THIRD).to(tl.int64)
    at = token * position_stride + axis * axis_stride
    position = tl.load(position_ids + at, mask=pair < PAIRS, other=0).to(tl.float64)
    cos, sin = cos_sin(position * tl.exp2((pair % FREQUENCIES).to(tl.float64) * STEP))
    cos, sin = cos[None, :], sin[None, :]
    turn_heads(
        q + token * q_token, q_out + token * q_out_token, q_heads, q_head, q_out_head, cos, sin, DIM, PAIRS, BLOCK,
        Q_HEADS, REST, INTERLEAVED,
    )  # fmt: skip
    turn_heads(
        k + token * k_token, k_out + token * k_out_token, k_heads, k_head, k_out_head, cos, sin, DIM, PAIRS, BLOCK,
        K_HEADS, REST, INTERLEAVED,
    )  # fmt: skip


def turn(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    position_ids: Tensor,
    axis: int,
    sections: Sequence[int],
    frequencies: int,
    theta: float,
    interleaved: bool,
) -> None:
    """Turns q and k, whose head dims are adjacent, into q_out and k_out, which may be q and k.

    Args:
        axis: the dim of ``position_ids`` that counts axes.
        sections: pairs that each axis turns.
        frequencies: after how many pairs they begin again.
    """
    tokens, q_heads, dim = q.shape
    pairs = sum(sections)
    block = triton.next_power_of_2(max(pairs, 1))
    in_place = q_out.data_ptr() == q.data_ptr() and k_out.data_ptr() == k.data_ptr()
    rest = 0 if in_place else dim - 2 * pairs

    def heads_of(heads: int) -> int:
        return min(triton.next_power_of_2(max(heads, 1)), max(1, _TILE // block))

    rope_kernel[(tokens,)](
        q, k, q_out, k_out, position_ids, position_ids.stride(axis), position_ids.stride(1 - axis), q_heads, k.shape[1],
        *q.stride()[:2], *k.stride()[:2], *q_out.stride()[:2], *k_out.stride()[:2], DIM=dim, PAIRS=pairs,
        FREQUENCIES=max(frequencies, 1), STEP=-math.log2(theta) / max(frequencies, 1), SECOND=sections[0],
        THIRD=sum(sections[:2]), INTERLEAVED=interleaved, BLOCK=block, Q_HEADS=heads_of(q_heads),
        K_HEADS=heads_of(k.shape[1]), REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def adjacent(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
