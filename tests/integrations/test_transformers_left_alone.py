"""What `enable` leaves alone in transformers' models, by name, and what it refuses."""

import sys

import pytest
import torch
from families import TEXT, batch, make, replaced

from glm4v_ext.integrations.transformers import disable, enable

pytestmark = [pytest.mark.usefixtures("nothing_left_alone"), pytest.mark.long]


def test_other_rope_types():
    model = make("glm4v", rope_parameters={**TEXT["rope_parameters"], "rope_type": "linear", "factor": 2.0})
    with pytest.warns(UserWarning, match=r"leaves rope alone in Glm4vTextModel .*rope_type is 'linear'"):
        enable(model)
    assert {"Glm4vVisionAttention", "Glm4vRMSNorm"} <= replaced(model) and "Glm4vTextAttention" not in replaced(model)


def test_dropout():
    model = make("glm4v", attention_dropout=0.1)
    with pytest.warns(UserWarning, match=r"leaves flash_attn alone .*attention_dropout is 0.1"):
        enable(model)
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "left"), [("eager", "eager"), ("glm4v_ext", "sdpa")])
def test_attention_chosen_while_enabled(name, left):
    model, inputs = make("glm4v"), batch()
    with torch.no_grad():
        stock = model(**inputs).logits
        enable(model)
        model.set_attn_implementation(name)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)
        disable(model)
        assert model.model.language_model.config._attn_implementation == left
        assert model.model.visual.config is model.config.vision_config
        assert model.config.vision_config._attn_implementation == name
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)


def test_wrapped_forwards():
    """As accelerate wraps modules of models on several devices."""
    model, inputs = make("glm4v"), batch()
    norm = model.model.language_model.norm
    norm.forward = norm.forward
    with pytest.warns(UserWarning, match=r"rms_norm.* alone in Glm4vTextModel .*wrapped"):
        enable(model)
    with torch.no_grad():
        model(**inputs)


def test_double_precision():
    model, inputs = make("glm4v"), batch()
    enable(model)
    model.double()
    with pytest.raises(RuntimeError, match=r"has become torch.float64: enable\(model\) again"):
        model(**inputs)
    with pytest.warns(UserWarning, match=r"its weights are torch.float64"):
        enable(model)
    model(**inputs)


def test_older_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.monkey_patching", None)
    with pytest.warns(UserWarning, match=r"has no patch mapping: enable\(model\) after loading"):
        enable()


def test_refusals():
    with pytest.raises(TypeError, match=r"ops must be among flash_attn, .*got flash"):
        enable(flash=True)
    with pytest.raises(ValueError, match="a tower of transformers' glm4v, glm4v_moe, glm_ocr, got Linear"):
        enable(torch.nn.Linear(1, 1))
    for wrong in (5, {}):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module or None, got {type(wrong).__name__}"):
            enable(wrong)
        with pytest.raises(TypeError, match=r"^disable: model must be a torch.nn.Module or None, got "):
            disable(wrong)
    with pytest.raises(TypeError, match=r"^enable: rope must be True or False, got 'no'$"):
        enable(rope="no")


def test_the_order_of_pairs_is_known_while_a_model_is_built_on_meta():
    from transformers.models.glm4v import modeling_glm4v
    from transformers.models.glm4v_moe import modeling_glm4v_moe

    from glm4v_ext.integrations.replacements import pairs_are_adjacent

    with torch.device("meta"):
        assert pairs_are_adjacent(modeling_glm4v) and not pairs_are_adjacent(modeling_glm4v_moe)
