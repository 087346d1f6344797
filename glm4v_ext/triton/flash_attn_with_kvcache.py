"""Attention against a contiguous key/value cache, with the append, forward only.

A program takes a part of a sequence's keys and a kv head with the query heads that share it, packed into the rows of
one tile; a second kernel combines the parts. New keys are read where they arrive, so that the program that appends
them needs to be waited for by no one. How the keys are cut depends on their number and the sizes of the call alone.
Dims: B sequences, Sq queries each, Sn new keys each, H query heads, K kv heads, D head dim, Bc cache rows of S keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import checks
from . import unsupported
from .softmax import LN2, LOG2E, capped, hide, seen_by, take_in

_PART = 256  # keys that are worth a program of their own
_MOST_PARTS = 64
_PARTS_AT_A_TIME = tl.constexpr(16)


@triton.jit
def load_index(index, b, otherwise):
    return tl.load(index + b).to(tl.int32) if index is not None else otherwise


@triton.jit
def attend(
    q, k, v, k_row, v_row, out, maximum, total, first, last, first_seen, last_seen, scale, softcap, factor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Takes in the keys from ``first`` to ``last``."""
    dim = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inside = (key < last)[:, None] & (dim < DIM)[None, :]
        at = key.to(tl.int64)[:, None]
        scores = tl.dot(q, tl.load(k + at * k_row + dim[None, :], mask=inside, other=0).T, input_precision="ieee")
        if CAPPED:
            scores = capped(scores * scale, softcap)
        scores = hide(scores, key, first_seen, tl.minimum(last_seen, last - 1), True)
        values = tl.load(v + at * v_row + dim[None, :], mask=inside, other=0)
        out, maximum, total = take_in(scores, values, out, maximum, total, factor)
    return out, maximum, total


