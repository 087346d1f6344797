import pytest
import torch

from glm4v_ext import reference, rms_norm
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
    return [torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype), 1e-5]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_as_accurate(rms_norm, reference.rms_norm, sample(shape, dtype, device))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(rms_norm, reference.rms_norm, sample((19, 77), dtype))


@pytest.mark.parametrize("device", devices())
def test_views(device):
    x, weight = torch.randn(64, 40, device=device).t()[:, ::2], torch.randn(64, device=device)[::2]
    assert_as_accurate(rms_norm, reference.rms_norm, [x, weight, 1e-6])


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(rms_norm, reference.rms_norm, sample((7, 33), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(rms_norm, sample((301, 515), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    assert_traceable(torch.ops.glm4v_ext.rms_norm, rms_norm, sample((4, 24), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_nan_reaches_only_its_row(device):
    x, weight, eps = sample((3, 50), torch.float32, device)
    x[1, 17] = float("nan")
    out = rms_norm(x, weight, eps)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("x", "weight", "text"),
    [
        (
            torch.zeros(2, 4, dtype=torch.int32),
            torch.zeros(4),
            "rms_norm: x must be float32, bfloat16 or float16, got int32",
        ),
        (torch.zeros(2, 4), torch.zeros(5), r"rms_norm: weight must be \[C\] = \[4\], got \[5\]"),
        (torch.zeros(2, 4), torch.zeros(4).half(), "rms_norm: weight must be float32 like x, got float16"),
    ],
)
def test_errors_name_the_argument(x, weight, text):
    with pytest.raises(RuntimeError, match=text):
        rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_eps_is_a_number_that_can_be_added(eps, device):
    with pytest.raises(RuntimeError, match=f"rms_norm: eps must be 0 or more and finite, got -?{str(abs(eps))[:3]}"):
        rms_norm(torch.zeros(2, 4, device=device), torch.zeros(4, device=device), eps)
