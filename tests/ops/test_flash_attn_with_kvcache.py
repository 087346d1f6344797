import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from glm4v_ext import flash_attn_with_kvcache, reference
from glm4v_ext.testing import (
    ATTENTION_DTYPES,
    DTYPES,
    assert_close_to_exact,
    attention_cases,
    devices,
    forced_isa,
    isa_levels,
)


def sample(batch, queries, heads, kv_heads, dim, capacity, new=0, dtype=torch.float32, device="cpu", rows=None):
    """Positional arguments q, k_cache, v_cache, k, v with unused cache entries poisoned by the callers."""

    def tensor(*shape):
        return torch.randn(shape, device=device).to(dtype)

    cache = (rows or batch, capacity, kv_heads, dim)
    fresh = [tensor(batch, new, kv_heads, dim), tensor(batch, new, kv_heads, dim)] if new else [None, None]
    return [tensor(batch, queries, heads, dim), tensor(*cache), tensor(*cache), *fresh]


def run(function, inputs, **options):
    """out, lse and both caches after the call, which works on copies."""
    q, k_cache, v_cache, k, v = (x if x is None else x.clone() for x in inputs)
    out, lse = function(q, k_cache, v_cache, k, v, return_softmax_lse=True, **options)
    return out, lse, k_cache, v_cache


def check(inputs, **options):
    wide = [x if x is None else x.double() for x in inputs]
    actual, plain, exact = (
        run(flash_attn_with_kvcache, inputs, **options),
        run(reference.flash_attn_with_kvcache, inputs, **options),
        run(reference.flash_attn_with_kvcache, wide, **options),
    )
    assert_close_to_exact(actual[0], plain[0], exact[0], "out")
    torch.testing.assert_close(
        actual[1], exact[1].float(), rtol=1e-5, atol=1e-5 if inputs[0].dtype == torch.float32 else 2e-2
    )
    for a, e in zip(actual[2:], plain[2:], strict=True):
        assert torch.equal(a.nan_to_num(), e.nan_to_num())  # poison stays where it was


