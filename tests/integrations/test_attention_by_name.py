"""Other models than GLM's whose attention was asked for by name: softcap, and values of another head dim than queries.

Each is held against transformers' own attention in plain PyTorch.
"""

from types import SimpleNamespace

import pytest
import torch
from families import GREEDY
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Gemma2Config, Gemma2ForCausalLM

from glm4v_ext.integrations.attention import attention
from glm4v_ext.integrations.transformers import register_attention

pytestmark = pytest.mark.long

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MLA = DeepseekV3Config(
    **SIZES, num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=16, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
CAPPED = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=32, attn_logit_softcapping=2.0)
PADDINGS = {
    "none": [[1] * 9] * 2,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9],
    "between": [[1, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 9],
}


def make(config, name):
    register_attention()
    torch.manual_seed(0)
    kind = DeepseekV3ForCausalLM if config is MLA else Gemma2ForCausalLM
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = name
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(params=["sdpa", "eager"])
def mla(request):
    return make(MLA, request.param), make(MLA, "glm4v_ext")


@pytest.mark.parametrize("mask", PADDINGS.values(), ids=PADDINGS)
def test_values_of_another_head_dim(mla, mask):
    ids, mask = torch.randint(1, 100, (2, 9)), torch.tensor(mask)
    stock, ours = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in mla)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    outs = zip((stock, ours), mla, strict=True)
    stock, ours = (torch.autograd.grad(out.square().mean(), list(model.parameters())) for out, model in outs)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mask", [PADDINGS["none"], PADDINGS["left"]], ids=["none", "left"])
def test_values_of_another_head_dim_in_generation(mla, mask):
    ids, mask = torch.randint(1, 100, (2, 9)), torch.tensor(mask)
    answers = [model.generate(ids, attention_mask=mask, **GREEDY) for model in mla]
    assert torch.equal(*answers)


@torch.no_grad()
def test_values_of_another_head_dim_behind_a_cache_and_packed(mla):
    ids = torch.randint(1, 100, (1, 12))
    whole = mla[0](input_ids=ids).logits
    first = mla[1](input_ids=ids[:, :5], use_cache=True)
    rest = mla[1](input_ids=ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), whole, rtol=1e-4, atol=1e-4)
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    packed = mla[1](input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 7:], mla[0](input_ids=ids[:, 7:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (16, 24)])
def test_scores_are_scaled_by_the_queries_head_dim(dim, value_dim, scaling):
    q, k, v = torch.randn(2, 4, 7, dim), torch.randn(2, 2, 7, dim), torch.randn(2, 2, 7, value_dim)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    out, _ = attention(SimpleNamespace(is_causal=True), q, k, v, None, scaling=scaling)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain.transpose(1, 2))


def test_softcap():
    ids = torch.randint(1, 100, (2, 9))
    every = Gemma2Config.from_dict({**CAPPED.to_dict(), "layer_types": ["full_attention"] * 2})
    stock, ours = (make(every, name)(input_ids=ids).logits for name in ("eager", "glm4v_ext"))
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_softcap_beside_a_mask_of_all_pairs():
    """As windows are. Nobody asked for sdpa, whose own error is of it."""
    expected = (
        "attention: softcap must be None beside a mask of all pairs or dropout, which attn_implementation 'glm4v_ext' "
        "leaves to sdpa, got 2.0 of Gemma2Attention: 'eager' takes both"
    )
    with pytest.raises(RuntimeError) as error:
        make(CAPPED, "glm4v_ext")(input_ids=torch.randint(1, 100, (2, 9)))
    assert str(error.value) == expected
    q, module = torch.randn(1, 2, 5, 8), torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r"^attention: softcap must be None beside .*, got 3.0 of Identity: 'eager'"):
        attention(module, q, q, q, None, dropout=0.1, softcap=3.0)
    seen = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    off, none = (attention(module, q, q, q, seen, softcap=softcap)[0] for softcap in (0.0, None))
    assert torch.equal(off, none)
