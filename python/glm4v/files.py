"""Settings files of a checkpoint: JSON objects in, with one line for what is wrong; whole files out, or none.

A file is written under another name and takes its own once it lies on the disk, so that an interrupted save leaves the
old one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError

PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What stands beside config and weights, here or in transformers."""

LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file. ``where`` begins the error.

    Raises:
        InputError: the file is missing, cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: {path}: the file is missing") from None
    except OSError as error:
        raise InputError(f"{where}: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {path}: {unfetched(path) or f'is not JSON: {error}'}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}: {path}: must be a JSON object, got {type(data).__name__}")
    return data


def unfetched(path: Path) -> str:
    """What to say of a file that a clone without Git LFS left for later; empty for any other."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is a pointer of Git LFS, not yet the file: `git lfs pull` fetches it"
    return ""


def temporary(path: Path) -> Path:
    """Where the content of ``path`` stands until it is whole."""
    return path.with_name(f"{path.name}.tmp")


def write_temporary(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes ``chunks`` beside ``path``, down to the disk."""
    with temporary(path).open("wb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Brings a file or the names in a folder down to the disk; where the file system has no way to, nothing happens."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_temporary(path, [text.encode()])
        os.replace(temporary(path), path)
    finally:
        temporary(path).unlink(missing_ok=True)


def json_text(content: dict[str, Any]) -> str:
    """``content`` as the text of a JSON file."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def carry(source: Path, folder: Path) -> None:
    """Copies a checkpoint's tokenizer, template and picture settings to another folder, in place of those there."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.samefile(source):
        return
    for name in PROCESSOR_FILES:
        if not (source / name).exists():
            (folder / name).unlink(missing_ok=True)  # of another checkpoint
            continue
        try:
            shutil.copyfile(source / name, temporary(folder / name))
            os.replace(temporary(folder / name), folder / name)
        finally:
            temporary(folder / name).unlink(missing_ok=True)
