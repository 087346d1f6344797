import pytest
import torch

from glm4v_ext import _C, build_info, linear, reference
from glm4v_ext.testing import (
    DTYPES,
    FEW_ROWS,
    assert_accurate_product,
    assert_as_accurate,
    assert_close_to_exact,
    assert_repeatable,
    assert_takes_expanded_gradients,
    assert_traceable,
    devices,
    forced_isa,
    forced_product,
    isa_levels,
)

# M, K, N and whether there is a bias
SHAPES = [
    (1, 7, 5, True),
    (3, 64, 48, False),
    (33, 129, 65, True),
    (1, 300, 1, True),
    (9, 1, 17, False),
    (0, 5, 6, True),
]

TILES = "glm4v_ext on tiles"
needs_tiles = pytest.mark.skipif("amx" not in isa_levels(), reason="needs a CPU with AMX")


def sample(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    m, k, n, bias = shape
    x, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return [x, weight, *([torch.randn(n, device=device).to(dtype)] if bias else [])]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_accurate_product(linear, reference.linear, sample(shape, dtype, device))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(linear, reference.linear, sample((19, 77, 50, True), dtype))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 6, 16])
def test_few_rows(m, dtype, level):
    with forced_isa(level):
        for k, n in ((1500, 21), (9001, 8), (64, 8), (33, 3)):  # with and without whole cache lines, blocks and vectors
            assert_as_accurate(linear, reference.linear, sample((m, k, n, m % 2 == 0), dtype))


# On a GPU up to 16 rows of 16 bits have a product of their own: one and two halves of 8, whole groups of 16 outputs and
# not, inputs of a part of a turn of the warps, of a whole one, and of more.
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17])
def test_rows_of_a_decoder(m, dtype, device):
    for k, n, bias in ((8, 1, True), (24, 16, False), (1024, 17, True), (2120, 33, False)):
        assert_accurate_product(linear, reference.linear, sample((m, k, n, bias), dtype, device))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rows_of_a_decoder_may_be_views(dtype, device):
    x, weight, bias = sample((6, 160, 36, True), dtype, device)
    apart, one_later, steps = x[:, 8:88], x[:, 1:81], x[:, ::2]  # rows on 16 bytes, and not
    deep = x[:, :80].reshape(3, 2, 80).transpose(0, 1)
    wide, later, transposed = weight[::2, 16:96], weight[:, 3:83], weight[:18, :80].t().contiguous().t()
    for rows in (apart, one_later, steps, deep, x[0, :80], x[:1, :80].expand(5, 80)):
        for columns in (wide, later, transposed):
            arguments = (rows, columns, bias[:: len(bias) // len(columns)])
            exact = reference.linear(*(t.double() for t in arguments))
            assert_close_to_exact(linear(*arguments), reference.linear(*arguments), exact)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_row_of_16_bits_alone_is_the_row_of_a_batch(dtype, device):
    x, weight, bias = sample((FEW_ROWS[device], 2120, 40, True), dtype, device)
    together = linear(x, weight, bias)
    for m in range(1, len(x)):
        assert torch.equal(together[:m], linear(x[:m], weight, bias))
        assert torch.equal(together[m:], linear(x[m:], weight, bias))


def test_a_large_output():
    # beyond 32 MiB the op brings its own memory
    x, weight, bias = torch.randn(3, 700, 16), torch.randn(5000, 16), torch.randn(5000)
    torch.testing.assert_close(linear(x, weight, bias), reference.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 40, 64), (3, 700, 16), (2, 3, 0)])
def test_outputs_may_be_changed_in_place(shape, dtype):
    x, weight, bias = sample((1, shape[-1], 5000, True), dtype)
    y = linear(x.expand(*shape).contiguous(), weight.requires_grad_(), bias)
    expected = y.detach() + 1
    y += 1
    assert torch.equal(y, expected)


def test_few_rows_of_a_view():
    x, weight = torch.randn(5, 300)[:, ::3], torch.randn(40, 250)[::2, 50:150]
    assert_as_accurate(linear, reference.linear, [x, weight])
    torch.testing.assert_close(linear(x[0], weight), weight @ x[0])


def test_a_row_alone_is_the_row_of_a_batch():
    x, weight = torch.randn(16, 500), torch.randn(70, 500)
    together = linear(x, weight)
    assert torch.equal(together, torch.cat([linear(row[None], weight) for row in x]))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(64, 515, 80, True), (9, 1176, 80, True)])
