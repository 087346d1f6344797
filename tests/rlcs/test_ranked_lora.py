"""Adapters on several ranks: what lies where, files, a run taken up by other numbers of ranks, answers that see them.

That the step is the same: test_parallel.
"""

import functools
import json

import pytest
import torch
from ranked_runs import STEP, cold_config, cut_to, expect_close, expect_equal, rl_config, rows_of, run_job, tensors_of
from safetensors.torch import load_file
from worlds import in_worlds

from rlcs import checkpoint, fsdp, lora, parallel
from rlcs.config import ModelSettings, ParallelSettings
from rlcs.optimizer import Optimizer
from rlcs.run import load_model

pytestmark = pytest.mark.long


def adapters_of(folder):
    saved = checkpoint.latest(folder / "checkpoints").folder / lora.FOLDER
    return load_file(saved / lora.FILE), json.loads((saved / "adapter_config.json").read_text())


def lying_job(demo, replicate, *, folder):
    """Frozen weights are rows in the type that the model computes in, adapters rows in fp32."""
    parallel.join("cpu", ParallelSettings(replicate, 60.0))
    settings = ModelSettings(path=demo / "model", dtype="bfloat16", lora_rank=3)
    model = load_model(settings, seed=5)
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
        assert weight.requires_grad == (".lora_" in name)
        start, stop = parallel.rows_of(weight)
        assert len(weight.to_local()) == stop - start <= -(-len(weight) // (parallel.size() // replicate))
    optimizer = Optimizer(model, STEP)
    assert optimizer.names and all(".lora_" in name for name in optimizer.names)
    plain = {name: parallel.plain(weight.detach()) for name, weight in model.named_parameters()}
    ids, lengths = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    with fsdp.whole(model) as answering, torch.no_grad():
        logits = answering(ids, lengths, ids.expand(3, -1))
    if parallel.first():
        torch.save((plain, logits), folder / f"{parallel.size()}-{replicate}")


def test_adapters_begin_alike_on_any_number_of_ranks(demo, tmp_path):
    in_worlds([(4, lying_job, (demo, 1)), (4, lying_job, (demo, 2))], tmp_path)
    model = load_model(ModelSettings(path=demo / "model", dtype="bfloat16", lora_rank=3), seed=5)
    ids, lengths = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    for name in ("4-1", "4-2"):
        plain, logits = torch.load(tmp_path / name)
        expect_equal(plain, dict(model.named_parameters()))
        assert torch.equal(logits, model(ids, lengths, ids.expand(3, -1)))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_with_adapters_goes_on_with_any_number_of_ranks(dtype, demo, tmp_path):
    config = functools.partial(cold_config, demo, dtype=dtype, lora_rank=3, steps=2)
    run_job(config(tmp_path / "alone"), folder=tmp_path)
    in_worlds([(2, run_job, (config(tmp_path / "whole"),))], tmp_path)
    sizes = {"1": 1, "2": 2, "4": 4, "back": 2}
    for name in sizes:
        cut_to(tmp_path / ("alone" if name == "back" else "whole"), tmp_path / name, 1)
    run_job(config(tmp_path / "1"), folder=tmp_path)
    in_worlds([(sizes[name], run_job, (config(tmp_path / name),)) for name in ("2", "4", "back")], tmp_path)
    if dtype == "float32":
        expect_close(rows_of(tmp_path / "whole"), rows_of(tmp_path / "alone"))
    assert rows_of(tmp_path / "2") == rows_of(tmp_path / "whole")
    expect_equal(tensors_of(tmp_path / "2"), tensors_of(tmp_path / "whole"))
    (expected, settings), whole = adapters_of(tmp_path / "alone"), tensors_of(tmp_path / "alone")
    assert any(".lora_B." in name and bool(x.any()) for name, x in expected.items())
    for name in ("whole", "1", "4", "back"):
        found, said = adapters_of(tmp_path / name)
        said["target_modules"], known = sorted(said["target_modules"]), sorted(settings["target_modules"])
        assert said == {**settings, "target_modules": known} and found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found[key], value, rtol=0, atol=3e-4), key
        tensors = tensors_of(tmp_path / name)
        assert tensors.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.allclose(tensors[key].float(), value.float(), rtol=2**-7, atol=3e-4), key


def test_waves_with_adapters_do_not_depend_on_the_number_of_ranks(demo, tmp_path):
    """The second wave's answers are those of adapters that have moved."""
    model = ModelSettings(path=demo / "model", lora_rank=4)
    config = functools.partial(rl_config, demo, model=model)
    in_worlds([(2, run_job, (config(tmp_path / "2"),))], tmp_path)
    run_job(config(tmp_path / "1"), folder=tmp_path)
    expect_close(rows_of(tmp_path / "2"), rows_of(tmp_path / "1"))
    for wave in ("000001", "000002"):
        name = f"rollouts/{wave}.jsonl"
        assert (tmp_path / "2" / name).read_text() == (tmp_path / "1" / name).read_text()
    found, expected = (adapters_of(tmp_path / name)[0] for name in ("2", "1"))
    assert all(torch.allclose(found[name], x, rtol=0, atol=1e-4) for name, x in expected.items())
