"""Files that are there whole or not at all, whenever the machine stops. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PART = ".part"  # ends the name of what is not whole yet
LOCK = ".lock"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to. What stands there takes the name once it lies on the disk; where the block
    fails it goes, and an older file stays. Behind a link, it is the file that the link means.

    Raises:
        ValueError: a folder, a device or a pipe has the name.
    """
    path = _target(path)
    part = path.with_name(path.name + PART)
    try:
        with named(path):
            yield part
            sync(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def expect_writable(path: Path) -> None:
    """Raises ValueError or OSError now, before hours of work, where `write_text` would then."""
    path = _target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    part.touch()
    part.unlink()


def expect_folder(path: Path) -> None:
    """Raises ValueError now, before a model is read, where a folder cannot be made or written into later."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    wrong = "" if there.is_dir() else "a file"
    if not wrong and not os.access(there, os.W_OK | os.X_OK):
        wrong = "one that is read-only"
    if wrong:
        where = "" if there == path else f": {there}"
        raise ValueError(f"run: {path} must be a folder that can be written, got {wrong}{where}")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """In here an OSError of a write, which doesn't say where it was, says it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _target(path: Path) -> Path:
    """The file that is meant, which may not be there; a device (/dev/null) would be one no more."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file, got {'a folder' if path.is_dir() else 'a device or a pipe'}")
    return Path(os.path.realpath(path))


def held(folder: Path) -> IO[str]:
    """A file of ``folder``: until it is closed, or its process has ended in whatever way, no other process gets it.

    Raises:
        ValueError: another one has it. Where the file system knows no locks, nobody is told.
    """
    file = open(folder / LOCK, "a")  # noqa: SIM115 (it is what is returned)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(f"run: {folder} must be one run's alone, got another process that trains in it") from None
    return file


def write_text(path: Path, text: str) -> None:
    """Writes a file whole, its folder too where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        # Half a pair of UTF-16 (an answer's JSON may hold one) is written as its escape, which JSON reads.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path: Path) -> None:
    """Brings a file or a folder down to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