def test_bitwise_repeatable(shape, device):
    assert_repeatable(linear, sample(shape, torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    assert_traceable(torch.ops.glm4v_ext.linear, linear, sample((4, 24, 8, True), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_whose_gradients(device):
    x, weight = (x.requires_grad_() for x in sample((3, 64, 48, False), torch.float32, device))
    assert ("glm4v_ext_linear" in linear(x, weight).grad_fn.name()) == (device == "cpu")


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(linear, reference.linear, sample((4, 24, 8, True), torch.float32, device))


def test_leading_dims_and_views():
    x, weight = torch.randn(24, 5, 2).permute(1, 2, 0), torch.randn(48, 10).t()[:, ::2]
    assert_as_accurate(linear, reference.linear, [x, weight, torch.randn(20)[::2]])
    assert_as_accurate(linear, reference.linear, [torch.randn(24), weight])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["F.linear", "glm4v_ext", pytest.param(TILES, marks=needs_tiles)])
def test_products_of_fp32(name, bias):
    with forced_product(name, torch.float32):
        assert build_info()["products"]["fp32"] == name
        assert_as_accurate(linear, reference.linear, sample((65, 77, 50, bias), torch.float32))
        x, weight = torch.randn(40, 33, 3).permute(1, 2, 0), torch.randn(40, 50).t()[::2]  # [33, 3, 40], [25, 40]
        assert_as_accurate(linear, reference.linear, [x, weight])
        for row in (torch.randn(75)[::3], torch.randn(1).expand(25)):  # a bias need not be dense
            assert_as_accurate(linear, reference.linear, [x, weight, row])
        x, weight = torch.randn(64, 40, requires_grad=True), torch.randn(8, 40, requires_grad=True)
        linear(x, weight).sum().backward()
        torch.testing.assert_close((x.grad, weight.grad), (weight.sum(0).expand(64, 40), x.sum(0).expand(8, 40)))


# One to three vectors of rows, parts of the output, blocks of inputs, strips of the weight: whole and not.
@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (25, 33, 21, True),
        (64, 515, 80, False),
        (577, 70, 40, True),
        (50, 256, 700, True),
        (49, 1177, 80, True),
        (20, 4099, 70, False),
        (700, 70, 33, False),  # fewer columns than rows and no bias: the weight is packed in place of x
        (90, 1177, 80, False),
    ],
)
def test_own_product(shape, dtype, level):
    with forced_isa(level), forced_product("glm4v_ext", dtype):
        assert_as_accurate(linear, reference.linear, sample(shape, dtype))
        x, weight, *bias = sample(shape, dtype)
        assert_as_accurate(linear, reference.linear, [x, weight.t().contiguous().t(), *bias])  # as gradients of x


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_fill_half_a_vector(dtype, level):
    """They take half of its lanes; no bit tells."""
    for columns, inputs in ((80, 515), (33, 4099)):
        x, weight, bias = sample((48, inputs, columns, True), dtype)
        with forced_isa(level), forced_product("glm4v_ext", dtype):
            whole = linear(x, weight, bias)
            for rows in (25, 32, 33, 40, 41):
                assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])
        assert torch.isfinite(whole).all()


@pytest.mark.parametrize("shape", [(192, 1000, 64, False), (64, 900, 30, False), (700, 70, 33, False)])
def test_threads_share_an_own_product_and_change_nothing(shape):
    x, weight = sample(shape, torch.float32)
    threads, views = torch.get_num_threads(), (x, x.t().contiguous().t())
    found = []
    try:
        with forced_product("glm4v_ext", torch.float32):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append([linear(view, weight) for view in views])
    finally:
        torch.set_num_threads(threads)
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)


def test_many_rows_of_bf16():
    assert_as_accurate(linear, reference.linear, sample((520, 1177, 513, True), torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "inputs"),
    [
        ("glm4v_ext", torch.bfloat16, 600, 500),
        pytest.param(TILES, torch.float32, 600, 500, marks=needs_tiles),
        pytest.param(TILES, torch.bfloat16, 100, 5000, marks=needs_tiles),  # in two blocks of inputs
    ],
)
def test_own_products_do_not_depend_on_threads(name, dtype, rows, inputs):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(2100, inputs).to(dtype)
    threads = torch.get_num_threads()
    with forced_product(name, dtype):
        together = linear(x, weight)
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(together, linear(x, weight))
        finally:
            torch.set_num_threads(threads)


