"""interpolate_pos_embed against transformers' module (grid_sample) and the definition; the gradient beside them."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionConfig, Glm4vVisionEmbeddings

from bench.shapes import GRIDS, VISION_HEADS, VISION_WIDTH, cases
from glm4v_ext import interpolate_pos_embed, reference


def setting(device, dtype, grid):
    t, h, w = grid
    config = Glm4vVisionConfig(hidden_size=VISION_WIDTH, num_heads=VISION_HEADS, image_size=336, patch_size=14)
    module = Glm4vVisionEmbeddings(config).to(device, dtype)
    grid_thw = torch.tensor([grid], device=device)
    cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
    cells = cells.view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2).repeat(t, 1).to(device)
    x = torch.randn(t * h * w, VISION_WIDTH, device=device).to(dtype)
    return module, x, grid_thw, cells.unbind(-1)


@pytest.mark.parametrize("grid", cases(GRIDS, quick=["336x336", "1344x1344"]))
def bench_forward(race, device, dtype, grid):
    module, x, grid_thw, (rows, columns) = setting(device, dtype, grid)
    table, lengths = module.position_embedding.weight, grid_thw.prod(-1)
    race(
        {
            "glm4v_ext": lambda: interpolate_pos_embed(x, table, grid_thw),
            "transformers": lambda: module(x, lengths, grid_thw, rows, columns),
            "definition": lambda: reference.interpolate_pos_embed(x, table, grid_thw),
        },
        bytes=2 * x.nbytes,
    )


@pytest.mark.full
@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_forward_backward(race, device, dtype, grid):
    module, x, grid_thw, (rows, columns) = setting(device, dtype, grid)
    table, lengths, dout = module.position_embedding.weight, grid_thw.prod(-1), torch.randn_like(x)

    def gradient(function):
        return lambda: torch.autograd.grad(function(), table, dout)

    race(
        {
            "glm4v_ext": gradient(lambda: interpolate_pos_embed(x, table, grid_thw)),
            "transformers": gradient(lambda: module(x, lengths, grid_thw, rows, columns)),
            "definition": gradient(lambda: reference.interpolate_pos_embed(x, table, grid_thw)),
        },
        bytes=3 * x.nbytes,
        grad=True,
    )
