"""Residual sum and RMSNorm of it in one pass, a program per tile of rows. Dims: R rows, C width."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..build import checks
from .rms_norm import backward_rows
from .rows import inverse_rms, load_row, row_offsets, row_tile


@triton.jit
def add_rms_norm_kernel(x, residual, weight, out, total, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = row_offsets(tl.program_id(0).to(tl.int64) * ROWS, rows, width, ROWS, BLOCK)
    wide = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    wide += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
    rounded = wide.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    norm = (wide * inverse_rms(wide, width, eps)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (load_row(weight, width, BLOCK) * norm).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    checks.add_rms_norm(x, residual, weight, eps)
    width = x.shape[-1]
    rows, tile = x.numel() // width, row_tile(width)
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    add_rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x.contiguous(), residual.contiguous(), weight.contiguous(), out, total, rows, width, eps, **tile
    )
    return out, total


def add_rms_norm_backward(
    dout: Tensor, dsum: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    checks.add_rms_norm_backward(dout, dsum, total, weight, eps)
    return backward_rows(dout, total, weight, dsum, eps)
