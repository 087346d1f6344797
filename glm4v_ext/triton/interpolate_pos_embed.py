"""Bicubic interpolation of the position table. Dims: P patches, I images, S side of the table, C width.

Forward: a program takes a merge block and a block of channels; its four patches share most of their taps, which come
from L1 again. Backward: a program takes a cell and adds up all patches that have a tap there, in one order. Grids stay
on the device. The arithmetic of the taps is csrc/common/bicubic.h's.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..build import checks
from .ragged import locate, pick

_IMAGES = tl.constexpr(32)  # that a program looks at at a time


@triton.jit
def load_grids(grid_thw, image, images):
    t = tl.load(grid_thw + 3 * image, mask=image < images, other=0).to(tl.int64)
    h = tl.load(grid_thw + 3 * image + 1, mask=image < images, other=0).to(tl.int64)
    w = tl.load(grid_thw + 3 * image + 2, mask=image < images, other=0).to(tl.int64)
    return t, h, w


@triton.jit
def tap(position, k: tl.constexpr, target, source):
    """(cell, weight) of tap k, from 0 to 3, of a position: Keys' kernel with a = -3/4, taps held inside the border."""
    numerator, denominator = (2 * position + 1) * source - target, 2 * target
    # Rounding down: the numerator is negative only for centres up to half a cell outside.
    first = tl.where(numerator < 0, -1, numerator // denominator)
    d = (numerator - first * denominator).to(tl.float32) / denominator.to(tl.float32)
    d = d if k < 2 else 1 - d  # the kernel is even
    weight = -0.75 * d * (1 - d) * (1 - d) if k == 0 or k == 3 else (1.25 * d - 2.25) * d * d + 1
    return tl.minimum(tl.maximum(first + (k - 1), 0), source - 1), weight


@triton.jit
def interpolate_pos_embed_kernel(
    x, table, out, grid_thw, images, patches, width, SIDE: tl.constexpr, BLOCK: tl.constexpr
):
    patch = tl.program_id(0).to(tl.int64) * 4
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    before, start, h, w = patch * 0, patch * 0, patch * 0, patch * 0
    for first in range(0, images, _IMAGES):
        ts, hs, ws = load_grids(grid_thw, first + tl.arange(0, _IMAGES), images)
        here, starts = locate(patch, ts * hs * ws, before)
        start, h, w = start + pick(here, starts), h + pick(here, hs), w + pick(here, ws)
        before += tl.sum(ts * hs * ws, 0)
    found = h > 0  # else beyond the last image: x stays as it is
    h, w = tl.maximum(h, 1), tl.maximum(w, 2)
    block = (patch - start) % (h * w) // 4
    top, left = block // (w // 2) * 2, block % (w // 2) * 2
    line = tl.arange(0, 4)  # of the merge block
    row, place = top + line // 2, left + line % 2
    value = tl.zeros([4, BLOCK], tl.float32)
    for ky in tl.static_range(4):
        cell_y, weight_y = tap(row, ky, h, SIDE)
        across = tl.zeros([4, BLOCK], tl.float32)
        for kx in tl.static_range(4):
            cell_x, weight_x = tap(place, kx, w, SIDE)
            at = (cell_y * SIDE + cell_x)[:, None] * width + column[None, :]
            cells = tl.load(table + at, mask=(column < width)[None, :], other=0).to(tl.float32)
            across += cells * weight_x[:, None]
        value += across * weight_y[:, None]
    value = tl.where(found, value, 0.0)
    at = (patch + line)[:, None] * width + column[None, :]
    inside = ((patch + line) < patches)[:, None] & (column < width)[None, :]
    total = tl.load(x + at, mask=inside, other=0).to(tl.float32) + value.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def span(cell, target, source):
    """The positions [begin, end) among ``target`` that have a tap at ``cell`` of ``source``."""
    low, high = target * (2 * cell - 3) - source, target * (2 * cell + 5) - source
    begin = tl.where(low <= 0, 0, (low + 2 * source - 1) // (2 * source))
    end = tl.where(high <= 0, 0, (high + 2 * source - 1) // (2 * source))
    return tl.minimum(begin, target), tl.minimum(end, target)


@triton.jit
def weight_at(position, cell, target, source):
    """What the position gives to the cell: at the border, several of its taps."""
    total = 0.0
    for k in tl.static_range(4):
        at, weight = tap(position, k, target, source)
        total += tl.where(at == cell, weight, 0.0)
    return total


@triton.jit
def interpolate_pos_embed_backward_kernel(
    dout, dtable, grid_thw, images, patches, width, SIDE: tl.constexpr, BLOCK: tl.constexpr
):
    cell = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    start = cell * 0
    for image in range(images):
        t, h, w = load_grids(grid_thw, image, images)
        # Grids that hold more than there is are left out, and empty ones that loops would not come to the end of.
        fits = (t <= patches) & (h <= patches) & (w <= patches) & (start + t * h * w <= patches)
        frames = tl.where(fits, t, 0)
        top, bottom = span(cell // SIDE, h, SIDE)
        left, right = span(cell % SIDE, w, SIDE)
        for frame in range(frames):
            for row in range(top, bottom):
                across = tl.zeros([BLOCK], tl.float32)
                for place in range(left, right):
                    block = row // 2 * (w // 2) + place // 2
                    patch = start + frame * h * w + block * 4 + row % 2 * 2 + place % 2
                    g = tl.load(dout + patch * width + column, mask=inside, other=0).to(tl.float32)
                    across += g * weight_at(place, cell % SIDE, w, SIDE)
                total += across * weight_at(row, cell // SIDE, h, SIDE)
        start += t * h * w
    tl.store(dtable + cell * width + column, total.to(dtable.dtype.element_ty), mask=inside)


def interpolate_pos_embed(x: Tensor, table: Tensor, grid_thw: Tensor) -> Tensor:
    checks.interpolate_pos_embed(x, table, grid_thw)
    (patches, width), out = x.shape, x.new_empty(x.shape)
    options = _options(table.shape[0], width)
    interpolate_pos_embed_kernel[(triton.cdiv(patches, 4), triton.cdiv(width, options["BLOCK"]))](
        x.contiguous(), table.contiguous(), out, grid_thw.contiguous(), grid_thw.shape[0], patches, width, **options
    )
    return out


def interpolate_pos_embed_backward(dout: Tensor, grid_thw: Tensor, cells: int) -> Tensor:
    checks.interpolate_pos_embed_backward(dout, grid_thw, cells)
    patches, width = dout.shape
    dtable, options = dout.new_empty((cells, width)), _options(cells, width)
    interpolate_pos_embed_backward_kernel[(cells, triton.cdiv(width, options["BLOCK"]))](
        dout.contiguous(), dtable, grid_thw.contiguous(), grid_thw.shape[0], patches, width, **options
    )
    return dtable


def _options(cells: int, width: int) -> dict[str, Any]:
    block = min(512, triton.next_power_of_2(max(width, 1)))
    return {"SIDE": math.isqrt(cells), "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}
