"""Log-probabilities of tokens, the products torch's, the softmax a program per token. Dims: T tokens, V vocabulary.

Logits exist for a chunk of the vocabulary at a time, as in csrc/ops/token_logprob.h. A target outside of the vocabulary
is in no chunk: its logit stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..build import checks

_CHUNK_BYTES, _LEAST_COLUMNS = 32 << 20, 1024  # of logits that exist at a time, in L2
_BLOCK = 4096
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def bounded(difference):
    """Differences to the maximum, so that their product with a weight of 0 is 0."""
    return tl.maximum(difference, -1e30)


@triton.jit
def token_logprob_kernel(
    logits, targets, maximum, sums, logprob, entropy, first, columns, scale,
    START: tl.constexpr, LAST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * columns
    before, sum_before, weighted_before, value = -float("inf"), 0.0, 0.0, float("nan")
    if not START:
        before, sum_before = tl.load(maximum + token), tl.load(sums + token)
        value = tl.load(logprob + token)
        if ENTROPY:
            weighted_before = tl.load(entropy + token)
    column = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], -float("inf"), tl.float32)
    for i in range(0, columns, BLOCK):
        z = tl.load(row + i + column, mask=i + column < columns, other=-float("inf")).to(tl.float32)
        high = tl.maximum(high, z)
    top = tl.maximum(tl.max(high, 0), before)
    offset = tl.where(top == -float("inf"), 0.0, top)
    total, weighted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(0, columns, BLOCK):
        d = tl.load(row + i + column, mask=i + column < columns, other=-float("inf")).to(tl.float32) - offset
        e = tl.exp(d * scale)
        total += e
        if ENTROPY:
            weighted += e * bounded(d)
    summed, weight = tl.sum(total, 0), tl.sum(weighted, 0)
    if not START:
        factor = tl.exp((before - offset) * scale)
        summed += factor * sum_before
        if ENTROPY:
            shift = tl.where(factor > 0, before - offset, 0.0)
            weight += factor * (weighted_before + shift * sum_before)
    target = tl.load(targets + token) - first
    here = (target >= 0) & (target < columns)
    value = tl.where(here, tl.load(row + target, mask=here, other=0).to(tl.float32), value)
    if LAST:
        log_sum = tl.log(summed)
        value = (value - top) * scale - log_sum
        weight = log_sum - scale * weight / summed
    tl.store(maximum + token, top)
    tl.store(sums + token, summed)
    tl.store(logprob + token, value)
    if ENTROPY:
        tl.store(entropy + token, weight)


# With p the softmax, l its logarithm, H the entropy and g, h the gradients of logprob and entropy, a logit's is
# ((target ? g : 0) - p (g + h (l + H))) / temperature.
@triton.jit
def token_logprob_backward_kernel(
    logits, targets, maximum, sums, entropy, dlogprob, dentropy, first, columns, scale, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * columns
    top, total, g = tl.load(maximum + token), tl.load(sums + token), tl.load(dlogprob + token)
    at_maximum, slope = g, 0.0
    if dentropy is not None:
        h = tl.load(dentropy + token)
        at_maximum += h * (tl.load(entropy + token) - tl.log(total))
        slope = h * scale
    target = tl.load(targets + token) - first
    column = tl.arange(0, BLOCK)
    for i in range(0, columns, BLOCK):
        inside = i + column < columns
        d = tl.load(row + i + column, mask=inside, other=0).to(tl.float32) - top
        p = tl.exp(d * scale) / total
        dz = scale * (tl.where(i + column == target, g, 0.0) - p * (at_maximum + slope * bounded(d)))
        tl.store(row + i + column, dz.to(logits.dtype.element_ty), mask=inside)


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.token_logprob("token_logprob", hidden, weight, targets, temperature)
    tokens = len(hidden)
    logprob = hidden.new_empty(tokens, dtype=torch.float32)
    entropy, statistics = logprob.new_empty(tokens if return_entropy else 0), logprob.new_empty((2, tokens))
    targets = targets.long().contiguous()
    for first, part, logits in _chunks(hidden, weight):
        token_logprob_kernel[(tokens,)](
            logits, targets, *statistics, logprob, entropy, first, len(part), 1 / temperature, START=first == 0,
            LAST=first + len(part) == len(weight), ENTROPY=return_entropy, BLOCK=_block(part), **_OPTIONS,
        )  # fmt: skip
    return logprob, entropy, statistics


def token_logprob_backward(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    entropy: Tensor,
    temperature: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    checks.token_logprob_backward(dlogprob, dentropy, hidden, weight, targets, statistics, entropy, temperature)
    (tokens, width), vocabulary = hidden.shape, len(weight)
    total = hidden.new_zeros((tokens if needs_dhidden else 0, width), dtype=torch.float32)
    dweight = weight.new_empty((vocabulary if needs_dweight else 0, width))
    targets, dlogprob, statistics = targets.long().contiguous(), dlogprob.contiguous(), statistics.contiguous()
    dentropy = dentropy if dentropy is None else dentropy.contiguous()
    for first, part, logits in _chunks(hidden, weight):
        token_logprob_backward_kernel[(tokens,)](
            logits, targets, *statistics, entropy.contiguous(), dlogprob, dentropy, first, len(part), 1 / temperature,
            BLOCK=_block(part), **_OPTIONS,
        )  # fmt: skip
        if needs_dhidden:
            total += logits @ part
        if needs_dweight:
            torch.mm(logits.t(), hidden, out=dweight[first : first + len(part)])
    return total.to(hidden.dtype), dweight


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first, [columns, C] of the weight, [T, columns] logits) of each chunk."""
    tokens, vocabulary = len(hidden), len(weight)
    most = max(_LEAST_COLUMNS, _CHUNK_BYTES // max(1, tokens * hidden.element_size()))
    columns = triton.cdiv(triton.cdiv(vocabulary, max(1, triton.cdiv(vocabulary, most))), 64) * 64
    for first in range(0, vocabulary, max(1, columns)):
        part = weight[first : first + columns]
        yield first, part, F.linear(hidden, part).contiguous()


def _block(part: Tensor) -> int:
    return min(_BLOCK, triton.next_power_of_2(max(len(part), 16)))
