"""Where a picture's bytes come from: a path, a file:// or data: URL, bytes; http(s) only when asked for."""

from __future__ import annotations

import base64
import os
import string
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import unfetched

DOWNLOAD_LIMIT_BYTES = 2**30
DOWNLOAD_TIMEOUT_S = 60
NAME_LIMIT = 300  # characters of a source that an error repeats
SCHEMES = ("data", "file", "http", "https")
SPELLINGS = ("url", "path", "base64")  # where transformers' messages name a picture, beside its kind


@dataclass(frozen=True)
class Source:
    """A file by its path or by its bytes; ``name`` is what errors call it, ``kind`` is image or video."""

    kind: str
    name: str
    data: Path | bytes

    def open(self) -> str | BytesIO:
        """What Pillow and PyAV read from."""
        return BytesIO(self.data) if isinstance(self.data, bytes) else str(self.data.absolute())

    def error(self, reason: object) -> InputError:
        said = unfetched(self.data) if isinstance(self.data, Path) else ""
        return InputError(f"{self.kind}: {self.name}: {said or reason}")


def source_of(kind: str, part: Mapping[str, Any]) -> Any:
    """What a message's part of this kind (``image``, ``video``, ``image_url``, ``video_url``) names, in any of the
    spellings of toolkits; None where it names nothing."""
    key = next((key for key in (kind, *SPELLINGS) if part.get(key) is not None), kind)
    source = part.get(key)
    if key == "base64" and isinstance(source, str) and not scheme(source):
        return f"data:;base64,{source}"
    return source.get("url") if isinstance(source, Mapping) else source


def scheme(source: str | os.PathLike[str]) -> str:
    """Of a URL, in lower case; empty for a path, whatever colons are in it."""
    name, colon, _ = source.partition(":") if isinstance(source, str) else ("", "", "")
    return name.lower() if colon and name.lower() in SCHEMES else ""


def find(kind: str, source: str | os.PathLike[str] | bytes, allow_network: bool = False) -> Source:
    """Finds the bytes that ``source`` names; nothing is decoded.

    Raises:
        InputError: no such file, a malformed URL, or an http(s) URL without ``allow_network``.
    """
    if isinstance(source, bytes):
        return Source(kind, f"{len(source)} bytes", source)
    text, read_as = os.fspath(source), scheme(source)
    if read_as == "data":
        return _decode_data_url(kind, text)
    if read_as in ("http", "https"):
        return _download(kind, text, allow_network)
    if not text:
        raise InputError(f"{kind}: a file must have a name, got ''")
    try:
        path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path) if read_as == "file" else text)
        wrong = None if path.is_file() else "is not a file" if path.exists() else "no such file"
    except (OSError, ValueError) as error:  # longer than a name may be, in a folder that is closed, half a URL
        path, wrong = Path(), f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if wrong:
        raise InputError(f"{kind}: {text[:NAME_LIMIT]}: {wrong}")
    return Source(kind, str(path), path)


def _decode_data_url(kind: str, url: str) -> Source:
    header, comma, body = url.partition(",")
    name = f"{header[:40]},…"
    if not comma or not header.lower().endswith(";base64"):
        raise InputError(f"{kind}: {name}: a data URL must be data:<type>;base64,<bytes>")
    try:
        return Source(kind, name, base64.b64decode("".join(body.split()), validate=True))
    except ValueError as error:
        raise InputError(f"{kind}: {name}: is not base64: {error}") from None


def _download(kind: str, url: str, allow_network: bool) -> Source:
    if not allow_network:
        raise InputError(
            f"{kind}: {url}: network access is off; allow_network=True (glm4v --allow-network) turns it on"
        )
    try:
        sent = urllib.parse.quote(url, safe=string.printable)  # a path may be in any script; HTTP's is ASCII
        with urllib.request.urlopen(sent, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data = response.read(DOWNLOAD_LIMIT_BYTES + 1)
            missing = response.length  # of what was announced; a read that is given a size doesn't tell
    except (OSError, ValueError, HTTPException) as error:
        raise Source(kind, url, b"").error(f"cannot be downloaded: {error}") from None
    if len(data) > DOWNLOAD_LIMIT_BYTES:
        raise Source(kind, url, b"").error(f"is larger than {DOWNLOAD_LIMIT_BYTES} bytes")
    if missing:
        raise Source(kind, url, b"").error(f"cannot be downloaded: the last {missing} bytes did not come")
    return Source(kind, url, data)
