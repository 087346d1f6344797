"""Small runs on several ranks: settings, and what such a run has left."""

import dataclasses

import torch
from small_runs import train_config

from glm4v import Glm4v
from rlcs import checkpoint
from rlcs.config import EvalSettings, ParallelSettings, RunSettings
from rlcs.logs import read_metrics
from rlcs.optimizer import OptimizerSettings

STEP = OptimizerSettings(lr=1e-4, clip_norm=0.5, warmup=0.0)


def rows_of(folder):
    """Metrics without times and what counts micro-steps of one rank."""
    return [
        {k: v for k, v in row.items() if "second" not in k and "per_s" not in k and k != "micro_steps"}
        for row in read_metrics(folder)
    ]


def tensors_of(folder):
    saved = checkpoint.latest(folder / "checkpoints")
    weights = {name: x.detach() for name, x in Glm4v.from_pretrained(saved.folder).named_parameters()}
    return weights | saved.tensors()


def expect_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def rl_config(demo, out, steps=2, **changes):
    return train_config(
        demo,
        out,
        run=RunSettings(out=out, steps=steps, save_every=1, keep=9),
        optimizer=dataclasses.replace(STEP, decay="constant"),
        parallel=ParallelSettings(timeout_s=60.0),
        eval=EvalSettings(demo / "test.jsonl", limit=1),
        tokens=300,
        **changes,
    )