# Whole blocks and parts of rows, of columns and of inputs; parts of the output, and chains of blocks.
@needs_tiles
@pytest.mark.parametrize(
    "shape", [(192, 64, 192, False), (201, 65, 1100, True), (577, 385, 193, True), (1200, 1177, 300, False)]
)
def test_tiles(shape):
    x, weight, *bias = sample(shape, torch.float32)
    with forced_product(TILES, torch.float32):
        for left in (x, x.t().contiguous().t()):
            for right in (weight, weight.t().contiguous().t()):
                assert_as_accurate(linear, reference.linear, [left, right, *bias])
        whole = linear(x, weight, *bias)
        assert torch.equal(linear(x[:192], weight, *bias), whole[:192])
    plain = torch.nn.functional.linear(x, weight, *bias)
    exact = torch.nn.functional.linear(*(t.double() for t in (x, weight, *bias)))
    assert (whole - exact).square().mean() < (plain - exact).square().mean()


# fp32's range is tiles' only in part: what they cannot take goes another way.
@needs_tiles
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (2.0**-130, 1.0),
        (2.0**-105, 2.0**80),
        (2.0**-60, 2.0**-60),
        (2.0**80, 2.0**-80),
        (2.0**100, 1.0),
        (3.3e38, 2.0**-10),
        (float("inf"), 1.0),
        (float("nan"), 1.0),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_tiles_leave_extreme_numbers_alone(rows, columns, swap):
    x, weight = torch.rand(200, 96) + 0.5, torch.rand(210, 96) + 0.5
    if swap:
        rows, columns = columns, rows
    x[7] *= rows  # of one row only
    weight[9] *= columns
    x, weight = x.clamp(max=3.4e38), weight.clamp(max=3.4e38)
    with forced_product(TILES, torch.float32):
        actual = linear(x, weight)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2.0**-126, equal_nan=True)


@needs_tiles
def test_tiles_take_numbers_of_any_size_in_a_row():
    x, weight = torch.randn(200, 96), torch.randn(210, 96)
    x[:, ::3] *= 2.0 ** torch.linspace(-120, 0, 32)
    weight[:, 1::5] = 0
    with forced_product(TILES, torch.float32):
        assert_as_accurate(linear, reference.linear, [x, weight])


# One to three tiles of rows at a time; panels of outputs, steps and blocks of inputs, whole and not.
@needs_tiles
@pytest.mark.parametrize(
    "shape",
    [
        (5, 32, 32, False),
        (16, 96, 70, True),
        (33, 31, 33, True),
        (49, 1177, 80, False),
        (64, 1, 1, True),
        (100, 5000, 40, True),
        (256, 3333, 130, True),
    ],
)
def test_tiles_of_bf16(shape):
    x, weight, *bias = sample(shape, torch.bfloat16)
    with forced_product(TILES, torch.bfloat16):
        assert build_info()["products"]["bf16"] == TILES
        assert_as_accurate(linear, reference.linear, [x, weight, *bias])
        whole = linear(x, weight, *bias)
        for rows in (5, 17, 48):
            assert torch.equal(linear(x[:rows], weight, *bias), whole[:rows])


@needs_tiles
def test_tiles_of_bf16_read_views_and_nothing_around_them():
    walls = torch.full((120, 300), torch.nan, dtype=torch.bfloat16)
    x, weight = torch.randn(40, 77).bfloat16(), torch.randn(50, 77).bfloat16()
    rows, columns = walls[:40, 5:82].copy_(x), walls[60:110, 101:178].copy_(weight)
    bias = torch.randn(150).bfloat16()[::3]
    with forced_product(TILES, torch.bfloat16):
        expected = linear(x, weight, bias)
        assert torch.isfinite(expected).all()
        assert torch.equal(linear(rows, columns, bias), expected)
        assert torch.equal(linear(x.t().contiguous().t(), columns, bias.clone()), expected)
        assert torch.equal(linear(rows.reshape(5, 8, 77), columns, bias), expected.reshape(5, 8, 50))
        weight[3, 5], x[7, 9] = torch.inf, torch.nan
        wrong = ~torch.isfinite(linear(x, weight, bias))
        assert wrong[:, 3].all() and wrong[7].all() and wrong.sum() == 40 + 50 - 1


