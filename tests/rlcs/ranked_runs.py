"""Small runs on several ranks: settings, runs as jobs of a world, and what such a run has left."""

import dataclasses
import shutil
import zlib

import pytest
import torch
from small_runs import sft_config, train_config

from glm4v import Glm4v
from rlcs import checkpoint, evaluate
from rlcs.config import EvalSettings, ModelSettings, ParallelSettings, RunSettings
from rlcs.logs import read_metrics
from rlcs.optimizer import OptimizerSettings
from rlcs.rewards import Verdict
from rlcs.supervised import sft
from rlcs.trainer import train

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


def by_hash(domain, text, truth, question=None):
    """Half of the answers are right, whoever judges them."""
    return Verdict("score", 1.0) if zlib.crc32(text.encode()) % 2 else Verdict("wrong")


def run_job(config, *, folder):
    evaluate.verify, kept = by_hash, evaluate.verify
    try:
        (sft if hasattr(config, "data") else train)(config, lambda line: None)
    finally:
        evaluate.verify = kept


def expect_close(found, expected):
    """Metrics of two runs, up to the rounding of sums."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
            else:
                assert one[name] == value, name


def cold_config(demo, out, steps=3, dtype=None, lora_rank=0, **changes):
    return sft_config(
        demo,
        out,
        model=ModelSettings(path=demo / "model", dtype=dtype, lora_rank=lora_rank),
        run=RunSettings(out=out, steps=steps, save_every=1, keep=9),
        optimizer=dataclasses.replace(STEP, decay="constant"),
        parallel=ParallelSettings(timeout_s=60.0),
        tokens=300,
        **changes,
    )


def cut_to(source, target, step):
    """A run as a crash after ``step`` has left it."""
    shutil.copytree(source, target)
    for saved in checkpoint.every(target / "checkpoints"):
        if saved.step > step:
            shutil.rmtree(saved.folder)
