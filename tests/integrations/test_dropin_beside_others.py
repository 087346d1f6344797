"""The drop-in beside other libraries: adapters, hooks, and classes that they make of its own."""

import sys
import types
import warnings

import pytest
import torch
from families import FAMILIES, assert_like_stock, attentions, batch, make, replaced, results

from glm4v_ext.integrations.attention import attention
from glm4v_ext.integrations.replacements import Replacement
from glm4v_ext.integrations.transformers import disable, enable

pytestmark = pytest.mark.usefixtures("nothing_left_alone")


@pytest.mark.parametrize("first", ["enable", "peft"])
def test_lora(first):
    peft = pytest.importorskip("peft")
    inputs = batch(rows=2, padding="left")

    def adapted(model):
        names = ["q_proj", "v_proj", "qkv", "gate_up_proj", "down_proj", "lm_head"]
        adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
        return adapter

    exact, stock = results(adapted(make("glm4v").double()), inputs), results(adapted(make("glm4v")), inputs)
    model = make("glm4v")
    if first == "enable":
        enable(model)
        model = adapted(model)
    else:
        model = adapted(model)
        enable(model)
    ours = results(model, inputs)
    assert len(ours) == len(stock) > 20
    assert_like_stock(ours, stock, exact, torch.float32)
    assert isinstance(model.get_submodule("base_model.model.lm_head.base_layer"), Replacement)
    disable(model)
    assert not replaced(model)


@pytest.mark.parametrize("restore", [disable, lambda model: disable()], ids=["itself", "all"])
@pytest.mark.parametrize("name", ["lm_head", "model.visual"])
def test_modules_that_peft_copies(name, restore):
    """It trains a copy of what it is to save whole: the head, or a tower, whose attention goes by a name."""
    peft = pytest.importorskip("peft")
    model, inputs = make("glm4v"), batch()
    with torch.no_grad():
        stock, before = model(**inputs).logits, {name for _, name in attentions(model)}
        enable(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))
        assert replaced(model.get_submodule(name).modules_to_save)
        restore(adapted)
        assert not replaced(adapted) and {name for _, name in attentions(adapted)} == before
        torch.testing.assert_close(adapted(**inputs).logits, stock)


@pytest.mark.parametrize("first", ["enable", "peft"])
@pytest.mark.parametrize("layer", ["proj", "downsample"])
def test_lora_of_convolutions(layer, first):
    """The names end so in the patch embedding (and elsewhere) and in the downsample."""
    peft = pytest.importorskip("peft")
    inputs = batch()

    def adapted(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=False))

    exact, stock = (results(adapted(make("glm4v", dtype)), inputs) for dtype in (torch.float64, torch.float32))
    model = make("glm4v")
    with warnings.catch_warnings(record=True):  # where peft was first, what it has wrapped is left alone
        warnings.simplefilter("always")
        if first == "enable":
            enable(model)
        model = adapted(model)
        if first == "peft":
            enable(model)
    ours = results(model, inputs)
    assert all(gradient.any() for gradient in ours.values())
    assert_like_stock(ours, stock, exact, torch.float32)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "path", ["visual.patch_embed.proj", "visual.blocks.0.mlp.act_fn", "language_model.layers.0.mlp.activation_fn"]
)
def test_hooks_of_what_an_op_would_skip(path, grad):
    model, inputs = make("glm4v"), batch()
    enable(model)
    model.model.get_submodule(path).register_forward_hook(lambda module, given, out: out * 0)
    with torch.set_grad_enabled(grad):
        ours = model(**inputs).logits
        disable(model)
        torch.testing.assert_close(ours, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_hooks_see_all_rows():
    model, seen = make("glm4v"), []
    enable(model)
    mlp = model.model.language_model.layers[0].mlp
    mlp.down_proj.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    with torch.no_grad():
        mlp(torch.randn(2 * mlp.group, 64))
    assert seen == [2 * mlp.group]


def test_classes_that_others_have_made_of_ours():
    model, inputs = make("glm4v"), batch()
    with torch.no_grad():
        stock = model(**inputs).logits
        enable(model)
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        with pytest.warns(UserWarning, match="ParametrizedLinear, which another library has made of Linear"):
            disable(model)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)
        torch.nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    disable(model)
    assert not replaced(model)


def test_norms_that_an_adapter_keeps_in_fp32():
    """k-bit training casts norms to fp32 under bf16 activations: such a call goes transformers' way."""
    model, inputs = make("glm4v", torch.bfloat16), batch()
    for module in model.modules():
        if type(module).__name__ == "Glm4vRMSNorm":
            module.float()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    norm = model.model.language_model.norm
    enable(model)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.float32


