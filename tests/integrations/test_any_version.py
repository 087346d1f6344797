"""The drop-in in whatever version of transformers is installed, and what it says that the version lacks.

`test_other_versions.py` runs this file in older ones.
"""

import importlib.util
import warnings

import pytest
import torch
from families import FAMILIES, GREEDY, VERSION, assert_like_stock, batch, exact_results, kinds, make, replaced, results

from glm4v_ext.integrations.transformers import disable, enable
from glm4v_ext.testing import devices

pytestmark = pytest.mark.long

# Of each tower, what its warning names.
LEFT_ALONE = {(4, 57): {"VisionModel": "rope", "TextModel": "rope"}, (5, 0): {"VisionModel": "rope"}}.get(VERSION, {})
# 4.57's experts know no double precision.
EXACT = [name for name in FAMILIES if VERSION >= (5, 0) or name != "glm4v_moe"]
# Attention takes no float32 on a GPU.
CASES = [(device, dtype) for device in devices() for dtype in (torch.float32, torch.bfloat16)]
CASES = [case for case in CASES if case != ("cuda", torch.float32)]
MAPPED = importlib.util.find_spec("transformers.monkey_patching") is not None


@pytest.fixture(autouse=True)
def _restored():
    yield
    disable()


def said(function, *arguments, **named):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **named)
    return [str(w.message) for w in caught if "glm4v_ext" in str(w.message)]


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("family", EXACT)
def test_like_stock(family, device, dtype):
    experts = {"num_experts_per_tok": 4} if family == "glm4v_moe" else {}
    model = make(family, dtype, **experts).to(device)
    inputs = {name: x.to(device) for name, x in batch(rows=3, padding="left").items()}
    before = kinds(model)
    exact, stock = exact_results(model, inputs), results(model, inputs)
    messages = said(enable, model)
    assert len(messages) == len(LEFT_ALONE)
    for tower, ops in LEFT_ALONE.items():
        assert any(f"leaves {ops} alone in" in line and f"{tower} of transformers" in line for line in messages)
    assert len(replaced(model)) >= 8
    assert_like_stock(results(model, inputs), stock, exact, dtype)
    disable(model)
    assert kinds(model) == before
    # Stock's own gradients differ from run to run on a GPU.
    torch.testing.assert_close(results(model, inputs), stock, **({"rtol": 0, "atol": 0} if device == "cpu" else {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    model, inputs = make(family), batch(rows=3, padding="left")
    stock = model.generate(**inputs, **GREEDY)
    said(enable, model)
    assert torch.equal(model.generate(**inputs, **GREEDY), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_loading(family, tmp_path):
    """With patch mappings the ops, without them a warning that says so; attention by name in any version."""
    model, inputs = make(family), batch(rows=2, padding="left")
    model.save_pretrained(tmp_path)
    messages = said(enable)
    assert MAPPED or messages
    assert all("): enable(model) after" in m or "has no patch mapping: enable(model) after" in m for m in messages)
    loaded = type(model).from_pretrained(tmp_path)
    assert bool(replaced(loaded)) != bool(messages)
    disable()
    named = type(model).from_pretrained(tmp_path, attn_implementation={"text_config": "glm4v_ext"})
    assert named.config.text_config._attn_implementation == "glm4v_ext" and not replaced(named)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock, ours = (m(**inputs).logits[real] for m in (model, named))
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
