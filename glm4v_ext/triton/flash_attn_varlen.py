"""Attention over packed sequences, forward only: a program per tile of a sequence's query rows and query head.

Tiles are found on the device, so that the host needs to know no length; one launch covers every mix of sequences.
Dims: Tq, Tk tokens, N sequences, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import checks
from .ragged import locate, pick
from .softmax import LN2, LOG2E, capped, hide, seen_by, take_in

_SEQUENCES = tl.constexpr(64)  # that a program looks at at a time


@triton.jit
def load_rows(
    x, start, keys, page_stride, row_stride, pages, page_size, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_N, BLOCK_D] of k or v from key ``start`` on: one after the other, or in the pages that are listed."""
    i, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    there = i < keys - start if MASKED else i >= 0
    if PAGED:
        key = start + i
        page = tl.load(pages + key // page_size, mask=there, other=0).to(tl.int64)
        row = page * page_stride + key % page_size * row_stride
    else:
        x += tl.cast(start, tl.int64) * row_stride
        row = i * row_stride
    inside = there[:, None] & (dim < DIM)[None, :]
    return tl.load(x + row[:, None] + dim[None, :], mask=inside, other=0)


@triton.jit
def attend(
    q, k, v, out, maximum, total, first, last, keys, first_seen, last_seen, scale, softcap, factor, pages, page_size,
    k_page, k_row, v_page, v_row, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
    PAGED: tl.constexpr, LEFT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes in the keys from ``first`` to ``last``; unless MASKED, every row sees all of them."""
    for start in range(first, last, BLOCK_N):
        k_tile = load_rows(k, start, keys, k_page, k_row, pages, page_size, DIM, BLOCK_D, BLOCK_N, PAGED, MASKED)
        scores = tl.dot(q, k_tile.T, input_precision="ieee")
        if CAPPED:
            scores = capped(scores * scale, softcap)
        if MASKED:
            scores = hide(scores, start + tl.arange(0, BLOCK_N), first_seen, last_seen, LEFT)
        v_tile = load_rows(v, start, keys, v_page, v_row, pages, page_size, DIM, BLOCK_D, BLOCK_N, PAGED, MASKED)
        out, maximum, total = take_in(scores, v_tile, out, maximum, total, factor)
    return out, maximum, total


@triton.jit
def flash_attn_varlen_kernel(
    q, k, v, out, lse, statistics, cu_q, cu_k, block_table, sequences, tokens_q, heads, left, right, scale, softcap,
    page_size, pages_per_sequence, q_row, q_head, k_page, k_row, k_head, v_page, v_row, v_head, GROUP: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr,
    PAGED: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # The padding behind the last sequence counts as one more, without keys.
    sequence, begin, end, tiles_before, before = tile * 0, tile * 0, tile * 0, tile * 0, tile * 0
    for first in range(0, sequences + 1, _SEQUENCES):
        n = first + tl.arange(0, _SEQUENCES)
        begins = tl.load(cu_q + n, mask=n <= sequences, other=0).to(tl.int32)
        ends = tl.load(cu_q + n + 1, mask=n < sequences, other=0).to(tl.int32)
        ends = tl.where(n < sequences, ends, tl.where(n == sequences, tokens_q, begins))
        tiles = tl.cdiv(ends - begins, BLOCK_M)
        here, starts = locate(tile, tiles, before)
        sequence, begin, end = sequence + pick(here, n), begin + pick(here, begins), end + pick(here, ends)
        tiles_before += pick(here, starts)
        before += tl.sum(tiles, 0)
    rows = end - begin
    if rows == 0:  # the grid has room for the worst mix
        return
    k_begin, keys = tile * 0, tile * 0
    if sequence < sequences:
        k_begin = tl.load(cu_k + sequence).to(tl.int32)
        keys = tl.load(cu_k + sequence + 1).to(tl.int32) - k_begin
    # The last rows first: under a causal mask they are the most work.
    top = (tl.cdiv(rows, BLOCK_M) - 1 - (tile - tiles_before)) * BLOCK_M
    query, dim = top + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (query < rows)[:, None] & (dim < DIM)[None, :]
    token = (begin + query).to(tl.int64)
    q_tile = tl.load(q + token[:, None] * q_row + head * q_head + dim[None, :], mask=inside, other=0)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    if not PAGED:
        k += k_begin.to(tl.int64) * k_row
        v += k_begin.to(tl.int64) * v_row

    # Which keys some row of the tile sees, and which all of them do. Row i sees keys i + diagonal - left and on.
    diagonal = keys - rows
    lowest, highest = top + diagonal, tl.minimum(top + BLOCK_M, rows) - 1 + diagonal
    first, last, whole_first, whole_last = tile * 0, keys, tile * 0, keys
    if LEFT:
        first = tl.maximum(lowest - left, 0) // BLOCK_N * BLOCK_N
        whole_first = tl.cdiv(tl.maximum(highest - left, 0), BLOCK_N) * BLOCK_N
    if right >= 0:
        last = tl.maximum(tl.minimum(keys, highest + right + 1), 0)
        whole_last = tl.maximum(tl.minimum(keys, lowest + right + 1), 0)
    whole_first = tl.minimum(whole_first, tl.cdiv(last, BLOCK_N) * BLOCK_N)
    whole_last = tl.maximum(whole_last // BLOCK_N * BLOCK_N, whole_first)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = total - float("inf")
    factor = LOG2E if CAPPED else scale * LOG2E  # of the scores that the softmax takes: capped, or raw products
    first_seen, last_seen = seen_by(query + diagonal, keys, left, right)
    pages = block_table + sequence.to(tl.int64) * pages_per_sequence if PAGED else block_table
    if LEFT:
        acc, maximum, total = attend(
            q_tile, k, v, acc, maximum, total, first, whole_first, keys, first_seen, last_seen, scale, softcap,
            factor, pages, page_size, k_page, k_row, v_page, v_row, DIM, BLOCK_D, BLOCK_N, CAPPED, PAGED, LEFT, True,
        )  # fmt: skip
    acc, maximum, total = attend(
        q_tile, k, v, acc, maximum, total, whole_first, whole_last, keys, first_seen, last_seen, scale, softcap,
        factor, pages, page_size, k_page, k_row, v_page, v_row, DIM, BLOCK_D, BLOCK_N, CAPPED, PAGED, LEFT, False,
    )  # fmt: skip
    acc, maximum, total = attend(
        q_tile, k, v, acc, maximum, total, whole_last, last, keys, first_seen, last_seen, scale, softcap,
        factor, pages, page_size, k_page, k_row, v_page, v_row, DIM, BLOCK_D, BLOCK_N, CAPPED, PAGED, LEFT, True,
    )  # fmt: skip

    blind = total == 0  # rows that see no key; NaN is not 0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    tl.store(out + (token[:, None] * heads + head) * DIM + dim[None, :], acc.to(out.dtype.element_ty), mask=inside)
    at = head * tokens_q + token
    logarithm = (maximum * factor + tl.log2(tl.where(blind, 1.0, total))) * LN2
    tl.store(lse + at, logarithm, mask=query < rows)
    tl.store(statistics + at, maximum, mask=query < rows)
    tl.store(statistics + (heads + head) * tokens_q + token, total, mask=query < rows)


def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "flash_attn_varlen"
    checks.flash_attn_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, alibi_slopes, block_table)
    checks.flash_attn_options(op, q.shape[2], softmax_scale, causal, window_left, window_right, softcap)
    tokens, heads, dim = q.shape
    kv_heads, sequences = k.shape[-2], cu_seqlens_q.shape[0] - 1
    out, lse = q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)
    statistics = lse.new_empty((2, heads, tokens))  # maximum and sum of each softmax
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    paged = block_table is not None
    page_size, pages, table = 1, 0, cu_seqlens_k  # read by no one unless there are pages
    if block_table is not None:
        page_size, pages, table = k.shape[1], block_table.shape[1], block_table.contiguous()
    options = tile_options(q)
    grid = (tokens // options["BLOCK_M"] + sequences + 1 if tokens else 0, heads)
    flash_attn_varlen_kernel[grid](
        q, k, v, out, lse, statistics, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), table, sequences, tokens,
        heads, min(window_left, 2**30), 0 if causal else min(window_right, 2**30),
        dim**-0.5 if softmax_scale is None else softmax_scale, softcap, page_size, pages, *q.stride()[:2],
        *_strides(k), *_strides(v), GROUP=heads // kv_heads, DIM=dim, CAPPED=softcap > 0, PAGED=paged,
        LEFT=window_left >= 0, **options,
    )  # fmt: skip
    return out, lse, statistics


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of pages, rows and heads of [Tk, K, D] or [pages, page_size, K, D]."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def capability_of(q: Tensor) -> int:
    return torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 8


# [most dims][bytes of an element]: BLOCK_M, BLOCK_N, num_warps, num_stages. They fit into registers and into the 99 KiB
# of shared memory that every GPU from sm_80 on has. mma.sync keeps a whole tile of keys in registers; wgmma, from sm_90
# on, does not.
_MMA = {64: {2: (128, 64, 8, 3), 4: (64, 32, 8, 2)}, 128: {2: (128, 32, 8, 2), 4: (32, 32, 8, 1)},
        256: {2: (64, 32, 8, 2), 4: (32, 16, 8, 1)}}  # fmt: skip
_WGMMA = {64: {**_MMA[64], 2: (128, 64, 4, 3)}, 128: {**_MMA[128], 2: (128, 64, 8, 2)}, 256: _MMA[256]}


def tile_options(q: Tensor) -> dict[str, Any]:
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    tiles = _MMA if capability_of(q) < 9 else _WGMMA
    rows, keys, warps, stages = tiles[max(64, block_d)][q.element_size()]
    return {
        "BLOCK_D": block_d, "BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages,
        "enable_fp_fusion": True,
    }  # fmt: skip
