"""Rows of data files, one after the other: JSON lines or Parquet; a file, a folder or a pattern of them. No torch.

A row is read when it is asked for, and can be asked for again. What is wrong with one is said with its file and its
number, counted from 1.
"""

from __future__ import annotations

import codecs
import glob
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from glm4v.files import LFS_POINTER

PARQUET = ".parquet"
SUFFIXES = (".jsonl", PARQUET)  # that are taken from a folder
OTHERS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet by another name",
    LFS_POINTER: "a pointer of Git LFS, for which `git lfs pull` fetches the file",
}
"""How files begin that are often taken for JSON lines."""
BATCH = 64  # rows of a Parquet file that are decoded together

BadRule = Literal["fatal", "skip"]


@dataclass(frozen=True)
class Row:
    """One row, not parsed yet."""

    file: Path
    number: int
    read: Callable[[], Any]
    start: int = 0  # where its line begins, in bytes; of no meaning in a table

    @property
    def place(self) -> str:
        return f"{self.file}, {unit(self.file)} {self.number}"

    def content(self) -> Mapping[str, Any]:
        """The row as an object; ValueError says what it is else."""
        found = self.read()
        if not isinstance(found, dict):
            raise ValueError(f"must be a JSON object, got {type(found).__name__}")
        return found


class Unreadable(ValueError):
    """A file, or the rest of one, that gives no rows. The text names it."""


class BadRows:
    """What becomes of bad rows: ``bad(place, why)`` is an error at once, or notes each, which is left out, to a limit.

    Raises:
        ValueError: the rule is "fatal", or more than ``most`` places were bad.
    """

    def __init__(self, rule: BadRule, most: int, note: Callable[[str], None]) -> None:
        self.rule, self.most, self.note = rule, most, note
        self.places = set[str]()  # a row is noted once, in however many passes it is met

    def __call__(self, place: str, why: object) -> None:
        said = f"data: {place}: {why}"
        if self.rule == "fatal":
            raise ValueError(said)
        if place in self.places:
            return
        self.places.add(place)
        if len(self.places) > self.most:
            raise ValueError(
                f"data: bad rows must be at most {self.most} (--max-bad-rows), got one more: {place}: {why}"
            )
        self.note(said)


def unit(file: Path) -> str:
    return "row" if file.suffix == PARQUET else "line"


def files_of(path: Path) -> list[Path]:
    """The files that ``path`` means, sorted by name: itself, those of a folder, or those that a pattern fits.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is none, or Parquet cannot be read here.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise ValueError(f"data: {path} must hold files of {' or '.join(SUFFIXES)}, got none")
    elif not path.exists() and glob.has_magic(str(path)):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise ValueError(f"data: {path} must be a pattern that fits a file, got none")
    elif not path.exists():
        raise FileNotFoundError(f"data: {path} must be a file, a folder or a pattern of files, got nothing there")
    else:
        found = [path]
    if any(file.suffix == PARQUET for file in found) and find_spec("pyarrow") is None:
        raise ValueError("data: pyarrow must be installed to read Parquet: pip install pyarrow")
    return found


def rows_of(file: Path, start: int = 0) -> Iterator[Row]:
    """Rows of one file behind the first ``start``; blank lines are counted and left out.

    Raises:
        Unreadable: the file cannot be read, or not on from some row.
    """
    number = start
    try:
        for row in _parquet(file, start) if file.suffix == PARQUET else _lines(file, start):
            number = row.number
            yield row
    except FileNotFoundError:
        raise  # a wrong path, not a bad file
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        raise Unreadable(_unreadable(file, number, error)) from None


def row_at(file: Path, number: int, start: int) -> Row:
    """A row that was read before, by its number and where it starts.

    Raises:
        Unreadable: the file cannot be read any more, or has become shorter.
    """
    try:
        row = _tables.row(file, number) if file.suffix == PARQUET else _line(file, number, start)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{file}, {unit(file)} {number}: {_unreadable(file, 0, error)}") from None
    if row is None:
        raise Unreadable(f"{file}, {unit(file)} {number}: must be there as long as the run, got none")
    return row


def rows_of_all(files: list[Path], bad: BadRows) -> Iterator[Row]:
    """Rows of all files; what cannot be read of one is a bad row."""
    for file in files:
        try:
            yield from rows_of(file)
        except Unreadable as error:
            bad(str(file), error)


def _lines(file: Path, start: int) -> Iterator[Row]:
    at = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and (kind := next((OTHERS[mark] for mark in OTHERS if line.startswith(mark)), None)):
                raise ValueError(f"must be JSON lines or end in {PARQUET}, got {kind}")
            if number > start and _without_mark(line, number).strip():
                yield _row_of_line(file, number, at, line)
            at += len(line)


def _line(file: Path, number: int, start: int) -> Row | None:
    with open(file, "rb") as lines:
        lines.seek(start)
        line = lines.readline()
    return _row_of_line(file, number, start, line) if line else None


def _row_of_line(file: Path, number: int, start: int, line: bytes) -> Row:
    return Row(file, number, lambda: _parsed(_text(_without_mark(line, number))), start)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a JSON object, all in one line, got {error.msg} at {error.pos + 1}") from None


def _without_mark(line: bytes, number: int) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _parquet(file: Path, start: int) -> Iterator[Row]:
    for number, rows in _batches(file, start):
        for i, row in enumerate(rows, number + 1):
            if i > start:
                yield Row(file, i, lambda row=row: _without_nulls(row))  # type: ignore[misc]


def _batches(file: Path, start: int) -> Iterator[tuple[int, list[Any]]]:
    """Rows of a table, some at a time, and how many stand before them; row groups before ``start`` are passed over."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        number = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in table.iter_batches(BATCH, row_groups=[group]):
                yield number, batch.to_pylist()
                number += len(batch)


class _Tables:
    """Rows by their numbers, from whatever table: a pass over one in its order reads it once, as does each row group in
    which a row is looked for elsewhere. The latest rows are held. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._batches: Iterator[tuple[int, list[Any]]] = iter(())
        self._before, self._rows = 0, list[Any]()

    def row(self, file: Path, number: int) -> Row | None:
        with self._lock:
            if file != self._file or not self._before < number <= self._before + len(self._rows) + BATCH:
                self._file, self._before, self._rows = file, number - 1, []
                self._batches = _batches(file, number - 1)
            while number > self._before + len(self._rows):
                batch = next(self._batches, None)
                if batch is None:
                    self._file = None
                    return None
                self._before, self._rows = batch
            found = self._rows[number - self._before - 1]
        return Row(file, number, lambda: _without_nulls(found))


_tables = _Tables()


def _without_nulls(found: Any) -> Any:
    """Columns and fields that a row doesn't have are nulls in a table, and nothing in a row."""
    if isinstance(found, dict):
        return {name: _without_nulls(x) for name, x in found.items() if x is not None}
    return [_without_nulls(x) for x in found] if isinstance(found, list) else found


def _unreadable(file: Path, number: int, error: Exception) -> str:
    why = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return f"cannot be read{f' behind {unit(file)} {number}' if number else ''}: {why}"


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        said = f"must be UTF-8, got byte {error.object[error.start]:#04x} at {error.start + 1}"
        raise ValueError(said) from None
