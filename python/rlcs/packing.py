"""Samples into micro-steps of a token budget, balanced by what they cost. No torch.

Invariants (held by tests): every sample is in exactly one micro-step; a micro-step holds at most ``budget`` tokens; all
ranks get the same number of micro-steps; the weights of the micro-steps of one step sum to 1, so that their gradients
sum to the gradient of the mean over all samples; the same input gives the same packing.

A sample costs what its tokens and its patches cost: attention grows with the square of each, the rest linearly. Dims: N
samples, T tokens, R ranks, M micro-steps of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .types import PackedBatch, Sample


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, up to a common factor; `rlcs.costs.packing_cost` has those of a model."""

    token: float = 1.0
    token_pair: float = 0.0
    patch: float = 0.0
    patch_pair: float = 0.0  # of one image: patches of different images don't meet

    def __call__(self, tokens: int, images: Sequence[int] = ()) -> float:
        """Of a sample of so many tokens with images of so many patches."""
        vision = sum(self.patch * p + self.patch_pair * p * p for p in images)
        return self.token * tokens + self.token_pair * tokens * tokens + vision


def pack(
    lengths: Sequence[int], budget: int, costs: Sequence[float] | None = None, ranks: int = 1
) -> list[list[list[int]]]:
    """[R][M] lists of sample indices: as few micro-steps as the budget allows, of nearly equal cost.

    Args:
        lengths: [N] tokens of each sample.
        budget: tokens of a micro-step, at most.
        costs: [N], by default the lengths.
        ranks: every rank gets as many micro-steps as the others; some may be empty when samples are few.

    Raises:
        ValueError: a sample is longer than the budget; the text names it.
    """
    for i, length in enumerate(lengths):
        if length > budget:
            raise ValueError(f"pack: sample {i} must have at most {budget} tokens (the budget), got {length}")
    if len(lengths) == 0:  # they may be an array
        return [[] for _ in range(ranks)]
    costs = list(map(float, lengths if costs is None else costs))
    steps = max(1, -(-sum(lengths) // (budget * ranks)))
    while (bins := _fill(lengths, costs, budget, steps * ranks)) is None:
        steps += 1
    order = sorted(range(len(bins)), key=lambda b: (-sum(costs[i] for i in bins[b]), b))
    # Snake over the ranks: the bins of one micro-step are neighbours in cost, so nobody waits long at its end.
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for place, b in enumerate(order):
        turn, rank = divmod(place, ranks)
        shares[rank if turn % 2 == 0 else ranks - 1 - rank].append(sorted(bins[b]))
    return shares


def _fill(lengths: Sequence[int], costs: Sequence[float], budget: int, count: int) -> list[list[int]] | None:
    """Costliest first into the bin that has cost the least so far and still has room; None if a sample finds none."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room, spent = [budget] * count, [0.0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-costs[i], -lengths[i], i)):
        fits = [b for b in range(count) if room[b] >= lengths[i]]
        if not fits:
            return _first_fit(lengths, budget, count)
        b = min(fits, key=lambda b: (spent[b], b))
        bins[b].append(i)
        room[b] -= lengths[i]
        spent[b] += costs[i]
    return bins


def _first_fit(lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Longest first into the first bin with room: packs tighter than by cost (at most 11/9 of the optimum)."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        b = next((b for b in range(count) if room[b] >= lengths[i]), None)
        if b is None:
            return None
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def imbalance(shares: list[list[list[int]]], costs: Sequence[float]) -> float:
    """How much longer a step takes than with equal work: the costliest rank of each micro-step, over the mean."""
    spent = [[sum(costs[i] for i in micro) for micro in rank] for rank in shares]
    total = sum(map(sum, spent))
    return sum(map(max, zip(*spent, strict=True))) * len(shares) / total if total else 1.0


def batch_of(samples: Sequence[Sample], total: int) -> PackedBatch:
    """One micro-step; ``total`` is the number of samples of the whole step, over all ranks."""

    def shifted(rows: Sequence[np.ndarray]) -> np.ndarray:
        """What stands at a token's successor; the last token of a sample predicts nothing, and is not trained on."""
        return np.concatenate([np.append(row[1:], row.dtype.type(0)) for row in rows])

    ids = [sample.token_ids for sample in samples]
    return PackedBatch(
        input_ids=np.concatenate(ids).astype(np.int64),
        cu_seqlens=np.cumsum([0, *map(len, ids)]).astype(np.int32),
        targets=shifted(ids).astype(np.int64),
        trained=shifted([s.trained for s in samples]),
        logprobs=shifted([s.logprobs for s in samples]).astype(np.float32),
        advantages=np.array([s.advantage for s in samples], dtype=np.float32),
        sources=np.array([s.source for s in samples], dtype=np.int64),
        weight=len(samples) / total,
        old=None if any(s.old is None for s in samples) else shifted([s.old for s in samples]).astype(np.float32),  # type: ignore[misc]
    )
