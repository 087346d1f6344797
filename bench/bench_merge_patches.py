"""merge_patches against transformers' Conv2d and F.linear on a weight permuted beforehand."""

import pytest
import torch
import torch.nn.functional as F

from bench.shapes import GRIDS, MERGED_WIDTH, VISION_WIDTH, cases
from glm4v_ext import merge_patches


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_merge_patches(race, device, dtype, grid, order):
    t, h, w = grid
    x = torch.randn(t * h * w, VISION_WIDTH, device=device).to(dtype)
    conv = torch.nn.Conv2d(VISION_WIDTH, MERGED_WIDTH, 2, 2).to(device, dtype)
    weight = conv.weight.to(memory_format=getattr(torch, f"{order}_format" if order == "contiguous" else order))
    permuted = conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous()

    def transformers():
        return conv(x.view(-1, 2, 2, VISION_WIDTH).permute(0, 3, 1, 2)).view(-1, MERGED_WIDTH)

    race(
        {
            "glm4v_ext": lambda: merge_patches(x, weight, conv.bias),
            "transformers": transformers,
            "F.linear": lambda: F.linear(x.view(-1, 4 * VISION_WIDTH), permuted, conv.bias),
        },
        flops=2 * t * h * w * VISION_WIDTH * MERGED_WIDTH,
        bytes=x.nbytes + weight.nbytes + t * h * w // 4 * MERGED_WIDTH * dtype.itemsize,
    )


@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_merge_patches_backward(race, device, dtype, grid):
    t, h, w = grid
    x = torch.randn(t * h * w, VISION_WIDTH, device=device).to(dtype)
    conv = torch.nn.Conv2d(VISION_WIDTH, MERGED_WIDTH, 2, 2).to(device, dtype)
    race(
        {
            "glm4v_ext": lambda: merge_patches(x, conv.weight, conv.bias),
            "transformers": lambda: conv(x.view(-1, 2, 2, VISION_WIDTH).permute(0, 3, 1, 2)).view(-1, MERGED_WIDTH),
        },
        flops=6 * t * h * w * VISION_WIDTH * MERGED_WIDTH,
        bytes=3 * (x.nbytes + conv.weight.nbytes + t * h * w // 4 * MERGED_WIDTH * dtype.itemsize),
        leaves=(x, conv.weight, conv.bias),
    )