def poison(inputs, lengths):
    for b, n in enumerate(lengths):
        inputs[1][b, n:] = float("nan")
        inputs[2][b, n:] = float("nan")


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("heads", [(32, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("dim", [128, 64, 80, 256, 33])
def test_definition(dim, heads, dtype, device):
    inputs = sample(6, 1, *heads, dim, 300, new=1, dtype=dtype, device=device)
    lengths = torch.tensor([0, 1, 77, 130, 298, 299], dtype=torch.int32, device=device)
    poison(inputs, lengths)
    check(inputs, cache_seqlens=lengths, causal=True)


FEW = [(3, 3), (4, 2), (3, 1), (4, 1), (5, 1), (8, 1), (9, 1)]  # up to four rows are few at the generic level


@pytest.mark.parametrize(
    ("level", "heads"),
    [(level, heads) for level in isa_levels() for heads in (FEW[:4] if level == "generic" else FEW)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(heads, dtype, level):
    lengths = torch.tensor([0, 1, 15, 16, 63, 64, 127, 128, 199])
    with forced_isa(level):
        for dim in (8, 31, 64, 150):
            inputs = sample(len(lengths), 1, *heads, dim, 201, new=1, dtype=dtype)
            poison(inputs, lengths)
            for options in ({}, {"window_size": (20, 0)}, {"softcap": 0.7}, {"cache_leftpad": lengths // 2}):
                check(inputs, cache_seqlens=lengths, causal=True, **options)
            inputs = sample(len(lengths), 2, heads[0], heads[0], dim, 201, new=2, dtype=dtype)
            poison(inputs, lengths)
            check(inputs, cache_seqlens=lengths, causal=True, window_size=(30, 0))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 3])
def test_isa_levels(queries, dtype, level):
    with forced_isa(level):
        for dim in (128, 40):
            inputs = sample(2, queries, 8, 2, dim, 700, new=queries, dtype=dtype)
            lengths = torch.tensor([690, 13])
            poison(inputs, lengths)
            check(inputs, cache_seqlens=lengths, causal=True)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window_size": (20, 0)}, {"window_size": (3, 5)}, {"window_size": (-1, 4), "softcap": 2.0},
    {"window_size": (2**63 - 1, 2**63 - 1)},
    {"softmax_scale": 0.3}, {"softmax_scale": 0.3, "softcap": 2.0}, {"num_splits": 7}, {"num_splits": 1000},
])  # fmt: skip
def test_options(options, dtype, device):
    inputs = sample(2, 5, 6, 2, 64, 150, dtype=dtype, device=device)
    check(inputs, cache_seqlens=torch.tensor([150, 90], device=device), **options)
    check(inputs, cache_seqlens=100, **options)
    check(inputs, cache_seqlens=np.int64(100), **options)
    check(inputs, **options)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_splits(dim, dtype, device):
    inputs = sample(3, 1, 32, 2, dim, 800, new=1, dtype=dtype, device=device)
    lengths = torch.tensor([799, 15, 400], device=device)
    poison(inputs, lengths)
    check(inputs, cache_seqlens=lengths, causal=True, num_splits=50)
    check(inputs, cache_seqlens=lengths, causal=True, num_splits=40, window_size=(300, 0))


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_numbers_of_splits(dim, dtype, device):  # around those whose parts are added at once: 4, 16
    for splits in (1, 2, 4, 5, 15, 16, 17, 33, 64):
        inputs = sample(2, 1, 8, 2, dim, 16 * splits, dtype=dtype, device=device)
        lengths = torch.tensor([16 * splits, 16 * splits - 9], device=device)
        check(inputs, cache_seqlens=lengths, causal=True, num_splits=splits)
    for keys in (128, 129, 513, 1921):
        inputs = sample(1, 1, 16, 1, dim, keys, dtype=dtype, device=device)
        check(inputs, causal=True)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_long_sequence(dtype, device):
    inputs = sample(2, 1, 4, 2, 64, 8500, dtype=dtype, device=device)
    check(inputs, cache_seqlens=torch.tensor([8500, 4097], device=device), causal=True)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_many_queries(dtype, device):  # which fill a device by themselves: one split
    inputs = sample(2, 260, 8, 2, 64, 400, new=3, dtype=dtype, device=device)
    check(inputs, cache_seqlens=torch.tensor([397, 290], device=device), causal=True)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_of_the_cache_and_left_padding(index, device):
    inputs = sample(3, 2, 4, 2, 64, 96, new=2, dtype=torch.bfloat16, device=device, rows=5)
    check(
        inputs,
        cache_seqlens=torch.tensor([40, 94, 7], dtype=index, device=device),
        cache_batch_idx=torch.tensor([4, 0, 2], dtype=index, device=device),
        cache_leftpad=torch.tensor([0, 33, 7], dtype=index, device=device),
        causal=True,
    )


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_left_padding_among_the_new_keys(device, dtype):
    inputs = sample(4, 37, 4, 2, 64, 96, new=37, dtype=dtype, device=device)
    lengths = torch.tensor([0, 0, 5, 20], device=device)
    poison(inputs, lengths)
    check(inputs, cache_seqlens=lengths, cache_leftpad=torch.tensor([3, 36, 42, 41], device=device), causal=True)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("page_size", [16, 48, 256])
def test_pages(page_size, device):
    lengths, new = [200, 17, 0], 3
    inputs = sample(3, new, 32, 2, 128, page_size, new=new, dtype=torch.bfloat16, device=device, rows=50)
    pages = -(-256 // page_size)
    table = torch.randperm(50, device=device)[: 3 * pages].view(3, pages).int()
    check(inputs, cache_seqlens=torch.tensor(lengths, device=device), block_table=table, causal=True)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_queries_without_keys(device, dtype):
    inputs = sample(2, 4, 4, 2, 32, 64, dtype=dtype, device=device)
    lengths = torch.tensor([0, 2], device=device)
    check(inputs, cache_seqlens=lengths, causal=True)
    out, lse, _, _ = run(flash_attn_with_kvcache, inputs, cache_seqlens=lengths, causal=True)
    assert (out[0] == 0).all() and (out[1, :2] == 0).all() and torch.isneginf(lse[0]).all()
    for shape in ((0, 1, 4, 2, 32, 64), (2, 0, 4, 2, 32, 64)):
        empty = sample(*shape, dtype=dtype, device=device)
        assert run(flash_attn_with_kvcache, empty, cache_seqlens=3)[0].numel() == 0


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_views(device, dtype):
    q, k_cache, v_cache, k, v = sample(2, 2, 8, 2, 64, 128, new=2, dtype=dtype, device=device)
    inputs = [q.transpose(1, 2).contiguous().transpose(1, 2), None, None, k.expand(2, 2, 2, 64), v.flip(1)]
    both = torch.stack((k_cache, v_cache), 3)  # keys and values of a head side by side
    options = {"cache_seqlens": 100, "causal": True}
    plain, exact = (
        run(reference.flash_attn_with_kvcache, [x.to(t) for x in (q, k_cache, v_cache, *inputs[3:])], **options)
        for t in (dtype, torch.float64)
    )
    actual = flash_attn_with_kvcache(inputs[0], both[:, :, :, 0], both[:, :, :, 1], *inputs[3:], **options)
    assert_close_to_exact(actual, plain[0], exact[0])
    assert torch.equal(both[:, :, :, 0], plain[2]) and torch.equal(both[:, :, :, 1], plain[3])


@pytest.mark.parametrize("device", devices())
def test_rows_far_apart(device):
    """Beyond 2^31 elements from the first token to the last; nobody touches what lies between."""
    q, k_cache, v_cache, k, v = sample(2, 1, 4, 2, 64, 16, new=1, dtype=torch.bfloat16, device=device)
    step = 2**31 // 31 // 64 * 64 + 64
    memory = torch.empty(32 * step, dtype=torch.bfloat16, device=device)
    strides = (16 * step, step, 64, 1)
    far = [memory[i * 128 :].as_strided(x.shape, strides).copy_(x) for i, x in enumerate((k_cache, v_cache))]
    options = {"cache_seqlens": torch.tensor([3, 15], device=device), "causal": True}
    found, expected = (flash_attn_with_kvcache(q, *cache, k, v, **options) for cache in (far, (k_cache, v_cache)))
    assert torch.equal(found, expected) and torch.equal(far[0], k_cache) and torch.equal(far[1], v_cache)


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4), st.integers(1, 6), st.integers(-1, 40), st.integers(-1, 9),
    st.booleans(), st.sampled_from([(1, 1), (2, 1), (9, 3)]), st.integers(1, 70), st.integers(0, 3),
)  # fmt: skip
def test_any_lengths(lengths, queries, left, right, causal, heads, dim, splits):
    inputs = sample(len(lengths), queries, *heads, dim, 96, new=queries)
    poison(inputs, lengths)
    check(
        inputs, cache_seqlens=torch.tensor(lengths), window_size=(left, right), causal=causal, num_splits=splits
    )  # fmt: skip


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_bits_depend_on_the_sequence_alone(dtype, device):
    inputs = sample(20, 1, 32, 2, 128, 2000, dtype=dtype, device=device)  # fills a GPU, which deals it out another way
    lengths = torch.tensor([2000, 3, 1500, 800, 1999], device=device).repeat(4)
    threads = torch.get_num_threads()
    for splits in (0, 40):
        first = run(flash_attn_with_kvcache, inputs, cache_seqlens=lengths, num_splits=splits)
        try:
            torch.set_num_threads(1)
            second = run(flash_attn_with_kvcache, inputs, cache_seqlens=lengths, num_splits=splits)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        for i in range(5):
            one = [x if x is None else x[i : i + 1] for x in inputs]
            alone = run(flash_attn_with_kvcache, one, cache_seqlens=lengths[i : i + 1], num_splits=splits)
            assert torch.equal(first[0][i : i + 1], alone[0]) and torch.equal(first[1][i : i + 1], alone[1])


@pytest.mark.parametrize("device", devices())
def test_nan_reaches_only_its_row(device):
    inputs = sample(2, 1, 16, 1, 64, 200, dtype=torch.bfloat16, device=device)
    inputs[0][1, 0, 3, 5] = float("nan")
    out = run(flash_attn_with_kvcache, inputs)[0]
    assert out[1, 0, 3].isnan().all() and int(out.isnan().sum()) == 64
    inputs = sample(2, 1, 16, 1, 64, 200, dtype=torch.bfloat16, device=device)
    inputs[2][0, 7, 0, 9] = float("nan")
    out = run(flash_attn_with_kvcache, inputs)[0]
    assert out[0, 0, :, 9].isnan().all() and int(out.isnan().sum()) == 16


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    q, k_cache, v_cache, k, v = sample(2, 1, 4, 2, 32, 64, 1, ATTENTION_DTYPES[device][0], device)
    lengths = torch.tensor([5, 63], dtype=torch.int32, device=device)
    op = torch.ops.glm4v_ext.flash_attn_with_kvcache
    rest = (None, None, lengths, None, None, None, None, True, -1, -1, 0.0, None, 0)
    torch.library.opcheck(op, (q, k_cache, v_cache, k, v, *rest))

    def step(q, k_cache, v_cache, k, v, lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    a, b = [k_cache.clone(), v_cache.clone()], [k_cache.clone(), v_cache.clone()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, *a, k, v, lengths), step(q, *b, k, v, lengths))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_refuses_gradients():
    q, k_cache, v_cache, k, v = sample(2, 1, 4, 2, 32, 64, new=1)
    for name, tensor in {"q": q, "k_cache": k_cache, "v": v}.items():
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match=rf"{name} must not require grad, .*; use flash_attn_varlen_func"):
            flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3)
        with torch.no_grad():
            flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3)
        tensor.requires_grad_(False)
    y = torch.ones_like(k_cache, requires_grad=True) * k_cache
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_errors_name_the_argument_and_write_nothing():
    q, k_cache, v_cache, k, v = sample(2, 1, 4, 2, 32, 64, new=1)
    before = k_cache.clone()
    full = torch.tensor([3, 64])
    cases = [
        ({"cache_seqlens": full}, "and at most the cache's capacity 64 less the new tokens 1, got 64 in row 1"),
        ({"cache_seqlens": torch.tensor([3, 2**63 - 1])}, f"less the new tokens 1, got {2**63 - 1} in row 1"),
        ({}, "cache_seqlens must be given with k, got None"),
        ({"cache_seqlens": 1, "rotary_cos": torch.zeros(64, 16)}, "rotary_cos must be None"),
        ({"cache_seqlens": 1, "rotary_sin": torch.zeros(64, 16)}, "rotary_sin must be None"),
        ({"cache_seqlens": 1, "alibi_slopes": torch.zeros(4)}, "alibi_slopes must be None, got a tensor"),
        ({"cache_seqlens": 2**40}, f"less the new tokens 1, got {2**40} in row 0"),
        ({"cache_seqlens": -1}, "cache_seqlens must be at least 0 and at most .*, got -1 in row 0"),
        ({"cache_seqlens": torch.tensor([1.0, 2.0])}, "cache_seqlens must be int32 or int64, got float32"),
        ({"cache_seqlens": torch.tensor([1])}, r"cache_seqlens must be \[B\] = \[2\], got \[1\]"),
        (
            {"cache_seqlens": 4, "cache_leftpad": torch.tensor([0, 6])},
            "cache_leftpad must be 0 to the keys after the append, 5, got 6 in row 1",
        ),
        (
            {"cache_seqlens": 4, "cache_batch_idx": torch.tensor([1, 1])},
            "cache_batch_idx must name each row once when k is given, got 1 twice",
        ),
        (
            {"cache_seqlens": 4, "cache_batch_idx": torch.tensor([1, 2])},
            "cache_batch_idx must index the 2 rows of k_cache, got 2 in row 1",
        ),
        (
            {"cache_seqlens": 4, "block_table": torch.tensor([[0], [7]])},
            "block_table must index the 2 pages of k_cache, got 7 in row 1",
        ),
        (
            {"cache_seqlens": 4, "softcap": -1.0},
            "softcap must be 0 .off., or positive and finite in float32, got -1",
        ),
        ({"cache_seqlens": 4, "softmax_scale": -0.2}, "softmax_scale must be positive and finite in float32, got -0.2"),
        ({"cache_seqlens": 4, "window_size": (-2, 0)}, r"window_size must be \(left, right\), .*, got \(-2, 0\)"),
        ({"cache_seqlens": 4, "window_size": 5}, r"window_size must be \(left, right\), two whole numbers, got 5"),
        ({"cache_seqlens": 4, "num_splits": -1}, "num_splits must be at least 0, got -1"),
    ]
    for options, text in cases:
        with pytest.raises(RuntimeError, match="^flash_attn_with_kvcache: .*" + text):
            flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    shared, both = torch.zeros(1, 64, 2, 32).expand(2, -1, -1, -1), torch.zeros(2, 64, 3, 32)
    for caches, text in (
        ((shared, v_cache), r"k_cache must have no overlap where k is given, got strides \[0, 64, 32, 1\]"),
        ((k_cache, v_cache.as_strided(v_cache.shape, (2048, 32, 32, 1))), "v_cache must have no overlap where k is"),
        ((k_cache, k_cache), "v_cache must have memory of its own where k is given, got that of k_cache"),
        ((both[:, :, :2], both[:, :, 1:]), "v_cache must have memory of its own where k is given, got that of k_cache"),
    ):
        with pytest.raises(RuntimeError, match="^flash_attn_with_kvcache: " + text):
            flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=3)
        flash_attn_with_kvcache(q, *caches, cache_seqlens=3)  # nothing is written
    inside, queries = slice(5, 6), k_cache[:, 6:8].view(q.shape)
    for inputs, text in (
        ((q, k_cache[:, inside], v), "k must have memory of its own where k is given, got that of k_cache"),
        ((q, v_cache[:, inside], v), "k must have memory of its own where k is given, got that of v_cache"),
        ((q, k, k_cache[:, inside]), "v must have memory of its own where k is given, got that of k_cache"),
        ((q, k, v_cache[:, inside]), "v must have memory of its own where k is given, got that of v_cache"),
        ((queries, k, v), "q must have memory of its own where k is given, got that of k_cache"),
    ):
        with pytest.raises(RuntimeError, match="^flash_attn_with_kvcache: " + text):
            flash_attn_with_kvcache(inputs[0], k_cache, v_cache, *inputs[1:], cache_seqlens=3)
    flash_attn_with_kvcache(queries, k_cache, v_cache, cache_seqlens=3)
    table = torch.tensor([[0], [1]])
    with pytest.raises(RuntimeError, match="page size that is a multiple of 16, got 40"):
        flash_attn_with_kvcache(q, k_cache[:, :40], v_cache[:, :40], block_table=table)
    with pytest.raises(RuntimeError, match="k_cache must be float16 like q, got float32"):
        flash_attn_with_kvcache(q.half(), k_cache, v_cache)
    with pytest.raises(RuntimeError, match="v must be given exactly when k is, got k without v"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, cache_seqlens=3)
    with pytest.raises(RuntimeError, match=r"head dim D of 1 to 256, got 264"):
        flash_attn_with_kvcache(*sample(1, 1, 1, 1, 264, 16)[:3])
    with pytest.raises(RuntimeError, match="v_cache must be contiguous in its last dim, got stride 2"):
        flash_attn_with_kvcache(q[..., :16], k_cache[..., :16], v_cache[..., ::2])
    assert torch.equal(before, k_cache)


