"""rms_norm against transformers' module, the definition and the definition under torch.compile."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm

from bench.peers import compiled
from bench.shapes import GRIDS, VISION_WIDTH, cases
from glm4v_ext import reference, rms_norm


@pytest.mark.parametrize("grid", cases(GRIDS))
def bench_rms_norm(race, device, dtype, grid):
    t, h, w = grid
    x = torch.randn(t * h * w, VISION_WIDTH, device=device).to(dtype)
    module = Glm4vRMSNorm(VISION_WIDTH, eps=1e-5).to(device, dtype)
    fast = compiled(reference.rms_norm)
    race(
        {
            "glm4v_ext": lambda: rms_norm(x, module.weight, 1e-5),
            "transformers": lambda: module(x),
            "definition": lambda: reference.rms_norm(x, module.weight, 1e-5),
            "compiled": lambda: fast(x, module.weight, 1e-5),
        },
        bytes=2 * x.nbytes,
        slow=("compiled",),
    )
