"""Attention at every instruction level: the sizes at which its loops on CPUs part ways."""

import pytest
import torch
from packed_samples import MASKS, assert_definition, sample

from glm4v_ext import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, reference
from glm4v_ext.testing import DTYPES, forced_isa, isa_levels, outputs_and_grads


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", MASKS[1:3], ids=str)
@pytest.mark.parametrize("dim", [5, 33, 72, 128, 256])
def test_isa_levels(level, dtype, options, dim):
    with forced_isa(level):
        assert_definition(sample(([61, 2], [150, 1]), 4, 2, dim, dtype), **options)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window_size": (400, 90), "softcap": 5.0}, {"window_size": (30, 20)}], ids=str
)
def test_long_and_short_sequences(level, dtype, options):  # beyond 1024 rows backward takes larger key blocks
    with forced_isa(level):
        assert_definition(sample(([40, 1031, 7], [601, 805, 7]), 2, 1, 40, dtype), **options)


def error_ratios(inputs, **options):
    """Of the outputs and the gradients: the largest error beyond one ulp, over plain PyTorch's largest."""

    def run(function):
        return lambda *inputs: function(*inputs, **options)

    ours = outputs_and_grads(run(flash_attn_func), inputs)
    plain = outputs_and_grads(run(reference.flash_attn_func), inputs)
    exact = outputs_and_grads(run(reference.flash_attn_func), [x.double() for x in inputs])
    unit = torch.finfo(torch.float32).eps
    return [
        (((a - e).abs() - unit * e.abs()).max() / (p - e).abs().max()).item()
        for a, p, e in zip(ours, plain, exact, strict=True)
    ]


def median_ratios(draw, count, **options):
    return torch.tensor([error_ratios(draw(), **options) for _ in range(count)]).median(0).values


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 15.0}, {"window_size": (31, 7)}], ids=str)
def test_one_query_in_fp32(options, level):
    """Few results have no larger errors of others to hide behind: over many draws they err as plain PyTorch's do."""
    with forced_isa(level):
        median = median_ratios(
            lambda: [torch.randn(2, n, h, 40) for n, h in ((1, 6), (239, 2), (239, 2))], 60, **options
        )
    assert (median <= 1.1).all(), median


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize(
    ("rows", "keys"), [*((64, keys) for keys in (1, 2, 3, 4, 5, 8, 11, 132)), *((rows, 150) for rows in (1, 4, 8))]
)
def test_few_and_large_scores(rows, keys, dim, dtype, level):
    """Backward repeats the bits of the scores: a weight errs by as much as they differ, and a large one by many ulp."""

    def draw():
        return [torch.randn(16, length, 4, dim).to(dtype) for length in (rows, keys, keys)]

    with forced_isa(level):
        if dtype == torch.float32 and rows <= 8:
            # One draw's largest error is a matter of luck, and of torch's products.
            median = median_ratios(draw, 9, softmax_scale=1.0)
            assert (median <= 2).all(), median
        else:
            assert_definition(draw(), flash_attn_func, reference.flash_attn_func, softmax_scale=1.0)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (100, 20)}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("slope", [6.0, -6.0])
def test_rising_scores(slope, options, dtype, level):
    """Later keys outweigh all before them by far more than a float holds, or are nothing beside them."""
    lengths = [300, 41]
    q, k, v, *rest = sample((lengths, lengths), 4, 2, 64, dtype)
    ramp = torch.cat([torch.linspace(0, slope, n) for n in lengths])[:, None, None]
    with forced_isa(level):
        assert_definition([(1 + 0.1 * q).to(dtype), (0.1 * k + ramp).to(dtype), v, *rest], **options)


@pytest.mark.parametrize("level", isa_levels())
def test_denormals_come_back(level):  # inside, results below 2^-126 are flushed
    def third(x):
        return x / 3

    x = torch.full((64,), torch.finfo(torch.float32).tiny)
    expected = third(x)
    assert (expected > 0).all()
    q = torch.randn(1, 40, 2, 64, requires_grad=True)
    with forced_isa(level):
        flash_attn_func(q, q, q).sum().backward()
        flash_attn_with_kvcache(q.detach()[:, :1], q.detach(), q.detach())
    assert torch.equal(third(x), expected)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("group", [1, 3, 12, 13, 24, 40, 250])
def test_tasks_of_whole_vectors(group, level):  # sequences are cut where the lanes of their rows fill vectors
    rows = [1, 15, 17, 192 // group, 192 // group + 1, 500 // group + 7]
    inputs = sample((rows, [n + 2 for n in rows]), group, 1, 8, torch.float32)
    with forced_isa(level):
        assert_definition(inputs, causal=True)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (400, 90)}], ids=str)
def test_any_number_of_threads(options, level):  # more of them than heads share out the key blocks of a head
    inputs = sample(([700, 40, 1100], [900, 40, 700]), 2, 1, 64, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    with forced_isa(level):
        try:
            for count in (1, 2, 3, 8, 8, 8, 20):
                torch.set_num_threads(count)
                results.append(outputs_and_grads(lambda *x: flash_attn_varlen_func(*x, **options), inputs))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 16])
def test_equal_weights_of_many_keys(heads, dtype, level):
    """A sum errs by 2.6e-6, as each weight does (cpu/loops/exp.h), and roundings: nothing grows with the keys."""
    keys = 192 * 40
    q, k, v = (torch.zeros(1, n, h, 64, dtype=dtype) for n, h in ((2, heads), (keys, 1), (keys, 1)))
    v[:, : keys // 2], v[:, keys // 2 :] = 1, -1
    with forced_isa(level):
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
        cached, cached_lse = flash_attn_with_kvcache(q, k, v, num_splits=1, return_softmax_lse=True)
    for values, sums in ((out, lse), (cached, cached_lse)):
        torch.testing.assert_close(sums, torch.full_like(sums, keys).log(), rtol=0, atol=5e-6)
        torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-6)
