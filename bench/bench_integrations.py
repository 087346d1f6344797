"""transformers' own model against the same one with the ops in it: same process, same parameters, real widths.

The tower has its 24 layers, `generate` 4 of the decoder's 40 and a context of 4096 tokens, a training step 2 and 2.
--quick: 4 layers of the tower, 1 of the decoder, 1 and 1. The vocabulary has the share of its 151,552 rows that the
decoder has of its 40 layers.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, Glm4vForConditionalGeneration

from bench.peers import AGREEMENT_OF_LAYERS
from bench.shapes import PATCH_VALUES, TOWER_GRIDS, cases
from examples.make_checkpoint import make_checkpoint
from glm4v_ext.integrations import transformers as dropin

CONTEXTS = {"S4096": 4096}
STEP = {"336x336": (1, 24, 24), "1344x1344": (1, 96, 96)}
MOST_ON_CPU = 56 * 56  # patches
NEW_TOKENS = 16
TOWER, DECODER, BOTH = ((24, 1), (4, 1)), ((1, 4), (1, 1)), ((2, 2), (1, 1))  # layers, and those of --quick


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """``pair(dtype, layers)`` -> (enabled, stock), which share parameters; one pair stands in memory at a time."""
    device = request.config.option.device
    made: dict[tuple[torch.dtype, tuple[int, int]], tuple[torch.nn.Module, torch.nn.Module]] = {}

    def get(dtype: torch.dtype, layers: tuple[tuple[int, int], tuple[int, int]]):
        key = (dtype, layers[request.config.option.quick])
        if key not in made:
            made.clear()
            gc.collect()
            folder = make_checkpoint(tmp_path_factory.mktemp("bench"), "wide", dtype=dtype, layers=key[1])
            stock = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
            stock.resize_token_embeddings(151_552 * key[1][1] // 40, mean_resizing=False)
            ours = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})
            dropin.enable(ours)
            made[key] = ours, stock
        return made[key]

    return get


def race_of(race, pair, run, dtype, **options):
    ours, stock = pair
    peers = {"glm4v_ext": lambda: run(ours), "transformers": lambda: run(stock)}
    race(peers, tolerance=AGREEMENT_OF_LAYERS[dtype], **options)


@pytest.mark.parametrize("grid", cases(TOWER_GRIDS, quick=TOWER_GRIDS))
def bench_tower(race, pair, device, dtype, grid):
    _, h, w = grid
    if device == "cpu" and h * w > MOST_ON_CPU:
        pytest.skip("for a GPU")
    frame = torch.randn(h * w, 3, 1, 14 * 14, device=device).expand(-1, -1, 2, -1)
    patches, thw = frame.reshape(h * w, PATCH_VALUES).to(dtype), torch.tensor([grid], device=device)
    race_of(race, pair(dtype, TOWER), lambda model: model.model.visual(patches, grid_thw=thw).pooler_output, dtype)


@pytest.mark.parametrize("context", cases(CONTEXTS))
def bench_generate(race, pair, device, dtype, context):
    """16 tokens behind a context that is in the cache, which is cut back to it before each call."""
    models = pair(dtype, DECODER)
    ids = torch.randint(10, 200, (1, context + 1), device=device)
    caches = {id(model): DynamicCache() for model in models}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def generate(model):
        cache = caches[id(model)]
        cache.crop(context - cache.get_seq_length())
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
        return found.logits[0]  # two models' greedy tokens part where two logits are as good as equal

    with torch.inference_mode():
        for model in models:
            model.model(input_ids=ids[:, :context], past_key_values=caches[id(model)])
    race_of(race, models, generate, dtype)


@pytest.mark.parametrize("grid", cases(STEP, quick=STEP))
def bench_training_step(race, pair, device, dtype, grid):
    """Forward and backward of 512 words and a picture, all parameters; no optimizer."""
    _, h, w = grid
    if device == "cpu" and h * w > MOST_ON_CPU:
        pytest.skip("for a GPU")
    models = pair(dtype, BOTH)
    picture = models[0].config.image_token_id
    ids = torch.cat(
        [torch.randint(10, 200, (1, 256)), torch.full((1, h * w // 4), picture), torch.randint(10, 200, (1, 256))], 1
    )
    inputs = {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == picture, -100),
        "mm_token_type_ids": (ids == picture).int(),
        "pixel_values": torch.randn(h * w, PATCH_VALUES).to(dtype),
        "image_grid_thw": torch.tensor([grid]),
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}

    def step(model):
        model.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach(), model.model.visual.patch_embed.proj.weight.grad

    race_of(race, models, step, dtype, grad=True)
