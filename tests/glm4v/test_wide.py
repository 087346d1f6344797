"""The released model's widths, 2 + 2 layers, against transformers on the same files; one model in memory at a time."""

import pytest
import torch
from transformers import Glm4vForConditionalGeneration

from examples.make_checkpoint import make_checkpoint
from glm4v import Glm4v
from tests.glm4v.prompts import Prompt, pack


@pytest.mark.slow
@torch.no_grad()
def test_real_widths(tmp_path):
    folder = make_checkpoint(tmp_path, size="wide")
    hf = Glm4vForConditionalGeneration.from_pretrained(folder).eval()
    prompts = [
        Prompt(hf.config, 1).add_text(40),
        Prompt(hf.config, 2).add_text(5).add_image(16, 12).add_text(20),
        Prompt(hf.config, 3).add_video(3, 6, 10).add_text(8),
        Prompt(hf.config, 4).add_image(4, 6).add_video(2, 4, 4).add_text(8),
    ]
    expected, batch = torch.cat([prompt.logits(hf) for prompt in prompts]), pack(prompts, hf)
    del hf
    logits = Glm4v.from_pretrained(folder)(**batch)
    assert ((logits - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
