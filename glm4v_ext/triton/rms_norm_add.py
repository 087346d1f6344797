"""RMSNorm of a branch, added onto the residual, a program per tile of rows. Dims: R rows, C width."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..build import checks
from .rows import inverse_rms, load_row, row_offsets, row_tile


@triton.jit
def rms_norm_add_kernel(x, residual, weight, out, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = row_offsets(tl.program_id(0).to(tl.int64) * ROWS, rows, width, ROWS, BLOCK)
    wide = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    norm = (wide * inverse_rms(wide, width, eps)).to(out.dtype.element_ty).to(tl.float32)
    branch = (load_row(weight, width, BLOCK) * norm).to(out.dtype.element_ty).to(tl.float32)
    total = tl.load(residual + at, mask=inside, other=0).to(tl.float32) + branch
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    checks.rms_norm_add(x, residual, weight, eps)
    width = x.shape[-1]
    rows, tile = x.numel() // width, row_tile(width)
    out = x.new_empty(x.shape)
    rms_norm_add_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x.contiguous(), residual.contiguous(), weight.contiguous(), out, rows, width, eps, **tile
    )
    return out
