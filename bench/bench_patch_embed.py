"""patch_embed against transformers' Conv3d and F.linear on the flattened weight."""

import pytest
import torch
import torch.nn.functional as F

from bench.shapes import GRIDS, PATCH_VALUES, VISION_WIDTH, cases
from glm4v_ext import patch_embed


@pytest.mark.parametrize("still", [True, False], ids=["still", "video"])
@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_patch_embed(race, device, dtype, grid, still, backward):
    t, h, w = grid
    patches = torch.randn(t * h * w, 3, 2, 196, device=device)
    if still:
        patches[:, :, 1] = patches[:, :, 0]
    patches = patches.flatten(1).to(dtype)
    conv = torch.nn.Conv3d(3, VISION_WIDTH, (2, 14, 14), (2, 14, 14)).to(device, dtype)
    moved = patches.nbytes + conv.weight.nbytes + t * h * w * VISION_WIDTH * dtype.itemsize
    race(
        {
            "glm4v_ext": lambda: patch_embed(patches, conv.weight, conv.bias, still),
            "transformers": lambda: conv(patches.view(-1, 3, 2, 14, 14)).view(-1, VISION_WIDTH),
            "F.linear": lambda: F.linear(patches, conv.weight.flatten(1), conv.bias),
        },
        flops=(2 if backward else 1) * 2 * t * h * w * PATCH_VALUES * VISION_WIDTH // (1 + still),
        bytes=(2 if backward else 1) * moved,
        leaves=(conv.weight, conv.bias) if backward else (),
    )
