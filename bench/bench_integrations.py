"""transformers' own model against the same one with the ops in it: same process, same parameters, real widths.

The tower has its 24 layers, the decoder 2 of its 40 with keys of 4096 tokens, a training step 2 and 2.
--quick: 4 layers of the tower, 1 of the decoder, 1 and 1.
Dims: P patches, S context length, C width.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, Glm4vForConditionalGeneration

from bench.shapes import PATCH_VALUES, TEXT_WIDTH, cases
from examples.make_checkpoint import make_checkpoint
from glm4v_ext.integrations import transformers as dropin

GRIDS = {"336x336": (1, 24, 24), "784x784": (1, 56, 56)}
CONTEXTS = {"S4096": 4096}
STEP = {"336x336": (1, 24, 24)}
TOWER, DECODER, BOTH = ((24, 1), (4, 1)), ((1, 2), (1, 1)), ((2, 2), (1, 1))  # layers, and those of --quick


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """``pair(dtype, layers)`` -> (enabled, stock), which share parameters; one pair stands in memory at a time."""
    made: dict[tuple[torch.dtype, tuple[int, int]], tuple[torch.nn.Module, torch.nn.Module]] = {}

    def get(dtype: torch.dtype, layers: tuple[tuple[int, int], tuple[int, int]]):
        key = (dtype, layers[request.config.option.quick])
        if key not in made:
            made.clear()
            gc.collect()
            folder = make_checkpoint(tmp_path_factory.mktemp("bench"), "wide", dtype=dtype, layers=key[1])
            stock = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
            ours = copy.deepcopy(stock, {id(p): p for p in stock.parameters()})
            dropin.enable(ours)
            made[key] = ours, stock
        return made[key]

    return get


def within(dtype: torch.dtype) -> float:
    return 5e-2 if dtype == torch.bfloat16 else 1e-4  # layers of rounding on both sides


def race_of(race, pair, run, dtype, **options):
    ours, stock = pair
    race({"glm4v_ext": lambda: run(ours), "transformers": lambda: run(stock)}, tolerance=within(dtype), **options)


@pytest.mark.parametrize("grid", cases(GRIDS, quick=GRIDS))
def bench_tower(race, pair, dtype, grid):
    _, h, w = grid
    frame = torch.randn(h * w, 3, 1, 14 * 14).expand(-1, -1, 2, -1)
    patches, thw = frame.reshape(h * w, PATCH_VALUES).to(dtype), torch.tensor([grid])
    race_of(race, pair(dtype, TOWER), lambda model: model.model.visual(patches, grid_thw=thw).pooler_output, dtype)


@pytest.mark.parametrize("context", cases(CONTEXTS))
def bench_decode_layers(race, pair, dtype, context):
    """A step of `generate`, the append to the cache included; each side has a cache, cut back before every step."""
    models = pair(dtype, DECODER)
    x, token = torch.randn(1, context, TEXT_WIDTH).to(dtype), torch.randn(1, 1, TEXT_WIDTH).to(dtype)
    caches = {id(model): DynamicCache() for model in models}

    def feed(model, x, start):
        cache = caches[id(model)]
        positions = torch.arange(start, start + x.shape[1]).expand(3, 1, -1)
        cache.crop(start)
        return model.model.language_model(
            inputs_embeds=x, position_ids=positions, past_key_values=cache
        ).last_hidden_state

    with torch.inference_mode():
        for model in models:
            feed(model, x, 0)
    race_of(race, models, lambda model: feed(model, token, context), dtype)


@pytest.mark.parametrize("grid", cases(STEP, quick=STEP))
def bench_training_step(race, pair, dtype, grid):
    """Forward and backward of 512 words and a picture, all parameters; no optimizer."""
    models = pair(dtype, BOTH)
    _, h, w = grid
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

    def step(model):
        model.zero_grad(set_to_none=True)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach(), model.model.visual.patch_embed.proj.weight.grad

    race_of(race, models, step, dtype, grad=True)
