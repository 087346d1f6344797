"""Too little memory and weights that are not finite: one line, exit code 1, and what was saved stays."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import sft_config, train_config

from rlcs import checkpoint
from rlcs.cli import main
from rlcs.config import ModelSettings, plain
from rlcs.failures import told
from rlcs.learner import Learner
from rlcs.logs import read_metrics
from rlcs.supervised import sft

TOO_MUCH = {
    "torch": lambda: torch.empty(1 << 50),
    "numpy": lambda: np.empty(1 << 50),
    "python": lambda: bytearray(1 << 50),
}


@pytest.fixture
def failed(capfd, tmp_path):
    """Runs a command that must end with exit code 1 and one line behind its progress, which it gives back."""

    def run(command, config=None, *arguments):
        if config is not None:
            file = tmp_path / "config.yaml"
            file.write_text(yaml.safe_dump(plain(config)))
            arguments = ("--config", str(file), *arguments)
        with pytest.raises(SystemExit) as end:
            main([command, *map(str, arguments)])
        said = capfd.readouterr().err
        assert end.value.code == 1 and "Traceback" not in said
        return said.strip().splitlines()[-1]

    return run


def in_the_second_step(monkeypatch, what):
    update, steps = Learner.update, []

    def broken(*arguments, **named):
        steps.append(1)
        return what() if len(steps) > 1 else update(*arguments, **named)

    monkeypatch.setattr(Learner, "update", broken)


@pytest.mark.parametrize("where", TOO_MUCH)
def test_out_of_memory_in_an_update(where, demo, tmp_path, monkeypatch, failed):
    in_the_second_step(monkeypatch, TOO_MUCH[where])
    said = failed("sft", sft_config(demo, tmp_path / "run"))
    assert said.startswith("rlcs: out of memory: ") and "lower --tokens (of a micro-step), --rollout.rows" in said
    assert said.endswith("what was saved is kept, and the same command goes on from there")
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").step == 1 == read_metrics(tmp_path / "run")[-1]["step"]


def test_out_of_memory_in_a_rollout(demo, tmp_path, monkeypatch, failed):
    monkeypatch.setattr("rlcs.rollout.Pages", lambda *_: TOO_MUCH["torch"]())
    assert "--rollout.cache-tokens" in failed("train", train_config(demo, tmp_path / "run"))
    said = failed("eval", None, "--model", demo / "model", "--tasks", demo / "test.jsonl")
    assert said.endswith("lower --rollout.rows or --rollout.cache-tokens (answers at once)")


def test_out_of_memory_in_taking_up(demo, tmp_path, monkeypatch, failed):
    config = sft_config(demo, tmp_path / "run")
    sft(config)
    monkeypatch.setattr(checkpoint, "safe_open", lambda *_, **__: TOO_MUCH["torch"]())
    assert failed("sft", config).startswith("rlcs: out of memory: ")


def test_weights_that_are_not_finite(demo, tmp_path, failed):
    shutil.copytree(demo / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["model.language_model.norm.weight"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    said = failed("train", train_config(demo, tmp_path / "run", model=ModelSettings(path=tmp_path / "model")))
    assert "logits must be finite, got NaN or infinity (prompt 0, rollout 0, token 0); are the weights whole?" in said
    assert "lower --optimizer.lr" in said
    config = sft_config(demo, tmp_path / "sft", model=ModelSettings(path=tmp_path / "model"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=99, save_every=0))
    assert "gradients must be finite, got 10 steps without; are the weights whole?" in failed("sft", config)
    said = failed("eval", None, "--model", tmp_path / "model", "--tasks", demo / "test.jsonl")
    assert said.endswith("are the weights whole?")


def test_faults_of_the_code_keep_their_traceback(demo, tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(plain(sft_config(demo, tmp_path / "run"))))
    in_the_second_step(monkeypatch, lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["sft", "--config", str(file)])


def test_errors_of_devices_and_ops():
    for text in (
        "CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "aoti_torch_empty_strided(dims, sizes.data()) API call failed at csrc/cpu/parallel.h, line 119",
    ):
        assert told("train", RuntimeError(text)).startswith(f"out of memory: {text.splitlines()[0]}; lower")
    for text in ("shape mismatch", 'torch_call_dispatcher( "aten::mm", "") API call failed at ops.h, line 903', ""):
        assert told("train", RuntimeError(text)) is None
