"""Damaged files of every kind end in pixels or in one line, whatever their decoders raise."""

import shutil
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, features

from glm4v import Glm4v, InputError
from glm4v.image import Picture
from glm4v.video import Video

IMAGES = ["JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "SGI", "DDS", "PCX"]
IMAGES += [kind for kind, module in [("WEBP", "webp"), ("AVIF", "avif")] if features.check(module)]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def damaged(file, random):
    """A few bytes changed, removed or put in, half of the time near the head."""
    data = bytearray(file)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(len(data) if random.random() < 0.5 else min(len(data), 200)))
        how = random.integers(3)
        if how == 0:
            data[at] = random.integers(256)
        elif how == 1:
            del data[at : at + int(random.integers(1, 50))]
        else:
            data[at:at] = random.bytes(random.integers(1, 20))
        data = data or bytearray(b"x")
    return bytes(data)


def read(kind, file):
    try:
        assert kind(file).frames(28, 56).shape[3] == 3
        return "read"
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"


@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images(kind, photos):
    file = BytesIO()
    Image.fromarray(photos[0][:80, :120]).save(file, kind)
    random = np.random.default_rng(7)
    assert read(Picture, file.getvalue()) == "read"
    assert "refused" in {read(Picture, damaged(file.getvalue(), random)) for _ in range(40)}


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.avi", "film.gif"])
def test_damaged_videos(name, film):
    file = film(name, codec="gif" if name == "film.gif" else "mpeg4", rate=10, count=12).read_bytes()
    random = np.random.default_rng(7)
    assert read(Video, file) == "read"
    assert "refused" in {read(Video, damaged(file, random)) for _ in range(40)}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_what_a_clone_without_git_lfs_leaves(name, tiny_checkpoint, tmp_path):
    """Of such files decoders say that a header is too large, or that a value is missing."""
    shutil.copytree(tiny_checkpoint, folder := tmp_path / "clone")
    (folder / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"^\w+: {folder}/{name}: is a pointer of Git LFS, .*`git lfs pull`"):
        Glm4v.from_pretrained(folder).processor  # noqa: B018


@pytest.mark.parametrize("kind", [Picture, Video])
def test_pictures_that_a_clone_without_git_lfs_leaves(kind, tmp_path):
    (path := tmp_path / "film.mp4").write_text(POINTER)
    with pytest.raises(InputError, match=f"{path}: is a pointer of Git LFS, not yet the file"):
        kind(path)
