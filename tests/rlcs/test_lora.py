"""Adapters: what moves, what a run goes on from, and what other programs read."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from small_runs import sft_config, train_config

from glm4v import Glm4v
from rlcs import checkpoint, lora
from rlcs.config import ModelSettings, RunSettings
from rlcs.run import Run, load_model, part_of, write_model
from rlcs.supervised import sft
from rlcs.trainer import train


def settings(demo, **changes):
    return ModelSettings(path=demo / "model", lora_rank=4, lora_alpha=8.0, **changes)


def logits(model, count=20):
    ids = torch.arange(count)
    return model(ids, torch.tensor([0, count], dtype=torch.int32), ids.expand(3, -1))


def perturbed(demo, **changes):
    """A model whose adapters do something."""
    model = load_model(settings(demo, **changes))
    with torch.no_grad():
        for layer in lora.adapted(model).values():
            layer.lora_B["default"].weight.normal_(std=0.05)
    return model


def test_only_adapters_move_and_a_run_is_taken_up_to_the_bit(demo, tmp_path):
    def config(name, steps):
        run = RunSettings(out=tmp_path / name, steps=steps, save_every=2, keep=9)
        return sft_config(demo, run.out, model=settings(demo), run=run)

    sft(config("whole", 4))
    saved = checkpoint.every(tmp_path / "whole" / "checkpoints")
    cut = tmp_path / "cut" / "checkpoints" / "step-000002"
    cut.parent.mkdir(parents=True)
    saved[0].folder.rename(cut)
    run = Run(config("cut", 4), lambda _: None)
    assert run.step == 2 and all(".lora_" in name for name in run.optimizer.names)
    before, after = load_model(settings(demo)), run.model
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == (".lora_" not in name), name
    run.log.close()
    sft(config("cut", 4))
    whole, again = (checkpoint.latest(tmp_path / name / "checkpoints").folder for name in ("whole", "cut"))
    for file in ("model.safetensors", "trainer.safetensors", f"{lora.FOLDER}/{lora.FILE}"):
        expected, found = load_file(whole / file), load_file(again / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), file


def test_the_first_step_sees_the_model_as_it_was(demo):
    assert torch.equal(logits(load_model(settings(demo))), logits(Glm4v.from_pretrained(demo / "model")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_merged(dtype, demo, tmp_path):
    model = perturbed(demo, dtype=dtype)
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    before = logits(model)
    write_model(model, demo / "model", tmp_path)
    assert all(torch.equal(kept[name], weight) for name, weight in model.named_parameters())
    assert torch.equal(logits(model), before)
    plain = Glm4v.from_pretrained(tmp_path)
    assert plain.dtype == getattr(torch, dtype)
    for name, layer in lora.adapted(model).items():
        a, b = (matrix["default"].weight for matrix in (layer.lora_A, layer.lora_B))
        assert a.dtype == b.dtype == torch.float32
        whole = layer.base_layer.weight.float() + 8.0 / 4 * (b @ a)
        assert torch.equal(plain.get_submodule(name).weight, whole.to(plain.dtype)), name
    if dtype == "float32":
        assert torch.allclose(logits(plain), before, atol=1e-4)
        assert not torch.allclose(logits(Glm4v.from_pretrained(demo / "model")), before, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_peft(dtype, demo):
    """Values and gradients, at most twice as far from double precision as peft's own forward."""
    layer = next(iter(lora.adapted(perturbed(demo, dtype=str(dtype).removeprefix("torch."))).values()))
    x = torch.randn(15, layer.in_features).to(dtype)

    def results(layer, x, forward):
        x = x.clone().requires_grad_()
        out = forward(layer, x)
        return out.detach(), *torch.autograd.grad(out.sin().sum(), (x, *lora._matrices(layer)))

    theirs = type(layer).__mro__[1].forward
    double = copy.deepcopy(layer).double()
    double.base_layer.__class__ = torch.nn.Linear
    exact = results(double, x.double(), theirs)
    for mine, plain, true in zip(results(layer, x, type(layer).forward), results(layer, x, theirs), exact, strict=True):
        error, bound = ((one.double() - true).abs().max() for one in (mine, plain))
        assert mine.dtype == plain.dtype and error <= 2 * bound + torch.finfo(dtype).eps * true.abs().max()


def test_transformers_and_peft_read_both(demo, tmp_path):
    from peft import PeftModel
    from transformers import Glm4vForConditionalGeneration

    model = perturbed(demo)
    write_model(model, demo / "model", tmp_path)
    ids = torch.arange(20)[None]
    pixels, grid = torch.rand(16, 1176), torch.tensor([[1, 4, 4]])
    mine = logits(model)
    whole = Glm4vForConditionalGeneration.from_pretrained(tmp_path)
    base = Glm4vForConditionalGeneration.from_pretrained(demo / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / lora.FOLDER)
    assert torch.allclose(whole(input_ids=ids).logits[0], mine, atol=1e-4)
    assert torch.allclose(adapted(input_ids=ids).logits[0], mine, atol=1e-4)
    seen = model.visual(pixels, grid)
    for theirs in (whole.model.visual, adapted.base_model.model.model.visual):
        found = theirs(pixels, grid)
        assert torch.allclose(getattr(found, "pooler_output", found), seen, atol=1e-4)


@pytest.mark.parametrize(
    ("freeze", "kept"), [(("vision",), {"merger", "language"}), (("language", "merger"), {"vision"})]
)
def test_frozen_parts_have_no_adapters(freeze, kept, demo):
    model = load_model(settings(demo, freeze=freeze))
    assert {part_of(name) for name in lora.adapted(model)} == kept
    assert all(".lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_reinforcement_learning_with_adapters(demo, tmp_path):
    config = train_config(demo, tmp_path / "run", model=settings(demo, freeze=("vision",)))
    train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=1)))
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert (saved.folder / lora.FOLDER / "adapter_config.json").exists()


def test_what_does_not_fit_is_named(demo, monkeypatch):
    with pytest.raises(ValueError, match="freeze must leave a part to train"):
        load_model(settings(demo, freeze=("vision", "merger", "language")))
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"lora_rank above 0 needs peft, got none: pip install 'glm4v-ext\[lora\]'"):
        load_model(settings(demo))
