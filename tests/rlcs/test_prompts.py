"""Prompts that are kept: as they were made, under one limit, each under an id of its own."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import answer
from torch import Tensor

from glm4v import Processor
from rlcs.batches import inputs
from rlcs.data import read_tasks
from rlcs.packing import batch_of
from rlcs.prompts import Prompts, make
from rlcs.types import Sample


@pytest.fixture(scope="module")
def processor(demo):
    return Processor.from_pretrained(demo / "model")


def same(a, b):
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def kept(prompts):
    return list(prompts._shelf.kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_was_made(dtype, demo):
    processor = Processor.from_pretrained(demo / "model", dtype=dtype)
    prompts, tasks = Prompts(processor), read_tasks(demo / "train.jsonl")[:12]
    for task in tasks:
        made = make(task.messages, processor)
        assert same(prompts(task.id, task.messages), made) and same(prompts(task.id, task.messages), made)
    assert {prompt.pixel_values is None for prompt in kept(prompts)} == {True, False}  # videos are among them


@pytest.mark.parametrize("before", [False, True])
def test_an_outline_has_the_sizes_and_reads_the_rest_when_it_is_asked(before, processor, demo, monkeypatch):
    tasks = read_tasks(demo / "train.jsonl")[:12]
    tasks.append(dataclasses.replace(tasks[0], id="text", messages=[{"role": "user", "content": "Why?"}]))
    expected = [make(task.messages, processor) for task in tasks]
    prompts = Prompts(processor)
    if before:
        for task in tasks:
            prompts(task.id, task.messages)
    with monkeypatch.context() as closed:
        closed.setattr("glm4v.processor.patchify", None)  # nothing is decoded
        outlines = [prompts.outline(task.id, task.messages) for task in tasks]
    for outline, whole in zip(outlines, expected, strict=True):
        bare = dataclasses.replace(whole, pixel_values=None, pixel_values_videos=None)
        assert same(dataclasses.replace(outline, read=None), bare) and outline.patches == whole.patches
        assert same(outline.whole(), whole) and same(whole.whole(), whole)
    samples = [Sample.of_rollout(p.input_ids.numpy(), answer("a", None), 1.0, i) for i, p in enumerate(expected)]
    lying = [dataclasses.replace(p, position_ids=p.position_ids[[0, 2, 1]]) if p.read else p for p in outlines]
    read, known = (inputs(batch_of(samples, len(samples)), each).arguments for each in (lying, expected))
    assert all(torch.equal(read[name], x) for name, x in known.items() if x is not None)


def test_an_outline_holds_no_pixels(processor):
    noise = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    messages = [[{"role": "user", "content": [{"type": "image", "image": one}]}] for one in noise]
    prompts = Prompts(processor, 1)
    expected = prompts("a", messages[0])
    outline, pixels = prompts.outline("a", messages[0]), weakref.ref(kept(prompts)[0].pixel_values)
    assert pixels() is not None
    prompts("b", messages[1])
    gc.collect()
    assert pixels() is None and same(outline.whole(), expected)


def test_a_picture_that_has_changed_since_the_outline_was_made_is_an_error(processor, tmp_path):
    def draw(side):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "a.png")

    draw(56)
    messages = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "a.png")}]}]
    outline = Prompts(processor).outline("a", messages)
    draw(84)
    with pytest.raises(ValueError, match="data: task 'a': pictures must stay as they were when the task was drawn"):
        outline.whole()


def test_a_picture_is_kept_once(processor):
    noise = np.random.default_rng(0).integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    parts = [{"type": "image", "image": noise[0]}, {"type": "image", "image": noise[1]}]
    messages = [{"role": "user", "content": parts}]
    prompts = Prompts(processor)
    first, again = prompts("a", messages), prompts("a", messages)
    assert same(first, again) and kept(prompts)[0].pixel_values.nbytes * 2 == first.pixel_values.nbytes


def test_training_and_held_out_prompts_have_one_limit(processor):
    messages = [[{"role": "user", "content": f"{i} " * 9}] for i in range(9)]
    size = make(messages[0], processor).nbytes
    training = Prompts(processor, 4 * size)
    held_out = training.apart()
    for i in range(9):
        a, b = training(f"{i}", messages[i]), held_out(f"{i}", messages[-1 - i])
        assert same(a, make(messages[i], processor)) and same(b, make(messages[-1 - i], processor))
        assert sum(prompt.nbytes for prompt in kept(training)) == training._shelf.bytes <= 4 * size
    assert len(kept(training)) == 4 and kept(training) == kept(held_out)
    one = Prompts(processor, 1)
    one("a", messages[0])
    one("b", messages[1])
    assert len(kept(one)) == 1
