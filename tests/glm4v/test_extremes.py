"""Pictures beyond what transformers' processor lets through: the tower itself has no such limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Glm4vForConditionalGeneration

from glm4v import Glm4v

ROOT = Path(__file__).parents[2]


@torch.no_grad()
@pytest.mark.parametrize("grid", [[1, 2, 600], [1, 600, 2]])  # a strip of 300 : 1, lying and standing
def test_strip(tiny_checkpoint, grid):
    patches, grid_thw = torch.randn(1200, 1176), torch.tensor([grid])
    hf = Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    expected = hf.model.visual(patches, grid_thw=grid_thw).pooler_output
    found = Glm4v.from_pretrained(tiny_checkpoint).visual(patches, grid_thw)
    assert ((found - expected).abs().max() / expected.abs().max()) <= 1e-4


TOWER = """
import sys, torch
from glm4v.config import VisionConfig
from glm4v.vision import VisionTower

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

h, w = map(int, sys.argv[1:])
torch.manual_seed(0)
config = VisionConfig(depth=1, hidden_size=64, num_heads=1, out_hidden_size=128, intermediate_size=128)
tower = VisionTower(config).to(torch.bfloat16)
patches = torch.randn(h * w, 1176, dtype=torch.bfloat16)
before = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the peak so far, of imports and temporaries, is forgotten
with torch.inference_mode():
    out = tower(patches, torch.tensor([[1, h, w]]))
assert out.shape == (h * w // 4, 128) and out.isfinite().all()
print(kilobytes("VmHWM") - before, kilobytes("VmHWM"))
"""


def kilobytes(h, w):
    """What the tower adds to the peak memory of a fresh process, and that peak."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    command = [sys.executable, "-c", TOWER, str(h), str(w)]
    return map(int, subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow
def test_an_8k_image_takes_memory_in_proportion():
    quarter, _ = kilobytes(154, 274)
    whole, peak = kilobytes(308, 548)  # 4320 x 7680 pixels: 168 784 patches in one sequence
    assert whole <= 5 * quarter
    assert peak < 4 << 20