@triton.jit
def flash_attn_with_kvcache_kernel(
    q, k_cache, v_cache, k_new, v_new, out, lse, cache_seqlens, cache_batch_idx, cache_leftpad, capacity, queries,
    new_tokens, kv_heads, tiles, parts, least, left, right, scale, softcap, k_batch, k_row, k_head, v_batch, v_row,
    v_head, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0) % tiles, tl.program_id(1)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    length = tl.minimum(tl.maximum(load_index(cache_seqlens, b, capacity), 0), capacity - new_tokens)
    begin, end = load_index(cache_leftpad, b, 0), length + new_tokens
    cache_row = load_index(cache_batch_idx, b, b.to(tl.int32)).to(tl.int64)
    k_cache += cache_row * k_batch + kv_head * k_head
    v_cache += cache_row * v_batch + kv_head * v_head
    dim = tl.arange(0, BLOCK_D)
    new_row = tl.cast(kv_heads * DIM, tl.int64)  # of [B, Sn, K, D]
    new = b * new_tokens * new_row + kv_head * DIM
    if k_new is not None:
        append = tl.where((tile == 0) & (part == 0), new_tokens, 0)  # by one program
        for start in range(0, append, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            inside = (i < new_tokens)[:, None] & (dim < DIM)[None, :]
            at = new + i[:, None] * new_row + dim[None, :]
            to = (length + i).to(tl.int64)[:, None]
            tl.store(k_cache + to * k_row + dim[None, :], tl.load(k_new + at, mask=inside), mask=inside)
            tl.store(v_cache + to * v_row + dim[None, :], tl.load(v_new + at, mask=inside), mask=inside)

    # Rows of the tile: query by query, in each the heads of the group.
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    real = query < queries
    token = (b * queries + query) * (kv_heads * GROUP) + head  # of [B, Sq, H]
    inside = real[:, None] & (dim < DIM)[None, :]
    q_tile = tl.load(q + token[:, None] * DIM + dim[None, :], mask=inside, other=0)
    row = query + end - queries
    # The keys that some row sees, and this program's part of them.
    first, last = begin, end
    if left >= 0:
        first = tl.maximum(begin, tile * BLOCK_M // GROUP + end - queries - left)
    if right >= 0:
        bottom = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
        last = tl.minimum(end, bottom + end - queries + right + 1)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), parts), BLOCK_N) * BLOCK_N, least)
    first = first + part * share
    last = tl.minimum(first + share, last)
    first_seen, last_seen = seen_by(row, last, left, right)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = total - float("inf")
    factor = LOG2E if CAPPED else scale * LOG2E  # of the scores that the softmax takes: capped, or raw products
    acc, maximum, total = attend(
        q_tile, k_cache, v_cache, k_row, v_row, acc, maximum, total, first, tl.minimum(last, length), first_seen,
        last_seen, scale, softcap, factor, DIM, BLOCK_D, BLOCK_N, CAPPED,
    )  # fmt: skip
    if k_new is not None:
        before = new - length.to(tl.int64) * new_row  # where the cached keys would be
        acc, maximum, total = attend(
            q_tile, k_new + before, v_new + before, new_row, new_row, acc, maximum, total, tl.maximum(first, length),
            last, first_seen, last_seen, scale, softcap, factor, DIM, BLOCK_D, BLOCK_N, CAPPED,
        )  # fmt: skip

    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    slot = part.to(tl.int64) * (tl.num_programs(0) // tiles // kv_heads) * queries * kv_heads * GROUP
    tl.store(out + (slot + token)[:, None] * DIM + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)
    at = (b * (kv_heads * GROUP) + head) * queries + query  # of [B, H, Sq]
    tl.store(lse + slot + at, (maximum * factor + tl.log2(tl.where(blind, 1.0, total))) * LN2, mask=real)


@triton.jit
def combine_kernel(
    part_out, part_lse, out, lse, queries, heads, parts, PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Out of one query and head from its parts, each weighted by e^(its lse)."""
    token = tl.program_id(0).to(tl.int64)  # of [B, Sq, H]
    size = tl.num_programs(0).to(tl.int64)
    at = (token // (queries * heads) * heads + token % heads) * queries + token // heads % queries  # of [B, H, Sq]
    every = tl.arange(0, PARTS)
    all_lse = tl.load(part_lse + every * size + at, mask=every < parts, other=float("-inf"))
    highest = tl.max(all_lse, 0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(all_lse - reference), 0)
    dim = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, _PARTS_AT_A_TIME):
        part = start + tl.arange(0, _PARTS_AT_A_TIME)
        weight = tl.exp(tl.load(part_lse + part * size + at, mask=part < parts, other=float("-inf")) - reference)
        inside = (part < parts)[:, None] & (dim < DIM)[None, :]
        values = tl.load(part_out + (part * size + token)[:, None] * DIM + dim[None, :], mask=inside, other=0)
        acc += tl.sum(values * weight[:, None], 0)
    blind = total == 0
    acc = acc / tl.where(blind, 1.0, total)
    tl.store(out + token * DIM + dim, acc.to(out.dtype.element_ty), mask=dim < DIM)
    tl.store(lse + at, highest + tl.log(tl.where(blind, 1.0, total)))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    op = "flash_attn_with_kvcache"
    checks.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        alibi_slopes, num_splits,
    )  # fmt: skip
    checks.flash_attn_options(op, q.shape[3], softmax_scale, causal, window_left, window_right, softcap)
    if block_table is not None:
        raise unsupported(op, "block_table", "None", "a tensor")
    batch, queries, heads, dim = q.shape
    capacity, kv_heads = k_cache.shape[1:3]
    group, new_tokens = heads // kv_heads, 0 if k is None else k.shape[1]
    out, lse = q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)
    options = tile_options(q, queries * group)
    tiles = max(1, triton.cdiv(queries * group, options["BLOCK_M"]))  # without queries, one that appends
    keys = options["BLOCK_N"]
    if num_splits:
        parts, least = min(num_splits, max(1, triton.cdiv(capacity, keys))), keys
    else:
        parts, least = max(1, min(triton.cdiv(capacity, _PART), _MOST_PARTS // tiles)), _PART
    several = parts > 1
    part_out = q.new_empty((parts, *out.shape), dtype=torch.float32) if several else out
    part_lse = lse.new_empty((parts, *lse.shape)) if several else lse
    k, v, cache_seqlens, cache_batch_idx, cache_leftpad = (
        x if x is None else x.contiguous() for x in (k, v, cache_seqlens, cache_batch_idx, cache_leftpad)
    )
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    right = 0 if causal else window_right
    flash_attn_with_kvcache_kernel[(batch * kv_heads * tiles, parts)](
        q.contiguous(), k_cache, v_cache, k, v, part_out, part_lse, cache_seqlens, cache_batch_idx, cache_leftpad,
        capacity, queries, new_tokens, kv_heads, tiles, parts, least, min(window_left, 2**30), min(right, 2**30), scale,
        softcap, *k_cache.stride()[:3], *v_cache.stride()[:3], GROUP=group, DIM=dim, CAPPED=softcap > 0, **options,
    )  # fmt: skip
    if several:
        combine_kernel[(batch * queries * heads,)](
            part_out, part_lse, out, lse, queries, heads, parts, PARTS=triton.next_power_of_2(parts), DIM=dim,
            BLOCK_D=options["BLOCK_D"], num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def tile_options(q: Tensor, rows: int) -> dict[str, Any]:
    """Tiles of few rows, whose time goes by on reading keys; float32 products are made without tensor cores."""
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    most, warps, stages = (64, 4, 2) if q.element_size() == 2 else (32, 8, 1)
    tile = max(16, min(most, triton.next_power_of_2(max(rows, 1))))
    keys = 16 if q.element_size() == 4 else 64 if tile == 16 else 32
    return {
        "BLOCK_D": block_d, "BLOCK_M": tile, "BLOCK_N": max(16, min(keys, keys * 128 // block_d)), "num_warps": warps,
        "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip
