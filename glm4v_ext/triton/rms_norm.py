"""RMSNorm, a program per tile of rows; its backward adds up dweight in a fixed number of chunks. Dims: R rows, C width.

The normalised value is rounded before the weight multiplies it, as in the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import checks
from .rows import inverse_rms, load_row, row_offsets, row_tile

_CHUNKS = 512  # programs of a backward: enough for every GPU, and the same on all, so that none rounds differently


@triton.jit
def rms_norm_kernel(x, weight, out, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = row_offsets(tl.program_id(0).to(tl.int64) * ROWS, rows, width, ROWS, BLOCK)
    wide = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    norm = (wide * inverse_rms(wide, width, eps)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (load_row(weight, width, BLOCK) * norm).to(out.dtype.element_ty), mask=inside)


# With r = 1/rms and n = x * r:  dx = r * (weight * dout - n * mean(weight * dout * n)) + dskip.
@triton.jit
def rms_norm_backward_kernel(
    dout, x, weight, dskip, dx, partial, rows, width, eps, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    w = load_row(weight, width, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(chunk * tiles, (chunk + 1) * tiles):
        at, inside = row_offsets(tile * ROWS, rows, width, ROWS, BLOCK)
        wide = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(dout + at, mask=inside, other=0).to(tl.float32)
        r = inverse_rms(wide, width, eps)
        n = wide * r
        dweight += g * n.to(dx.dtype.element_ty).to(tl.float32)
        wg = w * g
        d = r * (wg - n * (tl.sum(wg * n, 1) / width)[:, None])
        if dskip is not None:
            d += tl.load(dskip + at, mask=inside, other=0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    column = tl.arange(0, BLOCK)
    tl.store(partial + chunk * width + column, tl.sum(dweight, 0), mask=column < width)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    checks.rms_norm("rms_norm", x, weight, eps)
    width = x.shape[-1]
    rows, tile = x.numel() // width, row_tile(width)
    out = x.new_empty(x.shape)
    rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x.contiguous(), weight.contiguous(), out, rows, width, eps, **tile
    )
    return out


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    checks.rms_norm_backward(dout, x, weight, eps)
    return backward_rows(dout, x, weight, None, eps)


def backward_rows(dout: Tensor, x: Tensor, weight: Tensor, dskip: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of checked tensors; ``dskip`` is a gradient that reaches x past the norm."""
    width = x.shape[-1]
    rows, tile = x.numel() // width, row_tile(width)
    row_tiles = triton.cdiv(rows, tile["ROWS"])
    tiles = triton.cdiv(row_tiles, _CHUNKS)  # of a chunk
    chunks = triton.cdiv(row_tiles, tiles) if rows else 0
    dx, partial = x.new_empty(x.shape), x.new_empty((chunks, width), dtype=torch.float32)
    rms_norm_backward_kernel[(chunks,)](
        dout.contiguous(), x.contiguous(), weight.contiguous(), dskip if dskip is None else dskip.contiguous(), dx,
        partial, rows, width, eps, tiles, **tile,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)
