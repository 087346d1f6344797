"""swiglu against the lines of transformers' text MLP, torch.compile, and Liger on a GPU, at the model's widths."""

import pytest
import torch
import torch.nn.functional as F

from bench.peers import compiled, gpu_package
from bench.shapes import TEXT_INNER, VISION_INNER, cases
from glm4v_ext import reference, swiglu

SHAPES = {
    "S1024": (1024, TEXT_INNER),
    "S1": (1, TEXT_INNER),
    "336x336": (576, VISION_INNER),
    "1344x1344": (9216, VISION_INNER),
}


@pytest.mark.parametrize("shape", cases(SHAPES, quick=["S1024", "S1"]))
def bench_swiglu(race, device, dtype, shape, backward):
    rows, inner = shape
    gate_up = torch.randn(rows, 2 * inner, device=device).to(dtype)
    fast = compiled(reference.swiglu)

    def transformers():
        gate, up = gate_up.chunk(2, dim=-1)
        return up * F.silu(gate)

    peers = {"glm4v_ext": lambda: swiglu(gate_up), "transformers": transformers, "compiled": lambda: fast(gate_up)}
    if liger := gpu_package("liger_kernel.transformers.functional", device):
        peers["liger-kernel"] = lambda: liger.liger_swiglu(*gate_up.chunk(2, dim=-1))
    race(
        peers,
        flops=(15 if backward else 5) * rows * inner,
        bytes=(8 if backward else 3) * gate_up.nbytes // 2,
        leaves=(gate_up,) if backward else (),
        slow=("compiled",),
    )
