from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from examples.make_checkpoint import make_checkpoint
from glm4v import Processor

H264 = "libx264" if "libx264" in av.codecs_available else "mpeg4"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A GLM-4.1V checkpoint of half a million random parameters."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture(scope="session")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def photos():
    """Two real photographs, uint8 [427, 640, 3]: a temple and a flower."""
    return load_sample_images().images


@pytest.fixture
def photo(photos, tmp_path):
    """A file of a part of the first one."""
    path = tmp_path / "temple.jpg"
    Image.fromarray(photos[0][:150, :200]).save(path)
    return path


@pytest.fixture
def film(photos, tmp_path):
    """Encodes a camera move over a photograph; returns the file."""

    def encode(name="film.mp4", codec=H264, count=48, rate=24, size=(96, 64), ticks=None, rotation=None, photo=0):
        """``ticks`` are the frames' times in milliseconds, where they are not evenly spaced; ``rotation`` is an angle,
        or an angle and whether it is mirrored then."""
        path, (width, height) = tmp_path / name, size
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "rgb8" if codec == "gif" else "yuv420p"
            if ticks:
                stream.codec_context.time_base = Fraction(1, 1000)
            if rotation:
                stream.set_display_rotation(*(rotation if isinstance(rotation, tuple) else (rotation,)))
            for i in range(count):
                top, left = i % (428 - height), (3 * i) % (641 - width)
                crop = np.ascontiguousarray(photos[photo][top : top + height, left : left + width])
                frame = av.VideoFrame.from_ndarray(crop, format="rgb24")
                if ticks:
                    frame.pts, frame.time_base = ticks[i], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return encode
