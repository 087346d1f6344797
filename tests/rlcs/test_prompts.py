"""Prompts that are kept: as they were made, under one limit, each under an id of its own."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from glm4v import Processor
from rlcs.data import read_tasks
from rlcs.prompts import Prompts, make


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
