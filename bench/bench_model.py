"""Whole parts of the model against transformers on the same random weights, real widths.

The tower has its 24 layers; the decoder has 2 and no head, since its layers are alike. --quick times 4 layers of the
tower and 1 of the decoder. Memory is the peak resident size of a process that loads the checkpoint and answers a prompt
with a picture.
Dims: P patches, S context length, C width.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, Glm4vForConditionalGeneration

from bench.peers import AGREEMENT_OF_LAYERS
from bench.shapes import PATCH_VALUES, TEXT_WIDTH, TOWER_GRIDS, cases
from examples.make_checkpoint import make_checkpoint
from glm4v import Glm4v, KVCache

CONTEXTS = {"S4096": 4096, "S8192": 8192}
MOST_ON_CPU = {"patches": 56 * 56, "tokens": 4096}
TOWER, DECODER = (24, 1), (1, 2)
QUICK_TOWER, QUICK_DECODER = (4, 1), (1, 1)


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """``pair(dtype, layers, quick_layers)`` -> (ours, transformers'); one pair stands in memory at a time."""
    device = request.config.option.device
    made: dict[tuple[torch.dtype, tuple[int, int]], tuple[Glm4v, Glm4vForConditionalGeneration]] = {}

    def get(dtype: torch.dtype, layers: tuple[int, int], quick_layers: tuple[int, int]):
        layers = quick_layers if request.config.option.quick else layers
        key = (dtype, layers)
        if key not in made:
            made.clear()
            gc.collect()
            folder = make_checkpoint(tmp_path_factory.mktemp("bench"), "wide", dtype=dtype, layers=layers)
            theirs = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
            made[key] = Glm4v.from_pretrained(folder, device=device), theirs
        return made[key]

    return get


@pytest.mark.parametrize("grid", cases(TOWER_GRIDS, quick=TOWER_GRIDS))
def bench_tower(race, pair, device, dtype, grid):
    _, h, w = grid
    if device == "cpu" and h * w > MOST_ON_CPU["patches"]:
        pytest.skip("for a GPU")
    ours, theirs = pair(dtype, TOWER, QUICK_TOWER)
    frame = torch.randn(h * w, 3, 1, 14 * 14, device=device).expand(-1, -1, 2, -1)
    patches, thw = frame.reshape(h * w, PATCH_VALUES).to(dtype), torch.tensor([grid], device=device)
    race(
        {
            "glm4v_ext": lambda: ours.visual(patches, thw),
            "transformers": lambda: theirs.model.visual(patches, grid_thw=thw).pooler_output,
        },
        tolerance=AGREEMENT_OF_LAYERS[dtype],
    )


def prompt(context, device, dtype):
    """Embedded tokens, their positions and where the sequence starts and ends."""
    x = torch.randn(context, TEXT_WIDTH, device=device).to(dtype)
    positions = torch.arange(context, device=device).expand(3, -1)
    return x, positions, torch.tensor([0, context], dtype=torch.int32, device=device)


@pytest.mark.parametrize("context", cases(CONTEXTS))
def bench_prefill_layers(race, pair, device, dtype, context):
    if device == "cpu" and context > MOST_ON_CPU["tokens"]:
        pytest.skip("for a GPU")
    ours, theirs = pair(dtype, DECODER, QUICK_DECODER)
    x, positions, starts = prompt(context, device, dtype)
    race(
        {
            "glm4v_ext": lambda: ours.language_model(x, positions, starts, context),
            "transformers": lambda: theirs.model.language_model(
                inputs_embeds=x[None], position_ids=positions[:, None], use_cache=False
            ).last_hidden_state[0],
        },
        tolerance=AGREEMENT_OF_LAYERS[dtype],
    )


@pytest.mark.parametrize("context", cases(CONTEXTS))
def bench_decode_layers(race, pair, device, dtype, context):
    if device == "cpu" and context > MOST_ON_CPU["tokens"]:
        pytest.skip("for a GPU")
    ours, theirs = pair(dtype, DECODER, QUICK_DECODER)
    x, positions, starts = prompt(context, device, dtype)
    cache, their_cache = KVCache(ours.config.text_config, 1, context + 1, dtype, device), DynamicCache()
    with torch.inference_mode():
        ours.language_model(x, positions, starts, context, cache)
        theirs.model.language_model(inputs_embeds=x[None], position_ids=positions[:, None], past_key_values=their_cache)
    token = torch.randn(1, TEXT_WIDTH, device=device).to(dtype)
    position = torch.full((3, 1), context, device=device)
    step = cache.replayed(lambda x, position_ids: ours.language_model.decode(x, position_ids, cache))

    def decode():
        cache.seqlens.fill_(context)  # the same step again
        return step(token, position)

    def their_decode():
        out = theirs.model.language_model(
            inputs_embeds=token[None], position_ids=position[:, None], past_key_values=their_cache
        )
        return out.last_hidden_state[0]

    race({"glm4v_ext": decode, "transformers": their_decode}, tolerance=AGREEMENT_OF_LAYERS[dtype])


ANSWER = """
import resource, sys, torch
from sklearn.datasets import load_sample_image
from glm4v import Glm4v, Processor
folder = sys.argv[1]
batch = Processor.from_pretrained(folder)([{"role": "user", "content": [
    {"type": "image", "image": load_sample_image("china.jpg")}, {"type": "text", "text": "What is this?"}]}])
"""
OURS = (
    ANSWER
    + """
model = Glm4v.from_pretrained(folder)
model.generate(batch, max_new_tokens=8, temperature=0)
"""
)
THEIRS = (
    ANSWER
    + """
from transformers import Glm4vForConditionalGeneration
model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype="auto")
ids = batch.input_ids[None]
picture = (batch.input_ids == model.config.image_token_id).long()[None]
model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=batch.pixel_values,
               image_grid_thw=batch.image_grid_thw, mm_token_type_ids=picture, max_new_tokens=8, do_sample=False)
"""
)
PEAK = "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def bench_peak_memory(dtype, tmp_path, record_property):
    """Peak resident bytes of both; no timing."""
    folder = make_checkpoint(tmp_path, "wide", dtype=dtype, layers=(2, 2))
    gc.collect()
    peaks = {}
    for name, program in (("glm4v_ext", OURS), ("transformers", THEIRS)):
        command = [sys.executable, "-c", program + PEAK, str(folder)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.split()[-1])
        record_property(f"{name}_peak_bytes", peaks[name])
    print({name: f"{peak / 2**30:.2f} GiB" for name, peak in peaks.items()})
    assert peaks["glm4v_ext"] <= peaks["transformers"]
