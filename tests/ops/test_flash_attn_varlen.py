"""Every case compares with the definition through flash-attention's rule; see glm4v_ext/testing.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_samples import MASKS, assert_definition, offsets, sample, with_options
from torch._dynamo.testing import CompileCounterWithBackend

from glm4v_ext import flash_attn_func, flash_attn_varlen_func, reference
from glm4v_ext.testing import (
    ATTENTION_DTYPES,
    assert_as_accurate,
    assert_close_to_exact,
    assert_repeatable,
    attention_cases,
    devices,
    forced_isa,
    isa_levels,
    outputs_and_grads,
)

LENGTHS = ([1, 70, 0, 33, 130], [5, 64, 3, 0, 141])  # queries and keys of each sequence


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 64), (4, 1, 80), (6, 2, 96), (2, 1, 128), (1, 1, 128), (3, 3, 7)]
)
def test_definition(heads, kv_heads, dim, options, dtype, device):
    assert_definition(sample(LENGTHS, heads, kv_heads, dim, dtype, device, padding=3), **options)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_long_sequences(device, dtype):  # several key blocks and query tiles in forward and backward
    assert_definition(sample(([300], [530]), 2, 1, 64, dtype, device), causal=True)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(("group", "dim"), [(1, 16), (3, 16), (16, 16), (200, 16), (3, 64), (16, 64), (16, 88)])
def test_grouped_heads(group, dim, device):
    assert_definition(sample(([9, 30], [30, 31]), 2 * group, 2, dim, torch.bfloat16, device), causal=True)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("dim", [24, 64, 72, 128])
def test_neighbours_do_not_leak(dim, dtype, device):
    lengths = ([70, 9, 130], [33, 150, 5])
    inputs = sample(lengths, 4, 2, dim, dtype, device, padding=40)
    alone = outputs_and_grads(flash_attn_varlen_func, inputs)
    poisoned = [x.clone() for x in inputs[:3]]
    for x, middle in zip(poisoned, (slice(70, 79), slice(33, 183), slice(33, 183)), strict=True):
        x[middle] = x[-40:] = float("nan")
    beside = outputs_and_grads(flash_attn_varlen_func, [*poisoned, *inputs[3:]])
    for result, expected, middle in zip(beside, alone, [slice(70, 79)] * 2 + [slice(33, 183)] * 2, strict=True):
        assert result[middle].isnan().any()
        result[middle] = expected[middle]
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize("causal", [False, True])
def test_batched(dtype, causal, device):
    q, k, v = (torch.randn(2, s, h, 40, device=device).to(dtype) for s, h in ((21, 4), (37, 2), (37, 2)))
    assert_definition([q, k, v], flash_attn_func, reference.flash_attn_func, causal=causal)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), min_size=1, max_size=5),
    window=st.tuples(st.integers(-1, 50), st.integers(-1, 50)),
    causal=st.booleans(),
)
def test_any_sequences_and_window(lengths, window, causal):
    rows, keys = ([pair[i] for pair in lengths] for i in range(2))
    inputs = sample((rows, keys), 2, 1, 24, torch.float32, padding=1)
    options = {"window_size": window, "causal": causal}
    # Few tokens: plain PyTorch's error may be 0, so the rule has no bound to offer. torch's own tolerance of fp32 does.
    actual, expected = (
        outputs_and_grads(with_options(f, **options), inputs)
        for f in (flash_attn_varlen_func, reference.flash_attn_varlen_func)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_packed_qkv_and_expanded_gradients(device, dtype):
    qkv = torch.randn(50, 3, 4, 32, device=device).to(dtype)
    cu = offsets([20, 30], torch.int64, device)
    assert_definition([*qkv.unbind(1), cu, cu, 30, 30])
    assert_definition([*qkv.permute(0, 2, 3, 1).unbind(-1), cu, cu, 30, 30])  # last dim not dense
    packed, definition = (
        lambda x, f=f: f(*x.unbind(1), cu, cu, 30, 30)
        for f in (flash_attn_varlen_func, reference.flash_attn_varlen_func)
    )
    assert_as_accurate(packed, definition, [qkv], expanded=True)  # the gradient arrives with stride 0


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
@pytest.mark.parametrize(("size", "dim"), [(16, 32), (48, 64), (64, 64), (256, 128)])
def test_pages(size, dim, dtype, device):
    q, *_, cu_q, cu_k, max_q, max_k = sample(
        ([7, 1, 70], [40 * size // 16, 0, 33 * size // 16]), 4, 2, dim, dtype, device
    )
    k, v = (torch.randn(9, size, 2, dim, device=device).to(dtype) for _ in "kv")
    table = torch.randperm(9, device=device).view(3, 3).to(torch.int32)
    inputs = [q, k, v, cu_q, cu_k, max_q, max_k]
    with torch.no_grad():
        outs = [
            with_options(f, causal=True, block_table=table)(*x)
            for f, x in (
                (flash_attn_varlen_func, inputs),
                (reference.flash_attn_varlen_func, inputs),
                (reference.flash_attn_varlen_func, [q.double(), k.double(), v.double(), *inputs[3:]]),
            )
        ]
    for actual, plain, exact in zip(*outs, strict=True):
        assert_close_to_exact(actual, plain, exact)


@pytest.mark.parametrize(("device", "dtype"), attention_cases())
def test_rows_without_keys_and_padding(dtype, device):
    inputs = sample(([6, 4], [3, 0]), 2, 1, 16, dtype, device, padding=2)
    out, lse, dq, dk, dv = outputs_and_grads(
        lambda *x: flash_attn_varlen_func(*x, causal=True, return_attn_probs=True)[:2], inputs
    )
    blind = [0, 1, 2, 6, 7, 8, 9, 10, 11]  # bottom right: three rows too many, a sequence without keys, the padding
    seen = [3, 4, 5]
    assert (out[blind] == 0).all() and (lse[:, blind] == float("-inf")).all() and (dq[blind] == 0).all()
    assert (out[seen] != 0).all() and lse[:, seen].isfinite().all()
    assert (dk[3:] == 0).all() and (dv[3:] == 0).all()


@pytest.mark.parametrize("device", devices())
def test_nothing_at_all(device):
    for lengths in ([], []), ([0, 0], [0, 3]):
        inputs = sample(lengths, 2, 1, 16, ATTENTION_DTYPES[device][0], device)
        out, dq, dk, dv = outputs_and_grads(flash_attn_varlen_func, inputs)
        assert out.shape == dq.shape == (0, 2, 16) and dk.shape == dv.shape == inputs[1].shape and not dk.any()


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(flash_attn_varlen_func, sample(([200, 37], [200, 90]), 4, 1, 64, torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dim", [64, 80])
def test_one_graph_for_all_lengths(dim, device):
    """Captured once for so many tokens and sequences, it serves fewer: the rest is padding and empty sequences."""
    q, k, v, *_ = sample(([200], [200]), 4, 2, dim, torch.bfloat16, device)
    dout = torch.randn_like(q)
    cu = offsets([200, 0, 0, 0], device=device)

    def both(cu):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn_varlen_func(*leaves, cu, cu, 200, 200, causal=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    graph = None
    if device == "cuda":
        warming, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warming):
            both(cu)
        torch.cuda.current_stream().wait_stream(warming)
        with torch.cuda.graph(graph):
            captured = both(cu)
    for lengths in ([200, 0, 0, 0], [70, 0, 129, 1], [3, 5, 0, 0], [0, 0, 0, 0]):
        cu.copy_(offsets(lengths))
        if graph:
            graph.replay()
        results, expected = captured if graph else both(cu), both(offsets(lengths, device=device))
        for found, alone in zip(results, expected, strict=True):
            assert torch.equal(found, alone) and not found[sum(lengths) :].any()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dim", [64, 80])
def test_rows_far_apart(dim, device):
    """Beyond 2^31 elements from the first row to the last; nobody touches what lies between."""
    shape, step = (20, 4, dim), 2**31 // 19 // 64 * 64 + 64
    memory = torch.empty(20 * step, dtype=torch.bfloat16, device=device)
    near = [torch.randn(shape, device=device).bfloat16() for _ in "qkv"]
    far = [memory[i * 4 * dim :].as_strided(shape, (step, dim, 1)).copy_(x) for i, x in enumerate(near)]
    cu = offsets([9, 11], device=device)

    def both(qkv):
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = flash_attn_varlen_func(*leaves, cu, cu, 11, 11, causal=True)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    for a, b in zip(both(far), both(near), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    q, k, v, *index = sample(([6, 11], [11, 9]), 4, 2, 24, ATTENTION_DTYPES[device][0], device)
    for x in (q, k, v):
        x.requires_grad_()
    options = (0.0, None, True, -1, -1, 0.0, None, None)
    torch.library.opcheck(torch.ops.glm4v_ext.flash_attn_varlen, (q, k, v, *index, *options))
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, *index), flash_attn_varlen_func(q, k, v, *index))
    batched = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(batched(q[None], k[None], v[None]), flash_attn_func(q[None], k[None], v[None]))


def test_compiled_once_for_all_lengths():
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn_varlen_func, fullgraph=True, dynamic=True, backend=counted)
    counts = []
    for tokens in (5, 8, 13, 21):
        inputs = sample(([tokens], [tokens]), 2, 1, 8, torch.float32)
        torch.testing.assert_close(compiled(*inputs), flash_attn_varlen_func(*inputs))
        counts.append(counted.frame_count)  # the first call may begin twice, once it knows which ints are constants
    assert len(set(counts)) == 1


@pytest.mark.parametrize("device", devices())
def test_nan_reaches_only_the_rows_that_see_it(device):
    q, k, v, *index = sample(([8, 8], [8, 8]), 2, 1, 16, ATTENTION_DTYPES[device][0], device)
    q[3, 0, 5] = k[12, 0, 3] = float("nan")
    out = flash_attn_varlen_func(q, k, v, *index, causal=True)
    poisoned = torch.zeros(16, 2, dtype=torch.bool, device=device)
    poisoned[3, 0] = True
    poisoned[12:] = True  # the second sequence's rows from its key 4 on
    assert (out.isnan().all(-1) == poisoned).all() and (out.isnan().any(-1) == poisoned).all()


def test_extreme_scores():
    q, k, v, *index = sample(([16], [40]), 1, 1, 16, torch.float32)
    assert_definition([q * 4, k * 4, v, *index])
    assert flash_attn_varlen_func(q * 1e15, k * 1e15, v, *index).isfinite().all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dropout_p": 0.1}, "flash_attn_varlen: dropout_p must be 0, got 0.1"),
        ({"alibi_slopes": torch.zeros(4)}, "flash_attn_varlen: alibi_slopes must be None, got a tensor"),
        ({"softmax_scale": -1.0}, "softmax_scale must be positive and finite in float32, got -1"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive and finite in float32, got 0"),
        (
            {"softmax_scale": 1e-300},
            "softmax_scale must be positive and finite in float32, got 1e-300",
        ),
        (
            {"softmax_scale": math.inf},
            "softmax_scale must be positive and finite in float32, got inf",
        ),
        ({"softcap": -1.0}, r"softcap must be 0 .off., or positive and finite in float32, got -1"),
        (
            {"softcap": math.inf},
            r"softcap must be 0 .off., or positive and finite in float32, got inf",
        ),
        ({"window_size": (1,)}, r"flash_attn_varlen_func: window_size must be \(left, right\), .*, got \(1,\)"),
        ({"window_size": None}, r"flash_attn_varlen_func: window_size must be \(left, right\), .*, got None"),
        ({"window_size": (-2, 0)}, r"flash_attn_varlen: window_size must be \(left, right\), .*, got \(-2, 0\)"),
        ({"window_size": (None, 0)}, r"flash_attn_varlen_func: window_size must be .*, got \(None, 0\)"),
        ({"q": torch.zeros(10, 4, 257)}, r"flash_attn_varlen: q must be \[Tq, H, D\] with D from 1 to 256, got"),
        (
            {"q": torch.zeros(10, 3, 8)},
            r"k must be \[Tk, K, D\] with K a divisor of the 3 heads of q, got \[10, 2, 8\]",
        ),
        ({"v": torch.zeros(9, 2, 8)}, r"flash_attn_varlen: v must be \[Tk, K, D\] = \[10, 2, 8\], got \[9, 2, 8\]"),
        ({"k": torch.zeros(10, 2, 8).half()}, "flash_attn_varlen: k must be float32 like q, got float16"),
        ({"cu_seqlens_q": torch.tensor([0, 6.0])}, "cu_seqlens_q must be int32 or int64, got float32"),
        ({"cu_seqlens_q": torch.tensor([0, 6, 4])}, r"cu_seqlens_k must be \[N \+ 1\] = \[3\], got \[2\]"),
        ({"cu_seqlens_k": torch.tensor([0, 11])}, "cu_seqlens_k must be at most the 10 tokens given, got 11"),
        ({"cu_seqlens_k": torch.tensor([1, 5])}, "cu_seqlens_k must be ascending from 0, got first value 1"),
        ({"max_seqlen_q": 9}, "max_seqlen_q must be at least the longest sequence, 10, got 9"),
    ],
)
def test_errors_name_the_argument(change, text):
    arguments = {
        "q": torch.zeros(10, 4, 8),
        "k": torch.zeros(10, 2, 8),
        "v": torch.zeros(10, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 10]),
        "cu_seqlens_k": torch.tensor([0, 10]),
        "max_seqlen_q": 10,
        "max_seqlen_k": 10,
    }
    with pytest.raises(RuntimeError, match=text):
        flash_attn_varlen_func(**{**arguments, **change})


@pytest.mark.parametrize(
    ("page_size", "table", "text"),
    [
        (24, torch.zeros(1, 1), r"page_size a multiple of 16, got \[2, 24, 1, 8\]"),
        (16, torch.zeros(1, 1), "block_table must be int32 or int64, got float32"),
        (
            16,
            torch.zeros(2, 1, dtype=torch.int32),
            r"block_table must be \[N, pages per sequence\] = \[1, \*\], got \[2, 1\]",
        ),
        (16, torch.zeros(1, 1, dtype=torch.int32), "block_table must have 2 columns for the longest sequence, got 1"),
        (16, torch.tensor([[0, 2]]), "block_table must hold pages from 0 to 1, got 2"),
    ],
)
def test_errors_of_pages(page_size, table, text):
    q, pages, cu = torch.zeros(3, 1, 8), torch.zeros(2, page_size, 1, 8), torch.tensor([0, 3])
    with pytest.raises(RuntimeError, match=text):
        flash_attn_varlen_func(q, pages, pages, cu, torch.tensor([0, 20]), 3, 20, block_table=table)


def test_more_keys_than_any_pages_hold():
    q, pages, cu, keys = torch.zeros(3, 1, 8), torch.zeros(2, 16, 1, 8), torch.tensor([0, 3]), 2**63 - 1
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"must have {2**59} columns for the longest sequence, got 2"):
        flash_attn_varlen_func(q, pages, pages, cu, torch.tensor([0, keys]), 3, keys, block_table=table)


def test_pages_have_no_gradient():
    q, pages, cu = torch.zeros(3, 1, 8, requires_grad=True), torch.zeros(2, 16, 1, 8), torch.tensor([0, 3])
    out = flash_attn_varlen_func(q, pages, pages, cu, cu, 3, 3, block_table=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="block_table must be None where gradients are wanted"):
        out.sum().backward()


def test_sequences_of_one_length_must_fit_together():
    # The packed tokens alone would be attended to, but not those that the caller meant.
    q, k = torch.zeros(2, 4, 2, 8), torch.zeros(2, 6, 2, 8)
    for wrong in (torch.zeros(3, 6, 2, 8), torch.zeros(2, 6, 2, 9)):
        with pytest.raises(RuntimeError, match=r"^flash_attn_func: k must be \[B, Sk, K, D\] = \[2, .*8\], got \["):
            flash_attn_func(q, wrong, wrong)
    for wrong in (torch.zeros(2, 5, 2, 8), torch.zeros(2, 6, 1, 8)):
        with pytest.raises(RuntimeError, match=r"^flash_attn_func: v must be \[B, Sk, K, D\] = \[2, 6, 2, 8\], got \["):
            flash_attn_func(q, k, wrong)
    with pytest.raises(RuntimeError, match=r"^flash_attn_func: q must be \[B, Sq, H, D\], got \[4, 2, 8\]"):
        flash_attn_func(q[0], k, k)
    for wrong, found in ((None, "NoneType"), (k[0], r"\[6, 2, 8\]")):
        with pytest.raises(RuntimeError, match=rf"^flash_attn_func: k must be \[B, Sk, K, D\], got {found}$"):
            flash_attn_func(q, wrong, wrong)
    with pytest.raises(RuntimeError, match=r"^flash_attn_func: q must be \[B, Sq, H, D\] with D from 1 to 256, got"):
        flash_attn_func(*[torch.zeros(2, 4, 2, 257)] * 3)
    for heads in (0, 3, 4):
        few = torch.zeros(2, 6, heads, 8)
        with pytest.raises(RuntimeError, match=r"^flash_attn_func: k must be .* K a divisor of the 2 heads of q, got"):
            flash_attn_func(q, few, few)


# bf16 at the amx level has loops of its own: 32 rows by 128 keys, keys packed 1024 at a time. Elsewhere these are more
# odd sizes.
TILE_OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (70, 9)},
    {"softmax_scale": 2.0, "causal": True},
    {"softcap": 9.0},
]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dim", [17, 80, 96, 128, 256])
@pytest.mark.parametrize("options", TILE_OPTIONS, ids=str)
def test_tiles(dim, options, device):
    assert_definition(sample(([33, 100, 1, 64], [1091, 129, 64, 31]), 4, 2, dim, torch.bfloat16, device), **options)


# So has fp32 there, for long sequences: keys packed 512 at a time, rows of a head in chunks.
@pytest.mark.parametrize("dim", [64, 77, 128, 250])
@pytest.mark.parametrize("options", TILE_OPTIONS, ids=str)
def test_tiles_of_fp32(dim, options):
    assert_definition(sample(([330, 700, 33, 0], [330, 800, 129, 5]), 4, 2, dim, torch.float32, "cpu"), **options)


def test_tiles_of_fp32_take_many_rows():
    assert_definition(sample(([1300], [270]), 2, 1, 64, torch.float32, "cpu"), window_size=(900, 300))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (200, 40)}], ids=str)
def test_threads_share_long_sequences_and_change_nothing(options):
    inputs = sample(([700, 300], [700, 450]), 2, 1, 64, torch.float32, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(outputs_and_grads(with_options(flash_attn_varlen_func, **options), inputs))
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        for a, b in zip(one, found[0], strict=True):
            assert torch.equal(a, b)


# What fp32 has and three bf16 parts have not: only the head where it stands goes another way.
@pytest.mark.skipif("amx" not in isa_levels(), reason="needs a CPU with AMX")
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 3e38, 2.0**70, 2.0**-120])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_tiles_leave_extreme_numbers_alone(where, number):
    q, k, v, dout = (torch.randn(600, 3, 64) for _ in range(4))
    x = {"q": q, "k": k, "v": v, "dout": dout}[where]

    def results():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = flash_attn_func(*(t[None] for t in leaves))[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    clean = results()
    x[30, 1] = number
    if number < 1:
        x[:, 1, 5] = number  # a whole column
    actual = results()
    with forced_isa("avx512_bf16"):
        other = results()
    # of a forward: scores may be as small as they like, and 2^70 is not too large
    if (where == "v" and number < 1) or (where != "dout" and not number < 1e30):
        assert torch.equal(actual[0][:32, 1].nan_to_num(7), other[0][:32, 1].nan_to_num(7))
    for a, b, c in zip(actual, other, clean, strict=True):
        largest = b[:, 1].nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(a[:, 1], b[:, 1], rtol=1e-5, atol=1e-5 * largest, equal_nan=True)
        assert torch.equal(a[:, ::2], c[:, ::2])
