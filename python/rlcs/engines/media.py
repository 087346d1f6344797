"""Messages as OpenAI-compatible servers read them: pictures and videos become data URLs.

An image file travels as it is, an image in memory as PNG, as does one of sixteen-bit greys, which servers would clip to
white: in the eight bits that the trainer sees. A video file travels as it is; frames become one file whose
rate says when each is shown, without loss (FFV1 in Matroska), so that the server sees the trainer's pixels.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from glm4v.image import Picture, has_sixteen_bits
from glm4v.source import find, scheme, source_of
from glm4v.video import rate_of

IMAGES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
FRAMES = "video/x-matroska"


def wire(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their pictures in them."""
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_part(part) for part in content]
        out.append({"role": message["role"], "content": content})
    return out


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(part["type"])
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    medium, source = kind.removesuffix("_url"), source_of(kind, part)
    read_as = scheme(source) if isinstance(source, str) else ""
    if read_as in ("http", "https") or (read_as == "data" and medium == "video"):
        url = source
    elif medium == "image":
        url = image_url(source)
    else:
        url = _url(*video_bytes(source, part.get("fps")))
    return {"type": f"{medium}_url", f"{medium}_url": {"url": url}}


def image_url(source: Any) -> str:
    """A data URL of an image file, of its bytes, of an array ``[H, W, 3]`` uint8 or of a PIL image."""
    if isinstance(source, bytes) or _is_path(source):
        data = source if isinstance(source, bytes) else _read("image", source)
        with Image.open(io.BytesIO(data)) as image:
            mime = None if has_sixteen_bits(image) else IMAGES.get(image.format or "")
        if mime is not None:
            return _url(data, mime)
        source = data
    return _url(_png(_pixels(source)), "image/png")


def video_bytes(source: Any, fps: float | None = None) -> tuple[bytes, str]:
    """A video file and its type; frames (files, arrays or PIL images) at ``fps``, which they must have, become a
    file."""
    if isinstance(source, bytes):
        return source, "video/mp4"
    if _is_path(source):
        return _read("video", source), mimetypes.guess_type(os.fspath(source))[0] or "video/mp4"
    frames = [_pixels(frame) for frame in source]
    target = io.BytesIO()
    # bitexact: the same frames are the same bytes, by which servers know what they have read before.
    with av.open(target, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        rate = Fraction(rate_of(fps)).limit_denominator(1000)
        stream: Any = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return target.getvalue(), FRAMES


def _pixels(source: Any) -> np.ndarray:
    """``[H, W, 3]`` uint8 as the processor sees it before it is resized: upright, transparency over white."""
    picture = Picture(source)
    return picture.pixels(picture.height, picture.width)


def _png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def _is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def _read(kind: str, path: str | os.PathLike[str]) -> bytes:
    data = find(kind, path).data
    return data if isinstance(data, bytes) else data.read_bytes()


def _url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
