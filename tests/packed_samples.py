"""Packed sequences for attention, and its comparison with the definition."""

import torch

from glm4v_ext import flash_attn_varlen_func, reference
from glm4v_ext.testing import assert_as_accurate

MASKS = [
    {},
    {"causal": True},
    {"window_size": (20, 5)},
    {"window_size": (3, 0)},
    {"window_size": (2**63 - 1, 2**63 - 1)},
    {"causal": True, "window_size": (9, 3), "softcap": 5.0, "softmax_scale": 0.3},
]


def offsets(lengths, dtype=torch.int32, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def sample(lengths, heads, kv_heads, dim, dtype, device="cpu", padding=0):
    rows, keys = lengths
    q = torch.randn(sum(rows) + padding, heads, dim, device=device).to(dtype)
    k, v = (torch.randn(sum(keys) + padding, kv_heads, dim, device=device).to(dtype) for _ in "kv")
    return [
        q,
        k,
        v,
        offsets(rows, device=device),
        offsets(keys, device=device),
        max(rows, default=0),
        max(keys, default=0),
    ]


def with_options(function, **options):
    """out and lse of ``function``; a row that sees no key has lse -inf on both sides, which has no error: make it 0."""

    def run(*inputs):
        out, lse, probs = function(*inputs, return_attn_probs=True, **options)
        assert probs is None
        return out, lse.detach().masked_fill(lse == float("-inf"), 0)

    return run


def assert_definition(inputs, function=flash_attn_varlen_func, definition=reference.flash_attn_varlen_func, **options):
    assert_as_accurate(with_options(function, **options), with_options(definition, **options), inputs)
