import pytest
import torch

from glm4v_ext import reference, swiglu
from glm4v_ext.testing import (
    DTYPES,
    assert_as_accurate,
    assert_repeatable,
    assert_takes_expanded_gradients,
    assert_traceable,
    devices,
    forced_isa,
    isa_levels,
)

SHAPES = [(1, 6), (40, 2), (3, 14), (5, 2 * 1365), (2, 3, 80), (33, 258), (0, 16), (30,)]


def sample(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    return [(4 * torch.randn(shape, device=device)).to(dtype)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_as_accurate(swiglu, reference.swiglu, sample(shape, dtype, device))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(swiglu, reference.swiglu, sample((19, 154), dtype))


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(swiglu, sample((301, 514), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    assert_traceable(torch.ops.glm4v_ext.swiglu, swiglu, sample((4, 24), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(swiglu, reference.swiglu, sample((4, 24), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_views(device):
    assert_as_accurate(swiglu, reference.swiglu, [torch.randn(64, 40, device=device).t()[:, ::2]])


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(level, dtype):
    huge = torch.finfo(dtype).max
    gate = torch.tensor([0, -0.0, 88, -88, -100, -1e4, -huge, huge, float("inf"), float("nan")], dtype=dtype)
    with forced_isa(level):
        out = swiglu(torch.cat([gate, torch.ones_like(gate)]))
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), equal_nan=True, atol=1e-35, rtol=rtol)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(4, 24, dtype=torch.int64)}, "swiglu: gate_up must be float32, bfloat16 or float16, got int64"),
        ({0: torch.zeros(4, 23)}, r"swiglu: gate_up must be \[..., 2I\] with I > 0, got \[4, 23\]"),
    ],
)
def test_errors_name_the_argument(change, text):
    inputs = sample((4, 24), torch.float32)
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        swiglu(*inputs)


@pytest.mark.parametrize("device", devices())
def test_gradients_have_the_shape_of_the_output(device):
    as_many = torch.zeros(4, 2, device=device)
    with pytest.raises(RuntimeError, match=r"swiglu_backward: dout must be \[..., I\] = \[2, 4\], got \[4, 2\]"):
        torch.ops.glm4v_ext.swiglu_backward(as_many, torch.zeros(2, 8, device=device))
