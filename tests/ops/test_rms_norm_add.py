import pytest
import torch

from glm4v_ext import reference, rms_norm_add
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

SHAPES = [(1, 6), (40, 1), (3, 7), (5, 1536), (2, 3, 80), (33, 129), (0, 16)]


def sample(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    return [x, residual, torch.randn(shape[-1], device=device).to(dtype), 1e-5]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_as_accurate(rms_norm_add, reference.rms_norm_add, sample(shape, dtype, device))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(rms_norm_add, reference.rms_norm_add, sample((19, 77), dtype))


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(rms_norm_add, sample((301, 515), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    assert_traceable(torch.ops.glm4v_ext.rms_norm_add, rms_norm_add, sample((4, 24), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(rms_norm_add, reference.rms_norm_add, sample((4, 24), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_views(device):
    x, residual = torch.randn(64, 40, device=device).t()[:, ::2], torch.randn(32, 40, device=device).t()
    assert_as_accurate(rms_norm_add, reference.rms_norm_add, [x, residual, torch.randn(64, device=device)[::2], 1e-6])


@pytest.mark.parametrize("device", devices())
def test_nan_reaches_only_its_row(device):
    inputs = sample((3, 50), torch.float32, device)
    inputs[0][1, 17] = float("nan")
    out = rms_norm_add(*inputs)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(4, 24, dtype=torch.int32)}, "rms_norm_add: x must be float32, bfloat16 or float16, got int32"),
        ({1: torch.zeros(4, 23)}, r"rms_norm_add: residual must be \[4, 24\] like x, got \[4, 23\]"),
        ({1: torch.zeros(4, 24).half()}, "rms_norm_add: residual must be float32 like x, got float16"),
        ({2: torch.zeros(5)}, r"rms_norm_add: weight must be \[C\] = \[24\], got \[5\]"),
        ({3: -1e-5}, "rms_norm_add: eps must be 0 or more and finite, got -1e-05"),
    ],
)
def test_errors_name_the_argument(change, text):
    inputs = sample((4, 24), torch.float32)
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        rms_norm_add(*inputs)
