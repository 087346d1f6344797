"""Tiles of whole rows, as the norms take them. Dims: R rows, C width."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_TILE = 2048  # elements; 16 for each thread of 4 warps


def row_tile(width: int) -> dict[str, Any]:
    """Launch options for tiles of whole rows, several where they are short."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(4, block // 512), 16), "enable_fp_fusion": True}


@triton.jit
def row_offsets(first, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [ROWS, BLOCK] of the tile whose first row is ``first``, and which of them exist."""
    row = first + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    return row[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def load_row(x, width, BLOCK: tl.constexpr):
    """[1, BLOCK] fp32: one row that all rows of a tile share."""
    column = tl.arange(0, BLOCK)
    return tl.load(x + column, mask=column < width, other=0).to(tl.float32)[None, :]


@triton.jit
def inverse_rms(x, width, eps):
    """[ROWS, 1] of x [ROWS, BLOCK] fp32, which is 0 beyond the width."""
    return tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