@torch.no_grad()
def test_compiled_with_caches_in_one_tensor():
    """Whose parts begin where dynamic sizes say."""

    def layers(q, caches, k, v, cache_seqlens):
        for k_cache, v_cache in zip(*caches.unbind(1), strict=True):
            q = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True)
        k_cache, v_cache = caches[:, 0].unbind(0)
        return q, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=cache_seqlens)

    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(layers, fullgraph=True, dynamic=True)
        for capacity in (20, 31):
            caches = torch.randn(2, 2, 3, capacity, 2, 8)
            q, k, v = torch.randn(3, 1, 4, 8), torch.randn(3, 1, 2, 8), torch.randn(3, 1, 2, 8)
            ours, theirs = caches.clone(), caches.clone()
            given = (k, v, torch.tensor([3, 0, 7]))
            torch.testing.assert_close(compiled(q, ours, *given), layers(q, theirs, *given), rtol=0, atol=0)
            assert torch.equal(ours, theirs) and not torch.equal(ours, caches)


@torch.no_grad()
@pytest.mark.parametrize("device", devices())
def test_traced_with_a_length_of_dynamic_sizes(device):
    class Step(torch.nn.Module):
        def forward(self, q, k_cache, v_cache):
            return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=k_cache.shape[1] - 1)

    dtype = ATTENTION_DTYPES[device][0]
    some, others = (sample(2, 1, 4, 2, 32, capacity, dtype=dtype, device=device)[:3] for capacity in (20, 31))
    capacity = {1: torch.export.Dim("capacity", min=2, max=64)}
    exported = torch.export.export(Step(), tuple(some), dynamic_shapes=({}, capacity, capacity), strict=False)
    for traced in (exported.module(), make_fx(Step(), tracing_mode="symbolic")(*some)):
        assert torch.equal(traced(*others), Step()(*others))
