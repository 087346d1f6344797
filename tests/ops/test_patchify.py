import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4v_ext import patchify, reference
from glm4v_ext.testing import DTYPES, devices, forced_isa, isa_levels

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels(*shape, device="cpu"):
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 56, 28), (3, 28, 84), (6, 28, 28)])
def test_definition(shape, dtype, device):
    frames = pixels(*shape, 3, device=device)
    assert_equal(patchify(frames, MEAN, STD, dtype=dtype), reference.patchify(frames, MEAN, STD, dtype=dtype))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(0, 28, 56), (1, 0, 56), (3, 28, 0)])
def test_empty(shape, device):
    patches, grid_thw = patchify(pixels(*shape, 3, device=device), MEAN, STD)
    assert patches.shape == (0, 1176)
    assert grid_thw.tolist() == [[(shape[0] + 1) // 2, shape[1] // 14, shape[2] // 14]]


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    frames = pixels(3, 56, 84, 3)
    with forced_isa(level):
        assert_equal(patchify(frames, MEAN, STD, dtype=dtype), reference.patchify(frames, MEAN, STD, dtype=dtype))


@given(
    frames=st.integers(1, 5),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    temporal=st.integers(1, 3),
    patch=st.integers(1, 17),
    merge=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_random_sizes(frames, blocks, temporal, patch, merge, seed):
    torch.manual_seed(seed)
    frames = pixels(frames, blocks[0] * patch * merge, blocks[1] * patch * merge, 3)
    settings = (MEAN, STD, temporal, patch, merge)
    assert_equal(patchify(frames, *settings), reference.patchify(frames, *settings))


def test_transformers():
    processing = pytest.importorskip("transformers.models.glm4v.image_processing_pil_glm4v")
    processor = processing.Glm4vImageProcessorPil(do_resize=False)
    every_value = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8)
    image = np.resize(every_value, (84, 56, 3))
    theirs = processor(images=[image], return_tensors="pt")
    ours = patchify(torch.from_numpy(image)[None], processor.image_mean, processor.image_std)
    assert_equal(ours, (theirs["pixel_values"], theirs["image_grid_thw"]))


@pytest.mark.parametrize("device", devices())
def test_views(device):
    planes = pixels(2, 3, 28, 56, device=device).permute(0, 2, 3, 1)  # channels first in memory
    rgba = pixels(2, 56, 56, 4, device=device)[:, ::2, :, :3]
    repeated = pixels(1, 28, 56, 3, device=device).expand(4, 28, 56, 3)
    for frames in (planes, rgba, repeated):
        assert_equal(patchify(frames, MEAN, STD), reference.patchify(frames, MEAN, STD))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    frames = pixels(3, 28, 56, 3, device=device)
    arguments = (frames, MEAN, STD, 2, 14, 2, torch.bfloat16)
    torch.library.opcheck(torch.ops.glm4v_ext.patchify, arguments)
    compiled = torch.compile(patchify, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*arguments), patchify(*arguments))


FRAMES = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("frames", "settings", "text"),
    [
        (FRAMES.float(), {}, "frames must be uint8, got float32"),
        (FRAMES[0], {}, r"frames must be \[F, H, W, 3\] = \[\*, \*, \*, 3\], got \[28, 28, 3\]"),
        (FRAMES[:, :14], {}, r"frames must have sides that are multiples of 28, got \[1, 14, 28, 3\]"),
        (FRAMES, {"mean": (0.5,)}, "mean must be 3 numbers, got 1"),
        (FRAMES, {"std": (0.5, 0.0, 0.5)}, "std must be 3 positive numbers, got 3 of which some are not positive"),
        (FRAMES, {"patch_size": 0}, "patch_size must be 1 to 4096, got 0"),
        (FRAMES, {"merge_size": -2}, "merge_size must be 1 to 4096, got -2"),
        (FRAMES, {"patch_size": 2**32, "merge_size": 2**32}, f"patch_size must be 1 to 4096, got {2**32}"),
        (FRAMES, {"temporal_patch_size": 0}, "temporal_patch_size must be 1 to 4096, got 0"),
        (FRAMES, {"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got float64"),
    ],
)
def test_errors_name_the_argument(frames, settings, text):
    with pytest.raises(RuntimeError, match="patchify: " + text):
        patchify(frames, **{"mean": MEAN, "std": STD, **settings})