# Both transposed, as for the gradient of a weight: panels of rows and columns, steps and blocks of terms, in part too.
@needs_tiles
@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (97, 79, 65), (300, 385, 801), (576, 768, 160), (130, 1177, 1600), (2310, 65, 4096)]
)
def test_transposed_on_tiles_of_bf16(shape):
    m, k, n = shape
    walls = torch.full((2 * k, m + n + 90), torch.nan, dtype=torch.bfloat16)
    x, weight = walls[::2, 30 : 30 + m].normal_(), walls[1::2, m + 60 : m + n + 60].normal_()  # [k, m], [k, n]
    with forced_product(TILES, torch.bfloat16):
        assert_as_accurate(linear, reference.linear, [x.t(), weight.t()])
        whole = linear(x.t(), weight.t())
        assert torch.equal(linear(x[:, :64].t(), weight.t()), whole[:64])
        assert torch.equal(linear(x.t(), weight[:, n - 64 :].t()), whole[:, n - 64 :])
        x[k - 1, 3], weight[0, 5] = torch.nan, torch.inf
        wrong = ~torch.isfinite(linear(x.t(), weight.t()))
        assert wrong[3].all() and wrong[:, 5].all() and wrong.sum() == m + n - 1


# Many rows and transposed weights go to the libraries, of which oneDNN reads rows of bf16 up to whole steps on tiles.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(300, 77, 50), (300, 1025, 21), (40, 77, 50)])
def test_walls_around_rows(m, k, n, dtype):
    walls = torch.full((2, m, k + n), torch.nan, dtype=dtype)
    x, dout = walls[0, :, 1 : k + 1].copy_(torch.randn(m, k)), walls[1, :, :n].copy_(torch.randn(m, n))
    weight = torch.randn(k, n).to(dtype).t()
    for w in (weight, weight.contiguous()):
        results = []
        for a, da in ((x, dout), (x.clone(), dout.clone())):
            leaves = [t.detach().requires_grad_() for t in (a, w)]
            out = linear(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, da)])
        for inside, alone in zip(*results, strict=True):
            assert torch.isfinite(inside).all()
            torch.testing.assert_close(inside, alone)


def test_force_product_refuses_unknown_names():
    with pytest.raises(ValueError, match="force_product: dtype must be fp32, bf16 or fp16, got fp8"):
        _C.force_product("fp8", "F.linear")
    for dtype, name in (("bf16", "oneDNN"), ("fp16", TILES)):
        with pytest.raises(ValueError, match=rf"force_product: name must be F\.linear or glm4v_ext, .*, got {name}"):
            _C.force_product(dtype, name)


def test_no_gradient_where_none_is_needed():
    x, weight, bias = sample((5, 24, 8, True), torch.float32)
    linear(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad.shape == weight.shape and x.grad is None and bias.grad is None


@pytest.mark.parametrize("frozen", [0, 1])
def test_keeps_only_what_gradients_need(frozen):
    """Of two operands the other one: what is frozen may change before backward, and costs no memory until then."""
    inputs = sample((5, 24, 8, True), torch.float32)
    leaf = inputs[1 - frozen].requires_grad_()
    expected = torch.autograd.grad(reference.linear(*inputs).sum(), leaf)[0]
    out = linear(*inputs)
    with torch.no_grad():
        leaf.zero_()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], expected)
    out = linear(*inputs)
    inputs[frozen].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_only_its_row(dtype, device):
    x, weight = sample((3, 56, 9, False), dtype, device)
    x[1, 17], weight[4, 3] = float("nan"), float("inf")
    out = linear(x, weight)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()
    assert out[[0, 2], 4].isinf().all() and out[[0, 2]].isinf().sum() == 2


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_beside_the_operands_is_not_read(dtype, device):
    wide = [torch.full((size, 96), float("nan"), dtype=dtype, device=device) for size in (3, 9)]
    x, weight = (matrix[:, 16:72].copy_(torch.randn(len(matrix), 56)) for matrix in wide)
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight.contiguous()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: None}, "linear: x must be a tensor, got None"),
        ({0: torch.zeros(4, 24, dtype=torch.int32)}, "linear: x must be float32, bfloat16 or float16, got int32"),
        ({1: torch.zeros(8, 23)}, r"linear: weight must be \[N, K\] = \[\*, 24\], got \[8, 23\]"),
        ({1: torch.zeros(8, 24).half()}, "linear: weight must be float32 like x, got float16"),
        ({2: torch.zeros(7)}, r"linear: bias must be \[N\] = \[8\], got \[7\]"),
        ({1: torch.zeros(8, 24, device="meta")}, "linear: tensors must be on one device, got cpu and meta"),
        ({0: torch.zeros(4, 24, device="meta")}, "linear: tensors must be on one device, got cpu and meta"),
    ],
)
def test_errors_name_the_argument(change, text):
    inputs = sample((4, 24, 8, True), torch.float32)
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        linear(*inputs)
