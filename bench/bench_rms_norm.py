"""rms_norm against transformers' module, the definition, the definition under torch.compile, and Liger on a GPU."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm

from bench.peers import compiled, gpu_package
from bench.shapes import GRIDS, VISION_WIDTH, cases
from glm4v_ext import reference, rms_norm


@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_rms_norm(race, device, dtype, grid, backward):
    t, h, w = grid
    x = torch.randn(t * h * w, VISION_WIDTH, device=device).to(dtype)
    module = Glm4vRMSNorm(VISION_WIDTH, eps=1e-5).to(device, dtype)
    fast = compiled(reference.rms_norm)
    peers = {
        "glm4v_ext": lambda: rms_norm(x, module.weight, 1e-5),
        "transformers": lambda: module(x),
        "definition": lambda: reference.rms_norm(x, module.weight, 1e-5),
        "compiled": lambda: fast(x, module.weight, 1e-5),
    }
    if liger := gpu_package("liger_kernel.transformers.functional", device):
        peers["liger-kernel"] = lambda: liger.liger_rms_norm(x, module.weight, 1e-5, in_place=False)
    race(
        peers,
        flops=(12 if backward else 4) * x.numel(),
        bytes=(5 if backward else 2) * x.nbytes,
        leaves=(x, module.weight) if backward else (),
        slow=("compiled",),
    )
