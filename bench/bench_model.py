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
from itertools import cycle

import pytest
import torch
from sklearn.datasets import load_sample_image
from transformers import DynamicCache, Glm4vForConditionalGeneration

from bench.peers import AGREEMENT_OF_LAYERS
from bench.shapes import PATCH_VALUES, TEXT_WIDTH, TOWER_GRIDS, cases
from examples.make_checkpoint import make_checkpoint
from glm4v import Glm4v, KVCache, Processor, PromptCache

CONTEXTS = {"S4096": 4096, "S8192": 8192}
MOST_ON_CPU = {"patches": 56 * 56, "tokens": 4096}
TOWER, DECODER, BOTH = (24, 1), (1, 2), (24, 2)
QUICK_TOWER, QUICK_DECODER, QUICK_BOTH = (4, 1), (1, 1), (4, 1)


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


def bench_next_question(race, pair, device, dtype):
    """To the first token's logits of another question about a photograph; ours keeps the picture's keys and values."""
    ours, theirs = pair(dtype, BOTH, QUICK_BOTH)
    photo = {"type": "image", "image": load_sample_image("china.jpg")}
    processor = Processor.from_pretrained(ours.folder)

    def question(text):
        return processor([{"role": "user", "content": [photo, {"type": "text", "text": text}]}]).to(device)

    first, *others = (question(text) for text in ("What is this?", "Where may that be?", "When was it built?"))
    picture = (first.input_ids == ours.config.image_token_id).sum()
    print(f"{len(first.input_ids)} tokens, {picture} of the picture, {len(first.pixel_values)} patches")
    cache, capacity = PromptCache(), 2 * len(first.input_ids)
    cache.prefill(ours, first, capacity)

    def without(batch):
        return ours.prefill(batch, ours.new_cache(1, capacity))

    def transformers(batch):
        ids = batch.input_ids[None]
        types = (ids == ours.config.image_token_id).long()
        pictures = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        return theirs(input_ids=ids, mm_token_type_ids=types, logits_to_keep=1, **pictures).logits[0]

    ways = {
        "glm4v_ext": lambda batch: cache.prefill(ours, batch, capacity)[1],
        "no cache": without,
        "transformers": transformers,
    }
    turns = {name: (way, cycle(others)) for name, way in ways.items()}  # the same one twice would be one token
    peers = {name: lambda way=way, batches=batches: way(next(batches)) for name, (way, batches) in turns.items()}
    race(peers, tolerance=AGREEMENT_OF_LAYERS[dtype])


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
