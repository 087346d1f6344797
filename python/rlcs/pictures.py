"""Pictures of prompts made small: as data URIs for a page, as half blocks in true colours for a terminal.

A video is its frames side by side. Dims: H, W pixels; a terminal's cell shows two pixels, one above the other.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .rewards.boxes import Box

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

FRAMES = 8  # of a video, at most
GAP = 2  # pixels between frames
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def opened(kind: str, files: Sequence[Path], most: tuple[int, int]) -> Image:
    """The picture of one part of a prompt, RGB and at most ``most`` (width, height) large.

    Raises:
        ValueError: a file is missing or no picture; the text is one line.
    """
    film = kind == "video" and len(files) == 1 and files[0].suffix.lower() not in IMAGES
    frames = _film(files[0]) if film else [_image(file) for file in _some(files)]
    height = max(frame.height for frame in frames)
    width = sum(frame.width for frame in frames) + GAP * (len(frames) - 1)
    picture = frames[0]
    if len(frames) > 1:
        picture = _blank(width, height)
        x = 0
        for frame in frames:
            picture.paste(frame, (x, 0))
            x += frame.width + GAP
    picture.thumbnail(most)
    return picture


def data_uri(picture: Image) -> str:
    """As PNG where it is small or flat, else as JPEG."""
    small = picture.width * picture.height <= 1 << 16 or len(picture.getcolors(256) or ()) > 0
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True) if small else picture.save(file, "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def framed(picture: Image, boxes: Sequence[Box], colour: str, width: int) -> Image:
    """A copy with boxes (in per mille) drawn on it; a small picture is enlarged first, so that they can be told."""
    from PIL import Image, ImageDraw

    scale = max(1, 160 // max(picture.size))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for box in boxes:
        at = [limit * min(max(value, 0), 1000) / 1000 for value, limit in zip(box, picture.size * 2, strict=True)]
        if at[0] <= at[2] and at[1] <= at[3]:
            pen.rectangle(at, outline=colour, width=width)
    return picture


def blocks(picture: Image, columns: int) -> Text:
    """Rows of upper half blocks: the ink is the upper pixel, the ground the lower one."""
    from rich.style import Style
    from rich.text import Text

    picture = picture.copy()
    picture.thumbnail((columns, picture.height))
    pixels = np.asarray(picture.convert("RGB"))  # [H, W, 3]
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        line = Text(no_wrap=True)
        for (ink, ground), cells in groupby(zip(upper, lower, strict=True)):
            style = Style.parse("#{:02x}{:02x}{:02x} on #{:02x}{:02x}{:02x}".format(*ink, *ground))
            line.append("▀" * len(list(cells)), style)
        lines.append(line)
    return Text("\n", no_wrap=True).join(lines)


def _image(file: Path) -> Image:
    from PIL import Image

    from glm4v.image import Picture

    if not file.exists():
        raise ValueError(f"{file}: No such file or directory")
    try:
        picture = Picture(file)  # as the model sees it
        return Image.fromarray(picture.pixels(picture.height, picture.width))
    except ValueError as error:
        reason = str(error).rpartition(": ")[2]
        raise ValueError(f"{file}: cannot be read as a picture: {reason}") from None


def _film(file: Path) -> list[Image]:
    """Frames at equal distances."""
    from PIL import Image

    from glm4v.source import find
    from glm4v.video import Film

    if not file.exists():
        raise ValueError(f"{file}: No such file or directory")
    film = Film(find("video", str(file), False))
    chosen = np.unique(np.linspace(0, len(film.times) - 1, FRAMES).round().astype(int))
    return [Image.fromarray(frame) for frame in film.read(chosen)]


def _some(files: Sequence[Path]) -> list[Path]:
    """All, or as many at equal distances as are shown of a video."""
    if len(files) <= FRAMES:
        return list(files)
    return [files[i] for i in np.linspace(0, len(files) - 1, FRAMES).round().astype(int)]


def _blank(width: int, height: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (width, height), "#808080")
