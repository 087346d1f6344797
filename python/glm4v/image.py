"""Images in: sizes from the header, then upright RGB pixels of the size that the model sees.

The numbers are those of transformers' `Glm4vImageProcessorPil`: same grid for every size, Pillow's bicubic filter with
antialias, transparency over white. Sixteen-bit greys are scaled to eight bits (transformers clips them to white).
Dims: H, W pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import warnings
from collections.abc import Iterator
from typing import IO, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from .errors import InputError
from .source import Source, find

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray"

BITS_PER_SAMPLE, ORIENTATION = 0x0102, 0x0112
# By EXIF orientation; from 5 on, height and width change places.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def smart_resize(
    num_frames: int,
    height: int,
    width: int,
    min_pixels: int,
    max_pixels: int,
    factor: int = 28,
    temporal_factor: int = 2,
    max_aspect_ratio: float = 200,
) -> tuple[int, int]:
    """Height and width, multiples of ``factor``, that a picture is resized to: near its own, within the pixel budget.

    Pixels count over all frames (an image counts as ``temporal_factor`` of them). The order of steps, `round` to even
    and truncation are transformers': a token count that differs by one is a different prompt. Where the two limits
    contradict each other, as a user's and a checkpoint's may, ``max_pixels`` holds.

    Raises:
        InputError: the longer side is more than ``max_aspect_ratio`` times the shorter one.
    """
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > max_aspect_ratio:
        raise InputError(f"aspect ratio must be at most {max_aspect_ratio} (max_aspect_ratio), got {ratio:.6g}")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(num_frames / temporal_factor) * temporal_factor * h * w
    if pixels > max_pixels or min_pixels > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


class Picture:
    """One image: its upright ``height`` and ``width`` are known at once, its pixels are decoded when asked for."""

    num_frames = 2  # what an image counts as in the pixel budget: both frames of its patches show it

    def __init__(self, source: ImageLike, allow_network: bool = False) -> None:
        self.image = _from_array(source) if isinstance(source, np.ndarray) else source
        if isinstance(source, str | bytes | os.PathLike):
            self.source = find("image", source, allow_network)
        elif isinstance(self.image, Image.Image):
            self.source = Source("image", "image in memory", b"")
        else:
            raise InputError(f"image: must be a path, URL, bytes, PIL image or array, got {type(source).__name__}")
        with self._opened() as image:
            self.orientation = _orientation(image)
            self.width, self.height = image.size[::-1] if self.orientation >= 5 else image.size
        if not (self.width and self.height):
            raise self.source.error(f"has no pixels, it is {self.width}×{self.height}")

    def pixels(self, height: int, width: int) -> np.ndarray:
        """Upright RGB of the wanted size: uint8 ``[height, width, 3]``.

        Raises:
            InputError: the file is damaged, too large to be honest, or has changed since its header was read.
        """
        with self._opened() as image:
            rgb = to_rgb(image)
            if self.orientation in UPRIGHT:
                rgb = rgb.transpose(UPRIGHT[self.orientation])
            if rgb.size != (self.width, self.height):
                raise ValueError(f"is {rgb.width}×{rgb.height} now, its header said {self.width}×{self.height}")
            return np.array(rgb.resize((width, height), Image.Resampling.BICUBIC))

    def frames(self, height: int, width: int) -> np.ndarray:
        """`pixels` as a film of one frame: uint8 ``[1, height, width, 3]``."""
        return self.pixels(height, width)[None]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        """The image, undecoded. Whatever Pillow raises inside becomes one line that names the file."""
        try:
            if isinstance(self.image, Image.Image):
                yield self.image
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about large files that it reads well
                with Image.open(self.source.open()) as image:
                    yield image
        except UnidentifiedImageError:
            raise self.source.error("is not an image") from None
        except Image.DecompressionBombError as error:
            raise self.source.error(error) from None
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ..., each format its own
            reason = str(error) or type(error).__name__  # a closed image fails an assertion that says nothing
            raise self.source.error(f"cannot be read: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: transparency over white, sixteen-bit greys scaled to eight bits.

    Raises:
        ValueError: pixels are floating-point numbers or large integers, of which nothing says how bright they are.
    """
    if image.mode == "F":
        raise ValueError("pixels must be integers of 8 or 16 bits, got floating-point numbers")
    if has_sixteen_bits(image):
        grey = np.asarray(image).clip(0, 65535)
        image = Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "I":
        grey = np.asarray(image)
        low, high = grey.min(), grey.max()
        if low < 0 or high > 255:  # a copy of a picture of sixteen bits, perhaps, which has lost what it was
            said = "0 to 255, or greys of 16 bits as mode I;16 (image.convert)"
            raise ValueError(f"pixels of 32 bits must be from {said}, got {low} to {high}")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")


def has_sixteen_bits(image: Image.Image) -> bool:
    """Whether greys are of 0 to 65535. Of some such files Pillow makes images of 32 bits, mode I."""
    opened = image.format in ("PNG", "PPM") or getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (16,)
    return image.mode.startswith("I;16") or (image.mode == "I" and opened)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation without decoding, as PNG's own `getexif` would to look behind the pixels."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    exif = Image.Image.getexif(image)
    if isinstance(image, PngImageFile) and image.fp is not None and "exif" not in image.info:
        exif.load(_exif_behind_pixels(image.fp))
    orientation = exif.get(ORIENTATION, 1)
    return orientation if orientation in UPRIGHT else 1


def _exif_behind_pixels(file: IO[bytes]) -> bytes:
    """The EXIF chunk of a PNG, wherever it stands; empty without one."""
    before = file.tell()
    file.seek(8)  # behind the signature
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)  # the content and its checksum
        return b""
    finally:
        file.seek(before)


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        found = f"{array.dtype} {list(array.shape)}"
        raise InputError(f"image: array must be uint8 [H, W] or [H, W, 1, 3 or 4 channels], got {found}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)
