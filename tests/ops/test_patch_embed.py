import pytest
import torch

from glm4v_ext import patch_embed, reference
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

# P, C, channels, frames, height, width and whether the patches are still
SHAPES = [
    (4, 24, 3, 2, 14, 14, False),
    (5, 9, 3, 2, 14, 14, True),
    (1, 1, 1, 1, 1, 1, False),
    (3, 7, 3, 3, 2, 5, True),
    (0, 6, 3, 2, 2, 2, False),
    (0, 6, 3, 2, 2, 2, True),
]


def sample(shape, dtype, device="cpu"):
    torch.manual_seed(0)
    patches, width, channels, frames, height, columns, still = shape
    x = torch.randn(patches, channels, frames, height * columns, device=device)
    if still:
        x[:] = x[:, :, :1].clone()
    weight = (
        torch.randn(width, channels, frames, height, columns, device=device) * (channels * height * columns) ** -0.5
    )
    return [x.flatten(1).to(dtype), weight.to(dtype), torch.randn(width, device=device).to(dtype), still]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_accurate_product(patch_embed, reference.patch_embed, sample(shape, dtype, device))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_gpu_computes_gradients_of(shape):
    assert_as_accurate(on_gpu("patch_embed"), reference.patch_embed, sample(shape, torch.float32))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(patch_embed, reference.patch_embed, sample((9, 20, 3, 2, 4, 4, True), dtype))


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(patch_embed, sample((33, 50, 3, 2, 14, 14, True), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    assert_traceable(
        torch.ops.glm4v_ext.patch_embed, patch_embed, sample((4, 6, 3, 2, 2, 2, True), torch.float32, device)
    )


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(
        patch_embed, reference.patch_embed, sample((4, 6, 3, 2, 2, 2, True), torch.float32, device)
    )


@pytest.mark.parametrize("device", devices())
def test_still_is_the_whole_convolution(device):
    patches, weight, bias, _ = sample((7, 10, 3, 2, 14, 14, True), torch.float32, device)
    torch.testing.assert_close(patch_embed(patches, weight, bias, still=True), patch_embed(patches, weight, bias))


@pytest.mark.parametrize("device", devices())
def test_views(device):
    _, weight, bias, _ = sample((4, 6, 3, 2, 2, 2, False), torch.float32, device)
    patches = torch.randn(3, 1, 4, 8, device=device).expand(3, 2, 4, 8).reshape(24, 8).t()  # two equal frames
    for still in (False, True):
        assert_as_accurate(patch_embed, reference.patch_embed, [patches, weight.flip(0)[::2], bias[::2], still])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {0: torch.zeros(4, 24, dtype=torch.uint8)},
            "patch_embed: patches must be float32, bfloat16 or float16, got uint8",
        ),
        ({0: torch.zeros(4, 23)}, r"patch_embed: patches must be \[P, K\] = \[\*, 24\], got \[4, 23\]"),
        (
            {1: torch.zeros(6, 24)},
            r"patch_embed: weight must be \[C, 3, F, h, w\] = \[\*, \*, \*, \*, \*\], got \[6, 24\]",
        ),
        (
            {0: torch.zeros(4, 0), 1: torch.zeros(6, 3, 0, 2, 2)},
            r"weight must be \[C, 3, F, h, w\] with F > 0, got \[6, 3, 0",
        ),
        ({2: torch.zeros(7)}, r"patch_embed: bias must be \[C\] = \[6\], got \[7\]"),
        ({2: torch.zeros(6).bfloat16()}, "patch_embed: bias must be float32 like patches, got bfloat16"),
    ],
)
def test_errors_name_the_argument(change, text):
    inputs = sample((4, 6, 3, 2, 2, 2, True), torch.float32)
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        patch_embed(*inputs)
