import pytest
import torch

from glm4v_ext import merge_patches, reference
from glm4v_ext.testing import (
    DTYPES,
    assert_accurate_product,
    assert_as_accurate,
    assert_repeatable,
    assert_takes_expanded_gradients,
    assert_traceable,
    devices,
    forced_isa,
    isa_levels,
    on_gpu,
)

# P, C, O
SHAPES = [(4, 24, 9), (8, 1, 1), (12, 80, 33), (0, 16, 4)]


def sample(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    patches, width, out_width = shape
    x, bias = torch.randn(patches, width, device=device), torch.randn(out_width, device=device)
    return [t.to(dtype) for t in (x, torch.randn(out_width, width, 2, 2, device=device) * (4 * width) ** -0.5, bias)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_accurate_product(merge_patches, reference.merge_patches, sample(shape, dtype, device))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_gpu_computes_gradients_of(shape, order):
    x, weight, bias = sample(shape, torch.float32)
    assert_as_accurate(on_gpu("merge_patches"), reference.merge_patches, [x, weight.to(memory_format=order), bias])


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(merge_patches, reference.merge_patches, sample((16, 20, 50), dtype))


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(merge_patches, sample((64, 50, 80), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    assert_traceable(torch.ops.glm4v_ext.merge_patches, merge_patches, sample((8, 24, 5), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(merge_patches, reference.merge_patches, sample((8, 24, 5), torch.float32, device))


def test_patches_without_width_give_the_bias():
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((8, 0), (3, 0, 2, 2), (3,))]
    out = merge_patches(*leaves)
    assert torch.equal(out, leaves[2].expand(2, 3))
    out.sum().backward()
    assert leaves[2].grad.tolist() == [2, 2, 2] and [x.grad.numel() for x in leaves[:2]] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_weight(dtype):
    x, weight, bias = sample((12, 20, 7), dtype)
    assert_as_accurate(merge_patches, reference.merge_patches, [x, weight.to(memory_format=torch.channels_last), bias])


@pytest.mark.parametrize("device", devices())
def test_views(device):
    weight = torch.randn(2, 2, 10, 6, device=device).permute(3, 2, 0, 1)
    x, bias = torch.randn(10, 8, device=device).t(), torch.randn(12, device=device)[::2]
    assert_as_accurate(merge_patches, reference.merge_patches, [x, weight, bias])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {0: torch.zeros(8, 24, dtype=torch.int32)},
            "merge_patches: x must be float32, bfloat16 or float16, got int32",
        ),
        ({0: torch.zeros(6, 24)}, r"merge_patches: x must be \[P, C\] with P a multiple of 4, got \[6, 24\]"),
        (
            {1: torch.zeros(5, 23, 2, 2)},
            r"merge_patches: weight must be \[O, C, 2, 2\] = \[\*, 24, 2, 2\], got \[5, 23, 2, 2\]",
        ),
        ({2: torch.zeros(7)}, r"merge_patches: bias must be \[O\] = \[5\], got \[7\]"),
    ],
)
def test_errors_name_the_argument(change, text):
    inputs = sample((8, 24, 5), torch.float32)
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        merge_patches(*inputs)
