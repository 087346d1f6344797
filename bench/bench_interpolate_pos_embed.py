"""interpolate_pos_embed against transformers' module (grid_sample) and the definition."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionConfig, Glm4vVisionEmbeddings

from bench.shapes import GRIDS, VISION_HEADS, VISION_WIDTH, block_positions, cases
from glm4v_ext import interpolate_pos_embed, reference


def setting(device, dtype, grid):
    t, h, w = grid
    config = Glm4vVisionConfig(hidden_size=VISION_WIDTH, num_heads=VISION_HEADS, image_size=336, patch_size=14)
    module = Glm4vVisionEmbeddings(config).to(device, dtype)
    grid_thw = torch.tensor([grid], device=device)
    x = torch.randn(t * h * w, VISION_WIDTH, device=device).to(dtype)
    return module, x, grid_thw, block_positions(*grid).to(device).unbind(-1)


@pytest.mark.parametrize("grid", cases(GRIDS, quick=["336x336", "1344x1344"]))
def bench_interpolate_pos_embed(race, device, dtype, grid, backward):
    module, x, grid_thw, (rows, columns) = setting(device, dtype, grid)
    table, lengths = module.position_embedding.weight, grid_thw.prod(-1)
    race(
        {
            "glm4v_ext": lambda: interpolate_pos_embed(x, table, grid_thw),
            "transformers": lambda: module(x, lengths, grid_thw, rows, columns),
            "definition": lambda: reference.interpolate_pos_embed(x, table, grid_thw),
        },
        flops=(2 if backward else 1) * 16 * x.numel(),  # 4 taps along each axis
        bytes=(3 if backward else 2) * x.nbytes,
        leaves=(table,) if backward else (),
    )
