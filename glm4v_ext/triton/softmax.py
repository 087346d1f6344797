"""Softmax over blocks of keys, as both attention kernels take it. Dims: M rows, N keys of a block, D head dim."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(scores, softcap):
    """softcap * tanh(scores / softcap), from e^-2|x|, which cannot overflow."""
    x = scores / softcap
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    inverse = 1 / (1 + e)
    # Of two forms the one that rounds less; near 0, where 1 - e cancels, the series is exact to fp32.
    far = tl.where(e > 0.3, (1 - e) * inverse, 1 - 2 * e * inverse)
    x2 = x * x
    near = x * (1 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
    return softcap * tl.where(x2 < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def seen_by(row, keys, left, right):
    """(first, last) key that each row sees of ``keys``: from row - left to row + right, where negative is unbounded."""
    first = tl.maximum(row - left, 0) if left >= 0 else row * 0
    last = tl.minimum(row + right, keys - 1) if right >= 0 else row * 0 + (keys - 1)
    return first, last


@triton.jit
def hide(scores, key, first_seen, last_seen, LEFT: tl.constexpr):
    """-inf where a row does not see a key; without a LEFT bound every row sees from the first key on."""
    seen = key[None, :] <= last_seen[:, None]
    if LEFT:
        seen = seen & (key[None, :] >= first_seen[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def take_in(scores, v, out, maximum, total, factor):
    """The running softmax after one more block: out [M, D] not yet divided by total [M], and maximum [M] of the scores.

    Weights are e^(scores - maximum) = 2^((scores - maximum) * factor): the difference first, which is never positive.
    """
    highest = tl.maximum(maximum, tl.max(scores, 1))
    reference = tl.where(highest == float("-inf"), 0.0, highest)  # rows that have seen no key
    weights = tl.exp2((scores - reference[:, None]) * factor)
    shrunk = tl.exp2((maximum - reference) * factor)
    out = tl.dot(weights.to(v.dtype), v, out * shrunk[:, None], input_precision="ieee")
    return out, highest, total * shrunk + tl.sum(weights, 1)
