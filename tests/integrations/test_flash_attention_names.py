"""What flash-attention's users expect of its three functions: names, order of arguments, shapes, and its odd sizes.

Its rule: the error against a definition in higher precision is at most twice that of plain PyTorch in the same dtype.
`tests/ops` holds the ops to more; here stand the sizes and pairings of flash-attention's own grid, gradients included.
"""

import inspect

import pytest
import torch

from glm4v_ext import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, reference
from glm4v_ext.testing import assert_as_accurate, assert_close_to_exact

# Queries, keys, head dim, (heads, kv heads): each pair of sizes once, the others in turn.
GRID = [
    (1, 1, 32, (6, 6)),
    (1, 239, 40, (6, 2)),
    (3, 799, 59, (6, 1)),
    (799, 3, 64, (6, 2)),
    (113, 203, 96, (6, 6)),
    (128, 217, 111, (6, 1)),
    (127, 512, 128, (6, 2)),
    (127, 513, 160, (2, 2)),
    (108, 256, 192, (2, 1)),
    (512, 256, 224, (2, 2)),
    (1023, 1024, 64, (2, 1)),
    (1024, 1023, 256, (1, 1)),
]
MASKS = [{}, {"causal": True}, {"window_size": (31, 7)}, {"causal": True, "softcap": 15.0}]
CASES = [
    (*case, MASKS[(i + shift) % 4], dtype)
    for shift, dtype in enumerate((torch.bfloat16, torch.float16))  # what flash-attention has; tests/ops hold fp32
    for i, case in enumerate(GRID)
    if shift == 0 or i % 2
]


def with_options(function, options):
    return lambda *inputs: function(*inputs, **options)


@pytest.mark.parametrize(("rows", "keys", "dim", "heads", "options", "dtype"), CASES, ids=str)
def test_batched(rows, keys, dim, heads, options, dtype):
    q = torch.randn(2, rows, heads[0], dim).to(dtype)
    k, v = (torch.randn(2, keys, heads[1], dim).to(dtype) for _ in "kv")
    functions = (with_options(f, options) for f in (flash_attn_func, reference.flash_attn_func))
    assert_as_accurate(*functions, [q, k, v])


@pytest.mark.parametrize(("rows", "keys", "dim", "heads", "options", "dtype"), CASES[::3], ids=str)
def test_packed(rows, keys, dim, heads, options, dtype):
    """Three sequences of random lengths up to the size, as flash-attention makes them by unpadding a batch."""
    lengths_q, lengths_k = (torch.randint(max(1, n - 20), n + 1, (3,)) for n in (rows, keys))
    cu_q, cu_k = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in (lengths_q, lengths_k))
    q = torch.randn(int(cu_q[-1]), heads[0], dim).to(dtype)
    k, v = (torch.randn(int(cu_k[-1]), heads[1], dim).to(dtype) for _ in "kv")
    functions = (with_options(f, options) for f in (flash_attn_varlen_func, reference.flash_attn_varlen_func))
    assert_as_accurate(*functions, [q, k, v, cu_q, cu_k, rows, keys])


@pytest.mark.parametrize("page_size", [None, 256])
@pytest.mark.parametrize("new", [0, 1, 5])
@pytest.mark.parametrize(("rows", "keys"), [(1, 128), (1, 339), (3, 799), (64, 256), (3, 1024)])
def test_cached(rows, keys, new, page_size):
    if new > rows:
        new = rows
    lengths = torch.randint(1, keys - new + 1, (2,), dtype=torch.int32)
    shape = (2, keys, 2, 64) if page_size is None else (2 * -(-keys // page_size) + 3, page_size, 2, 64)
    table = None if page_size is None else torch.randperm(shape[0])[: shape[0] - 3].view(2, -1).int()
    q = torch.randn(2, rows, 6, 64).bfloat16()
    caches = [torch.randn(shape).bfloat16() for _ in "kv"]
    added = [torch.randn(2, new, 2, 64).bfloat16() if new else None for _ in "kv"]

    def run(function, dtype):
        inputs = [None if x is None else x.clone().to(dtype) for x in (q, *caches, *added)]
        out = function(*inputs, cache_seqlens=lengths, block_table=table, causal=True)
        return out, inputs[1], inputs[2]

    out, k_cache, v_cache = run(flash_attn_with_kvcache, torch.bfloat16)
    plain, k_plain, v_plain = run(reference.flash_attn_with_kvcache, torch.bfloat16)
    assert_close_to_exact(out, plain, run(reference.flash_attn_with_kvcache, torch.float64)[0])
    assert torch.equal(k_cache, k_plain) and torch.equal(v_cache, v_plain)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            flash_attn_func,
            "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
        ),
        (
            flash_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size "
            "softcap alibi_slopes deterministic return_attn_probs block_table",
        ),
        (
            flash_attn_with_kvcache,
            "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
            "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_signatures(function, names):
    """Packages that detect flash-attention by signature, and calls by position, find the same arguments."""
    assert list(inspect.signature(function).parameters) == names.split()


def test_returned_statistics():
    q, k, v = (torch.randn(2, 5, 3, 16) for _ in "qkv")
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (2, 3, 5) and lse.dtype == torch.float32 and probabilities is None
    cached, cached_lse = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    torch.testing.assert_close(cached, out)
    torch.testing.assert_close(cached_lse, lse)
