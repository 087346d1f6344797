"""The table "you have -> you write" of docs/dropin.md: every line runs as it stands, and gives what one had.

The rotary calls are held to transformers' own in `test_rotary_shapes.py`.
"""

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F

import glm4v_ext
from glm4v_ext import reference

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs/dropin.md"
TABLE = PAGE.read_text().split("| you have | you write |\n|---|---|\n")[1].split("\n\n")[0]
LINES = [code for row in TABLE.splitlines() for code in re.findall(r"`([^`]+)`", row.split(" | ")[1])]
ROTARY = {
    "theta": 1e4, "sections": (2, 3, 3), "rotary_dim": 16, "interleaved": True, "q": torch.ones(1, 4, 5, 32),
    "k": torch.ones(1, 2, 5, 32), "position_ids": torch.arange(5).expand(3, 1, 5),
}  # fmt: skip


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def patches(weight):
    """Conv3d over whole patches: x [P, 1176]."""
    x, bias = randn(8, 1176), randn(64)
    return {"patches": x, "weight": weight, "bias": bias}, F.conv3d(x.view(8, 3, 2, 14, 14), weight, bias).flatten(1)


def blocks():
    """Conv2d over 2x2 merge blocks, whose patches follow each other."""
    x, weight, bias = randn(8, 64), randn(32, 64, 2, 2), randn(32)
    pictures = x.view(2, 2, 2, 64).permute(0, 3, 1, 2)
    return {"x": x, "weight": weight, "bias": bias}, F.conv2d(pictures, weight, bias, stride=2).flatten(1)


def rows():
    x, weight = randn(5, 64), randn(64)
    return {"x": x, "weight": weight, "eps": 1e-5}, F.rms_norm(x, (64,), weight, 1e-5)


def products():
    x, weight, bias = randn(5, 64), randn(32, 64), randn(32)
    return {"x": x, "weight": weight, "bias": bias}, F.linear(x, weight, bias)


def gated():
    gate_up = randn(5, 128)
    gate, up = gate_up.chunk(2, -1)
    return {"gate_up": gate_up}, F.silu(gate) * up


def table():
    x, table, grid = randn(16, 64), randn(36, 64), torch.tensor([[1, 4, 4]])
    return {"x": x, "table": table, "grid_thw": grid}, reference.interpolate_pos_embed(x, table, grid)


def logits():
    hidden, head, targets = randn(5, 64), randn(32, 64), torch.arange(5)
    rows = (hidden @ head.T).log_softmax(-1)
    return {"hidden": hidden, "lm_head": head, "targets": targets}, rows.gather(1, targets[:, None]).squeeze(1)


def frames():
    x, mean, std = (
        torch.arange(2 * 3 * 56 * 56).view(2, 56, 56, 3).remainder(256).to(torch.uint8),
        [0.5] * 3,
        [0.25] * 3,
    )
    return {"frames": x, "mean": mean, "std": std}, reference.patchify(x, mean, std)[0]


CALLS = {
    "glm4v_ext.rms_norm(x, weight, eps)": rows,
    "glm4v_ext.swiglu(gate_up)": gated,
    "glm4v_ext.linear(x, weight, bias)": products,
    "glm4v_ext.patch_embed(patches, weight, bias)": lambda: patches(randn(64, 3, 2, 14, 14)),
    "glm4v_ext.merge_patches(x, weight, bias)": blocks,
    "glm4v_ext.interpolate_pos_embed(x, table, grid_thw)": table,
    "glm4v_ext.token_logprob(hidden, lm_head, targets)": logits,
    "glm4v_ext.patchify(frames, mean, std)": frames,
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(call):
    assert call in LINES
    scope, had = CALLS[call]()
    result = eval(call, {"glm4v_ext": glm4v_ext, **scope})
    result = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(result, had, rtol=1e-4, atol=1e-4)


def test_imports_and_rotary_calls():
    scope = {}
    for code in LINES:
        if code.startswith("from "):
            exec(code, scope)
    for code in LINES:
        if code.startswith("q, k = "):
            vision = "vision" in code
            shapes = {"q": torch.ones(5, 2, 32), "k": torch.ones(5, 2, 32), "position_ids": torch.ones(5, 2).long()}
            local = {**scope, **ROTARY, **(shapes if vision else {})}
            exec(code, local)
            assert local["q"].shape == (shapes["q"].shape if vision else ROTARY["q"].shape)


def test_no_other_lines():
    others = [code for code in LINES if code not in CALLS and not code.startswith(("from ", "q, k = "))]
    assert others == ["add_rms_norm", "rms_norm_add"] and all(hasattr(glm4v_ext, name) for name in others)
