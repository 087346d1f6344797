"""rms_norm_add against the two lines of transformers' decoder layer, torch.compile, and Liger on a GPU."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import Glm4vRMSNorm

from bench.peers import compiled, gpu_package
from bench.shapes import PROMPTS, TEXT_WIDTH, cases
from glm4v_ext import reference, rms_norm_add


@pytest.mark.parametrize("tokens", cases({"S1": 1, **PROMPTS}, quick=["S1", "S1024", "S4096"]))
def bench_rms_norm_add(race, device, dtype, tokens, backward):
    x, residual = torch.randn(2, tokens, TEXT_WIDTH, device=device).to(dtype)
    module = Glm4vRMSNorm(TEXT_WIDTH, eps=1e-5).to(device, dtype)
    fast = compiled(reference.rms_norm_add)
    peers = {
        "glm4v_ext": lambda: rms_norm_add(x, residual, module.weight, 1e-5),
        "transformers": lambda: residual + module(x),
        "compiled": lambda: fast(x, residual, module.weight, 1e-5),
    }
    if liger := gpu_package("liger_kernel.transformers.functional", device):
        peers["liger-kernel"] = lambda: residual + liger.liger_rms_norm(x, module.weight, 1e-5, in_place=False)
    race(
        peers,
        flops=(15 if backward else 5) * x.numel(),
        bytes=(6 if backward else 3) * x.nbytes,
        leaves=(x, residual, module.weight) if backward else (),
        slow=("compiled",),
    )
