"""Steps of the optimizer: masters of weights in half types, and gradients that are not finite."""

import dataclasses

import pytest
import torch
from small_runs import lessons, sft_config

from glm4v import Glm4v
from rlcs.config import ModelSettings
from rlcs.learner import Learner, sft_loss
from rlcs.optimizer import Optimizer, OptimizerSettings
from rlcs.run import Run, load_model

pytestmark = pytest.mark.long


def test_bf16_weights_have_fp32_masters(demo):
    model = load_model(ModelSettings(path=demo / "model", dtype="bfloat16"))
    optimizer = Optimizer(model, OptimizerSettings(lr=1e-5, warmup=0.0))
    samples, prompts = lessons(demo)
    prompts = [dataclasses.replace(p, **{k: getattr(p, k).bfloat16() for k in ("pixel_values", "pixel_values_videos")
               if getattr(p, k) is not None}) for p in prompts]  # fmt: skip
    learner = Learner(model, optimizer, 1 << 20)
    before = [master.clone() for master in optimizer.masters]
    for _ in range(3):
        learner.update(samples, prompts, sft_loss, 1e-5)
    assert all(master.dtype == torch.float32 for master in optimizer.masters)
    assert all(torch.equal(w, m.bfloat16()) for w, m in zip(optimizer.weights, optimizer.masters, strict=True))
    moved = sum(int((m != b).sum()) for m, b in zip(optimizer.masters, before, strict=True))
    assert moved > 0.5 * sum(m.numel() for m in optimizer.masters)  # steps too small for bf16 are not lost
    again = Optimizer(load_model(ModelSettings(path=demo / "model", dtype="bfloat16")), optimizer.settings)
    again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.masters, optimizer.masters, strict=True))


def test_masters_begin_as_the_checkpoint_has_them(demo, tmp_path):
    """Else a rounded weight stays where it is until its steps add up to half of what bf16 tells apart."""
    model = ModelSettings(path=demo / "model", dtype="bfloat16")
    run = Run(sft_config(demo, tmp_path / "run", model=model), print)
    found = dict(zip(run.optimizer.names, run.optimizer.masters, strict=True))
    weights = dict(Glm4v.from_pretrained(demo / "model").named_parameters())
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in found.values())


def test_a_gradient_that_is_not_finite_moves_nothing(demo):
    samples, prompts = lessons(demo)
    model = load_model(ModelSettings(path=demo / "model"))
    learner = Learner(model, Optimizer(model, OptimizerSettings(lr=1e-3)), 1 << 20)
    before = [w.detach().clone() for w in model.parameters()]
    facts = learner.update(samples, prompts, lambda micro: (micro.new.sum() * float("nan"), {}), 1e-3)
    assert facts["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
