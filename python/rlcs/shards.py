"""Rows of data files, one after the other: JSON lines or Parquet; a file, a folder or a pattern of them. No torch.

A row is read when it is asked for. What is wrong with one is said with its file and its number, counted from 1.
"""

from __future__ import annotations

import codecs
import glob
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

PARQUET = ".parquet"
SUFFIXES = (".jsonl", PARQUET)  # that are taken from a folder
BATCH = 64  # rows of a Parquet file that are decoded together

BadRule = Literal["fatal", "skip"]


@dataclass(frozen=True)
class Row:
    """One row, not parsed yet."""

    file: Path
    number: int
    read: Callable[[], Any]

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
        for number, read in _parquet(file, start) if file.suffix == PARQUET else _lines(file, start):
            yield Row(file, number, read)
    except FileNotFoundError:
        raise  # a wrong path, not a bad file
    except OSError as error:  # pyarrow's own are ValueErrors or OSErrors
        raise Unreadable(_unreadable(file, number, error)) from None
    except ValueError as error:
        raise Unreadable(_unreadable(file, number, error)) from None


def rows_of_all(files: list[Path], bad: BadRows) -> Iterator[Row]:
    """Rows of all files; what cannot be read of one is a bad row."""
    for file in files:
        try:
            yield from rows_of(file)
        except Unreadable as error:
            bad(str(file), error)


def _lines(file: Path, start: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if number > start and line.strip():
                yield number, lambda line=line: json.loads(_text(line))  # type: ignore[misc]


def _parquet(file: Path, start: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        number = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            for batch in table.iter_batches(BATCH, row_groups=[group]):
                for row in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield number, lambda row=row: _without_nulls(row)  # type: ignore[misc]


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
