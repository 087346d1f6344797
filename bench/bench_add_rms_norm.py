"""add_rms_norm against the two lines of transformers' vision block, torch.compile, and Liger on a GPU."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm

from bench.peers import compiled, gpu_package
from bench.shapes import GRIDS, VISION_WIDTH, cases
from glm4v_ext import add_rms_norm, reference


@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_add_rms_norm(race, device, dtype, grid, backward):
    t, h, w = grid
    x, residual = torch.randn(2, t * h * w, VISION_WIDTH, device=device).to(dtype)
    module = Glm4vRMSNorm(VISION_WIDTH, eps=1e-5).to(device, dtype)
    fast = compiled(reference.add_rms_norm)

    def transformers():
        total = residual + x
        return module(total), total

    peers = {
        "glm4v_ext": lambda: add_rms_norm(x, residual, module.weight, 1e-5),
        "transformers": transformers,
        "compiled": lambda: fast(x, residual, module.weight, 1e-5),
    }
    if liger := gpu_package("liger_kernel.transformers.functional", device):
        peers["liger-kernel"] = lambda: liger.liger_fused_add_rms_norm(x, residual, module.weight, 1e-5, in_place=False)
    race(
        peers,
        flops=(15 if backward else 5) * x.numel(),
        bytes=(8 if backward else 4) * x.nbytes,
        leaves=(x, residual, module.weight) if backward else (),
        slow=("compiled",),
    )
