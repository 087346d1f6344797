"""rms_norm_add against the two lines of transformers' decoder layer and torch.compile."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm

from bench.peers import compiled
from bench.shapes import PROMPTS, TEXT_WIDTH, cases
from glm4v_ext import reference, rms_norm_add


@pytest.mark.parametrize("tokens", cases({"S1": 1, **PROMPTS}, quick=["S1", "S1024", "S4096"]))
def bench_rms_norm_add(race, device, dtype, tokens):
    x, residual = torch.randn(2, tokens, TEXT_WIDTH, device=device).to(dtype)
    module = Glm4vRMSNorm(TEXT_WIDTH, eps=1e-5).to(device, dtype)
    fast = compiled(reference.rms_norm_add)
    race(
        {
            "glm4v_ext": lambda: rms_norm_add(x, residual, module.weight, 1e-5),
            "transformers": lambda: residual + module(x),
            "compiled": lambda: fast(x, residual, module.weight, 1e-5),
        },
        bytes=3 * x.nbytes,
        slow=("compiled",),
    )
