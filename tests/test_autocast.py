"""The ops under `torch.autocast`: torch's own two rules, and gradients in the dtype of the leaves."""

import pytest
import torch
from torch import bfloat16, float16, float32, randn

from glm4v_ext import (
    add_rms_norm,
    build_info,
    flash_attn_func,
    flash_attn_with_kvcache,
    interpolate_pos_embed,
    linear,
    merge_patches,
    patch_embed,
    rms_norm,
    rms_norm_add,
    rope_2d,
    rope_3d,
    swiglu,
    token_logprob,
)

GRID, PAIRS, TRIPLES = (
    torch.tensor([[1, 2, 2]]),
    torch.ones(4, 2, dtype=torch.int64),
    torch.ones(3, 4, dtype=torch.int64),
)
HEADS, TARGETS = (4, 2, 8), torch.tensor([0, 3, 1])
LOWER = {
    "linear": (linear, [(3, 8), (4, 8), (4,)]),
    "patch_embed": (patch_embed, [(3, 24), (4, 3, 2, 2, 2), (4,)]),
    "merge_patches": (merge_patches, [(8, 3), (4, 3, 2, 2), (4,)]),
    "flash_attn_varlen": (flash_attn_func, [(1, *HEADS)] * 3),
    "token_logprob": (lambda hidden, weight: token_logprob(hidden, weight, TARGETS), [(3, 8), (5, 8)]),
}
OUTPUT = {"token_logprob": float32}  # where it isn't the dtype worked in
WIDEN = {
    "rms_norm": (rms_norm, [(3, 8), (8,)]),
    "add_rms_norm": (add_rms_norm, [(3, 8), (3, 8), (8,)]),
    "rms_norm_add": (rms_norm_add, [(3, 8), (3, 8), (8,)]),
    "interpolate_pos_embed": (lambda x, table: interpolate_pos_embed(x, table, GRID), [(4, 8), (9, 8)]),
    "rope_2d": (lambda q, k: rope_2d(q, k, PAIRS), [HEADS, HEADS]),
    "rope_3d": (lambda q, k: rope_3d(q, k, TRIPLES, (1, 1, 2), 1e4, 8), [HEADS, HEADS]),
}
NEITHER = {"swiglu", "patchify", "rope_2d_", "rope_3d_"}  # one floating tensor, none, or changed in place


def outputs(found):
    return found if isinstance(found, tuple) else (found,)


def test_every_op_has_a_rule():
    ops = {op for op in build_info()["ops"] if not op.endswith("_backward")}
    assert ops == {*LOWER, *WIDEN, *NEITHER, "flash_attn_with_kvcache"}


@pytest.mark.parametrize("dtype", [bfloat16, float16])
@pytest.mark.parametrize("given", [float32, bfloat16, float16, None], ids=str)
@pytest.mark.parametrize("op", [*LOWER, *WIDEN])
def test_dtypes(op, given, dtype):
    function, shapes = {**LOWER, **WIDEN}[op]
    inputs = [randn(shape).to(given or (float32 if i else bfloat16)) for i, shape in enumerate(shapes)]
    torch.compiler.reset()  # the number of graphs of one function is limited
    expected = dtype if op in LOWER else given or float32
    with torch.autocast("cpu", dtype):
        found = outputs(function(*inputs))
        compiled = outputs(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs))
    cast = outputs(function(*(x.to(expected) for x in inputs)))
    for a, b, c in zip(found, cast, compiled, strict=True):
        assert a.dtype == OUTPUT.get(op, expected) and torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("op", [*LOWER, *WIDEN])
def test_gradients_keep_the_dtype_of_their_leaves(op):
    function, shapes = {**LOWER, **WIDEN}[op]
    leaves = [randn(shape, requires_grad=True) for shape in shapes]
    with torch.autocast("cpu", bfloat16):
        sum(out.float().sum() for out in outputs(function(*leaves))).backward()
    assert all(leaf.grad.dtype == float32 and leaf.grad.isfinite().all() for leaf in leaves)


def test_swiglu_takes_what_it_gets():
    with torch.autocast("cpu", bfloat16):
        assert swiglu(randn(3, 8)).dtype == float32 and swiglu(randn(3, 8).half()).dtype == float16


@pytest.mark.parametrize("cache", [float32, bfloat16])
def test_a_cache_keeps_its_dtype(cache):
    q, k, v = (randn(1, 1, 2, 8).half() for _ in "qkv")
    caches = [randn(1, 4, 2, 8).to(cache) for _ in "kv"]
    again = [x.clone() for x in caches]
    with torch.autocast("cpu", float16):
        found = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=2)
    expected = flash_attn_with_kvcache(q.to(cache), *again, k.to(cache), v.to(cache), cache_seqlens=2)
    assert found.dtype == cache and torch.equal(found, expected)
    assert torch.equal(caches[0], again[0]) and torch.equal(caches[1], again[1])


def test_caches_of_two_dtypes_are_refused():
    # A cast of the second one would have taken the new values in its place.
    q, k, v = (randn(1, 1, 2, 8) for _ in "qkv")
    caches = randn(1, 4, 2, 8).to(bfloat16), randn(1, 4, 2, 8)
    with (
        torch.autocast("cpu", bfloat16),
        pytest.raises(RuntimeError, match=r"^flash_attn_with_kvcache: v_cache must be bfloat16 like q, got float32"),
    ):
        flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=2)
