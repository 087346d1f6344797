"""The rotary calls in transformers', vLLM's and SGLang's shapes, against transformers' tables and the definition."""

import re

import pytest
import torch
from transformers.models.glm4v import modeling_glm4v
from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig, Glm4vVisionConfig
from transformers.models.glm4v_moe import modeling_glm4v_moe
from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeTextConfig

from glm4v_ext import reference
from glm4v_ext.integrations.rotary import (
    MRotaryEmbedding,
    Rotary,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
SETTINGS = {"sections": (2, 3, 3), "rotary_dim": 16}


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize(
    ("modeling", "config", "embedding", "interleaved"),
    [
        (modeling_glm4v, Glm4vTextConfig, "Glm4vTextRotaryEmbedding", True),
        (modeling_glm4v_moe, Glm4vMoeTextConfig, "Glm4vMoeTextRotaryEmbedding", False),
    ],
    ids=["glm4v", "glm4v_moe"],
)
def test_text(modeling, config, embedding, interleaved, heads_first):
    positions = torch.randint(0, 50, (3, 2, 7))
    q, k = torch.randn(2, 2, 7, 32), torch.randn(2, 1, 7, 32)
    tables = getattr(modeling, embedding)(config(**SIZES, rope_parameters=ROPE))(q, positions)
    dim = 1 if heads_first else 2
    if not heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    theirs = modeling.apply_rotary_pos_emb(q, k, *tables, unsqueeze_dim=dim)
    ours = apply_rotary_pos_emb(q, k, positions, Rotary(interleaved=interleaved, **SETTINGS), unsqueeze_dim=dim)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_text_positions_alone():
    q, k, positions = torch.randn(2, 2, 5, 32), torch.randn(2, 1, 5, 32), torch.arange(5)[None]
    short, long = (apply_rotary_pos_emb(q, k, p, Rotary(**SETTINGS)) for p in (positions, positions.expand(3, 2, 5)))
    torch.testing.assert_close(short, long)


def test_vision():
    config = Glm4vVisionConfig(hidden_size=64, num_heads=2)
    positions = torch.randint(0, 30, (9, 2))
    q, k = torch.randn(9, 2, 32), torch.randn(9, 2, 32)
    tables = modeling_glm4v.Glm4vVisionRotaryEmbedding(config)(q, positions)
    theirs = modeling_glm4v.apply_rotary_pos_emb_vision(q, k, *tables)
    ours = apply_rotary_pos_emb_vision(q, k, positions)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_mrope_call(neox, text):
    layer = MRotaryEmbedding(32, 16, 4096, 1e4, neox, torch.float32, mrope_section=[2, 3, 3])
    positions = torch.arange(6) if text else torch.randint(0, 40, (3, 6))
    query, key = torch.randn(6, 4 * 32), torch.randn(6, 32)
    q, k = layer(positions, query, key)
    assert q.shape == query.shape and k.shape == key.shape
    expected = reference.rope_3d(
        query.view(6, 4, 32), key.view(6, 1, 32), positions.expand(3, 6), (2, 3, 3), 1e4, 16, not neox
    )
    torch.testing.assert_close((q, k), (expected[0].flatten(1), expected[1].flatten(1)), rtol=1e-5, atol=1e-5)


def test_mrope_call_of_heads_apart():
    """vLLM's takes them so, too."""
    layer = MRotaryEmbedding(32, 16, 4096, 1e4, False, torch.float32, mrope_section=[2, 3, 3])
    positions, query, key = torch.randint(0, 40, (3, 6)), torch.randn(6, 4, 32), torch.randn(6, 1, 32)
    flat = layer(positions, query.flatten(1), key.flatten(1))
    for apart, one in zip(layer(positions, query, key), flat, strict=True):
        assert torch.equal(apart.flatten(1), one) and apart.dim() == 3
    for shape in ((6, 4, 16), (6, 100), (6,), (1, 6, 4, 32)):  # the first has as many numbers as two heads of 32
        told = re.escape(f"must be [T, heads * 32] or [T, heads, 32], got {list(shape)}")
        for name, given in (("query", (torch.randn(shape), key)), ("key", (query, torch.randn(shape)))):
            with pytest.raises(RuntimeError, match=f"^MRotaryEmbedding: {name} {told}"):
                layer(positions, *given)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q, p: apply_rotary_pos_emb(q, q, p, unsqueeze_dim=-2), "_emb: unsqueeze_dim must be 1 or 2, got -2"),
        (lambda q, p: apply_rotary_pos_emb(q, q, q, q), "_emb: rotary must be a Rotary, got Tensor"),
        (lambda q, p: apply_rotary_pos_emb_vision(q[0], q[0], q, q), "_vision: rotary must be a Rotary, got Tensor"),
        (
            lambda q, p: apply_rotary_pos_emb(q, q, p[:, :, :4]),
            r"_emb: position_ids must be \[3, B, S\] or \[B, S\], \[B, S\] = \[2, 5\], got \[3, 2, 4\]",
        ),
        (
            lambda q, p: apply_rotary_pos_emb(q[0], q[0], p),
            r"_emb: q must be \[B, H, S, D\] with one B and one S for q and k, got \[5, 5, 64\]",
        ),
        (
            lambda q, p: apply_rotary_pos_emb(q, q.transpose(0, 1), torch.zeros(1, 1).int(), unsqueeze_dim=2),
            r"_emb: k must be \[B, S, H, D\] with one B and one S for q and k, got \[5, 2, 5, 64\]",
        ),
    ],
    ids=["unsqueeze_dim", "sines", "vision's sines", "positions", "dims", "as many tokens"],
)
def test_calls_that_do_not_fit(call, said):
    with pytest.raises(RuntimeError, match=said):
        call(torch.randn(2, 5, 5, 64), torch.arange(5).expand(3, 2, 5))