def test_forwards_that_others_have_wrapped():
    """As accelerate wraps modules of models on several devices: restored behind its back, and enabled again."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make("glm4v"), batch()
    with torch.no_grad():
        stock = model(**inputs).logits
        enable(model)
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        whole = replaced(model)
        ours = model(**inputs).logits
        disable(model)
        assert not replaced(model) and torch.equal(model(**inputs).logits, stock)
        enable(model)
        assert replaced(model) == whole and torch.equal(model(**inputs).logits, ours)


@pytest.mark.parametrize("first", ["enable", "change"])
@pytest.mark.parametrize("name", ["RMSNorm", "TextMLP", "TextAttention"])
def test_forwards_that_others_put_into_a_class(name, first, monkeypatch):
    """As verl and class-wide patches do, before and after: theirs is what runs."""
    modeling = sys.modules[FAMILIES["glm4v"][1].__module__]
    cls, model, inputs = getattr(modeling, f"Glm4v{name}"), make("glm4v"), batch()
    enable(make("glm4v"))  # the replacement of that class is there already
    stock = cls.forward

    def change():
        def zero(self, *given, **named):
            out = stock(self, *given, **named)
            return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

        monkeypatch.setattr(cls, "forward", zero)

    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if first == "enable":
            enable(model, rope=False)
            change()
        else:
            change()
            enable(model)
            assert f"Glm4v{name}: another library has changed the forward of its class" in str(said[0].message)
            assert isinstance(model.model.language_model.layers[0].self_attn, Replacement) == (name != "TextAttention")
            assert ("leaves flash_attn alone" in str(said[-1].message)) == (name == "TextAttention")
        ours = model(**inputs).logits
        disable(model)
        torch.testing.assert_close(ours, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("language_model.rotary_emb", "rope"),
        ("language_model.layers.1.self_attn", "flash_attn, rope"),
        ("visual.rotary_pos_emb", "rope"),
        ("visual.blocks.0.attn", "flash_attn, rope"),
    ],
)
def test_rotary_embeddings_and_attention_of_others(name, ops):
    """One that hands on or takes masks, cosines and sines itself, beside those that transformers made."""
    model, inputs = make("glm4v"), batch(rows=2, padding="left")
    module = model.model.get_submodule(name)
    module.__class__ = type("Mine", (type(module),), {"__module__": "mine"})
    with torch.no_grad():
        stock = model(**inputs).logits
        path = name.partition(".")[2]
        with pytest.warns(
            UserWarning, match=f"leaves {ops} alone in .*: {path}, a Mine, is not as transformers made it"
        ):
            enable(model)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["language_model.rotary_emb", "visual.rotary_pos_emb"])
def test_frequencies_that_somebody_has_changed(name):
    """As who stretches positions by hand does; those that were in 16 bits once are the same."""
    enable(make("glm4v").half().float())
    model, inputs = make("glm4v"), batch()
    model.model.get_submodule(name).inv_freq /= 4
    with torch.no_grad():
        stock = model(**inputs).logits
        with pytest.warns(UserWarning, match=r"leaves rope alone in .*: its inv_freq is not that of rope_theta 10000"):
            enable(model)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)


def test_attention_that_was_not_there_when_the_model_was_enabled():
    model, inputs = make("glm4v"), batch()
    enable(model)
    layers = model.model.language_model.layers
    added = type(layers[0])(layers[0].self_attn.config, 0)
    added.load_state_dict(layers[0].state_dict())
    with torch.no_grad():
        stock = model(**inputs).logits
        layers[0] = added.eval()
        with pytest.raises(RuntimeError, match=r"^rotary: attention must be enabled where .* enable\(model\) again"):
            model(**inputs)
        enable(model)
        assert torch.equal(model(**inputs).logits, stock)


def test_weights_of_attention_that_are_asked_for():
    model, inputs = make("glm4v"), batch()
    enable(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="has no weights for output_attentions: eager has"):
        assert model(**inputs, output_attentions=True).attentions == ()


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_other_models_add_to_the_scores(name):
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(RuntimeError, match=f"^attention: {name} must be None, got that of Linear$"):
        attention(torch.nn.Linear(1, 1), x, x, x, None, **{name: x})


@pytest.mark.parametrize("first", ["enable", "offload"])
def test_weights_that_others_fetch(first):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make("glm_ocr"), batch()  # the others' towers read a table that is not there
    with torch.no_grad(), warnings.catch_warnings(record=True):  # what is wrapped already is left alone
        warnings.simplefilter("always")
        stock = model(**inputs).logits
        if first == "enable":
            enable(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        if first == "offload":
            enable(model)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)


def test_models_on_meta():
    """As they are asked for shapes and sizes before weights are there."""
    model, ids = make("glm4v").to("meta"), torch.ones(1, 5, dtype=torch.long, device="meta")
    enable(model)
    assert model(input_ids=ids, position_ids=ids.expand(3, 1, 5)).logits.shape == (1, 5, 100)


def test_a_tower_of_ones_own_is_left_alone_with_a_warning():
    model = make("glm4v")
    tower = model.model.language_model
    tower.__class__ = type("MyTower", (type(tower),), {})
    with pytest.warns(UserWarning, match="glm4v_ext leaves MyTower alone: it is made of Glm4vTextModel"):
        enable(model)
    assert not replaced(tower) and replaced(model.model.visual)
    disable(model)


def test_transformers_whose_patch_mapping_fails(monkeypatch, tmp_path):
    """As in 5.20 without torchvision: aliases of modules, imported when their names are listed."""

    def names():
        raise ModuleNotFoundError("No module named 'torchvision'")

    alias = types.ModuleType("transformers.alias")
    alias.__dir__ = names
    monkeypatch.setitem(sys.modules, alias.__name__, alias)
    make("glm4v").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"cannot map .* \(No module named 'torchvision'\): enable\(model\) after"):
        enable()
    loaded = FAMILIES["glm4v"][1].from_pretrained(tmp_path)
    assert not replaced(loaded)
    enable(loaded)
    assert replaced(loaded)
