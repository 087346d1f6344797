"""Training data: rows in the usual messages format, read with every row checked.

A row of `rlcs sft`: ``{"messages": [{"role": ..., "content": ...}, ...], "images": [...], "videos": [...]}``; with
``all_tokens`` it may be ``{"text": ..., "images": ...}``. Content is text, in which ``<image>`` and ``<video>`` stand
for the next of the row's paths, or a list of parts as ``glm4v.Processor`` takes them, of which a picture without a
source (``{"type": "image"}``) stands for the next path, too; a video given as frames is a part, for it needs its
``fps``. A row of `rlcs train` also has ``id, domain, truth`` and perhaps ``category, tier,
pass_rate, attempts, question``, and ends with a user's turn. Paths are relative to the file.

Data are one file, a folder of them or a pattern (``"shards/*.jsonl"``), of JSON lines or Parquet. A table's pictures
may be bytes, alone or as ``{"bytes": ..., "path": ...}``. What is wrong with a row is said with its file and number.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from glm4v.prompt import BESIDE
from glm4v.source import SPELLINGS, scheme, source_of

from .curriculum import TIERS
from .rewards import find
from .shards import BadRows, BadRule, Row, files_of, row_at, rows_of_all
from .types import Task

MARK = re.compile("<(image|video)>")
MOST_BAD = 1000  # rows that are left out, by default
MOST_ATTEMPTS = 10**9
T = TypeVar("T")


def read_rows(
    path: Path,
    made_of: Callable[[Row], T],
    bad_rows: BadRule | BadRows,
    note: Callable[[str], None] = print,
) -> list[T]:
    """``made_of(row)`` of every row of a file, a folder or a pattern of files.

    Raises:
        ValueError: there is no row, or a bad one is not to be left out (`BadRows`).
    """
    bad = bad_rows if isinstance(bad_rows, BadRows) else BadRows(bad_rows, MOST_BAD, note)
    rows = []
    for row in rows_of_all(files_of(path), bad):
        try:
            rows.append(made_of(row))
        except (ValueError, RecursionError) as error:
            bad(row.place, error)
    if not rows:
        skipped = len(bad.places)
        raise ValueError(f"data: {path} must hold a row, got none" + (f" but {skipped} bad ones" if skipped else ""))
    return rows


def conversation_of(row: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Messages of a row, its pictures in their places."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        got = reprlib.repr(messages) if "messages" in row else f"none beside {', '.join(row) or 'nothing'}"
        raise ValueError(f"messages must be a list of objects with role and content, got {got}")
    # Beside the content, which is all that is read.
    if row.get("tools") or any(message.get("tool_calls") for message in messages):
        raise ValueError("messages must be without tools and tool_calls, which are neither read nor learned here")
    for kind in ("image", "video"):
        if row.get(kind):
            raise ValueError(f"{kind} must be a list named {kind}s, got {reprlib.repr(row[kind])}")
    if beside := next((name for message in messages for name in BESIDE if message.get(name)), None):
        raise ValueError(f"pictures must be parts of a content or the row's images and videos, got {beside} beside one")
    pictures = {kind: iter(_paths(row, f"{kind}s")) for kind in ("image", "video")}
    found = [
        {
            "role": message.get("role"),
            # A mark is one where pictures may stand; in an answer it is text.
            "content": _content(message.get("content"), pictures, folder)
            if message.get("role") == "user"
            else message.get("content"),
        }
        for message in messages
    ]
    for kind, rest in pictures.items():
        if (left := list(rest)) and len(left) < len(_paths(row, f"{kind}s")):
            raise ValueError(f"{_as_many(kind)}, got {len(left)} more")
        if left:  # no mark at all: pictures come first, as most data sets mean it
            if any(_is_picture(part, kind) for m in found if m["role"] == "user" for part in _parts(m["content"])):
                said = f"{kind}s must be left out where parts of the content name their pictures"
                raise ValueError(f"{said}, got {len(left)} beside them")  # perhaps the same ones
            user = next((m for m in found if m["role"] == "user"), None)
            if user is None:
                raise ValueError(f"{kind}s must belong to a user's message, got {roles(found)}")
            content = user["content"]
            if not isinstance(content, str | list):
                raise ValueError(f"content must be text or a list of parts, got {type(content).__name__}")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            user["content"] = [{"type": kind, kind: _place(path, folder)} for path in left] + parts
    return found


def roles(messages: Sequence[Mapping[str, Any]]) -> str:
    """Whose the messages are, for an error."""
    return "messages of " + ", ".join(dict.fromkeys(str(message["role"]) for message in messages))


class Stored(Sequence[Mapping[str, Any]]):
    """Messages of a row with its pictures in it, which are not held: they are read whenever they are asked for."""

    __slots__ = ("file", "number", "start")

    def __init__(self, row: Row) -> None:
        self.file, self.number, self.start = row.file, row.number, row.start

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        row = row_at(self.file, self.number, self.start)
        try:
            return iter(conversation_of(row.content(), self.file.parent))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, i: Any) -> Any:
        return list(self)[i]


def document_of(row: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A document as one message: text with pictures in between."""
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise ValueError(f"text must be a text, got {reprlib.repr(text)}")
    return conversation_of({**row, "messages": [{"role": "user", "content": text}]}, folder)


def task_of(row: Mapping[str, Any], folder: Path) -> Task:
    """A row of `rlcs train`."""
    for name in ("id", "domain", "truth"):
        if not isinstance(row.get(name), str) or (name != "truth" and not row[name]):
            raise ValueError(f"{name} must be a text, got {reprlib.repr(row.get(name))}")
        expect_unicode(name, row[name])
    try:
        find(row["domain"])
    except ValueError as error:
        raise ValueError(str(error).removeprefix("verify: ")) from None
    for name in ("category", "question"):
        if not isinstance(row.get(name, ""), str | None):
            raise ValueError(f"{name} must be a text, got {reprlib.repr(row[name])}")
        expect_unicode(name, row.get(name) or "")
    if row.get("tier") not in (None, *TIERS):
        raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {reprlib.repr(row['tier'])}")
    rate, attempts = row.get("pass_rate"), row.get("attempts")
    if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
        raise ValueError(f"pass_rate must be from 0 to 1, got {reprlib.repr(rate)}")
    if attempts is not None and not (isinstance(attempts, int) and 0 < attempts <= MOST_ATTEMPTS):
        raise ValueError(f"attempts must be from 1 to {MOST_ATTEMPTS}, got {str(attempts)[:40]}")
    messages = conversation_of(row, folder)
    if messages[-1]["role"] != "user":
        raise ValueError(f"messages must end with a user's, got {messages[-1]['role']!r}")
    return Task(
        id=row["id"],
        domain=row["domain"],
        messages=messages,
        truth=row["truth"],
        category=row.get("category") or "",
        tier=row.get("tier"),
        pass_rate=rate,
        attempts=attempts,
        question=row.get("question"),
    )


def expect_unicode(name: str, text: str) -> None:
    """Raises ValueError for half a pair of UTF-16, which JSON can spell and no file or tokenizer can take."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{name} must be Unicode, got half a pair of UTF-16 in {text[:60]!r}")


def read_tasks(path: Path, bad_rows: BadRule | BadRows = "fatal", note: Callable[[str], None] = print) -> list[Task]:
    """Tasks of a file, a folder or a pattern of files; a row whose id an earlier one has is bad."""
    places: dict[str, str] = {}

    def unique_task(row: Row) -> Task:
        task = task_of(row.content(), row.file.parent)
        if _holds_pictures(task.messages):
            task = replace(task, messages=Stored(row))
        if task.id in places:
            where = places[task.id].removeprefix(f"{row.file}, ")
            raise ValueError(f"id must be another than that of {where}, got {task.id!r} again")
        places[task.id] = row.place
        return task

    return read_rows(path, unique_task, bad_rows, note)


def _holds_pictures(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a picture stands in the messages themselves: as bytes or as a data URL."""
    parts = [part for message in messages for part in _parts(message["content"])]
    sources = [part[kind] for part in parts for kind in ("image", "video") if kind in part]
    each = [one for source in sources for one in (source if isinstance(source, list) else [source])]
    return any(map(stands_inside, each))


def stands_inside(source: Any) -> bool:
    """Whether a picture's bytes stand where it is named."""
    return isinstance(source, bytes) or (isinstance(source, str) and source[:5].lower() == "data:")


def _paths(row: Mapping[str, Any], name: str) -> list[Any]:
    found = row.get(name) or []
    if not isinstance(found, list) or not all(isinstance(x, str | bytes | list | dict) for x in found):
        raise ValueError(f"{name} must be a list of paths, got {reprlib.repr(found)}")
    return [_unwrapped(x, name) for x in found]


def _unwrapped(picture: Any, name: str) -> Any:
    """A picture of a table as its bytes or its path: ``{"bytes": ..., "path": ...}`` is how they stand in Parquet."""
    if not isinstance(picture, dict):
        return picture
    found = picture.get("bytes") or picture.get("path")
    if not isinstance(found, str | bytes):
        raise ValueError(f"{name} must be a list of paths, got {list(picture)} in it")
    return found


def _parts(content: Any) -> list[dict[str, Any]]:
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _is_picture(part: Mapping[str, Any], medium: str) -> bool:
    return part.get("type") in (medium, f"{medium}_url")


def _as_many(medium: str) -> str:
    return f"{medium}s must be as many as <{medium}> marks and {medium} parts without a source"


def _next(pictures: Mapping[str, Iterator[Any]], medium: str, folder: Path) -> Any:
    """Which of the row's pictures a mark stands for."""
    path = next(pictures[medium], None)
    if path is None:
        raise ValueError(f"{_as_many(medium)}, got fewer")
    return _place(path, folder)


def _content(content: Any, pictures: Mapping[str, Iterator[Any]], folder: Path) -> Any:
    """Text with marks as parts; parts with their paths made whole."""
    if isinstance(content, list):
        return [_part(part, pictures, folder) if isinstance(part, dict) else part for part in content]
    if not isinstance(content, str) or not MARK.search(content):
        return content
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(MARK.split(content)):  # text, kind, text, kind, ..., text
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
            continue
        parts.append({"type": piece, piece: _next(pictures, piece, folder)})
    return parts


def _part(part: dict[str, Any], pictures: Mapping[str, Iterator[Any]], folder: Path) -> dict[str, Any]:
    """A part; the spellings of pictures that `glm4v.Processor` reads become one, with the path made whole."""
    medium = next((medium for medium in pictures if _is_picture(part, medium)), None)
    if medium is None:
        return part
    kind = part["type"]
    if all(part.get(name) is None for name in (medium, f"{medium}_url", *SPELLINGS)):
        place = _next(pictures, medium, folder)
    elif (source := source_of(kind, part)) is not None:
        place = _place(source, folder)
    else:  # of no spelling: the processor's to refuse
        return part
    rest = {name: value for name, value in part.items() if name not in ("type", kind, *SPELLINGS)}
    return {**rest, "type": medium, medium: place}


def _place(path: Any, folder: Path) -> Any:
    """A path beside the file, if it is there; a video may be a list of frames; URLs and absolute paths stay."""
    if isinstance(path, list):
        return [_place(one, folder) for one in path]
    if not isinstance(path, str) or scheme(path):
        return path
    place = folder / path
    try:
        there = place.exists()
    except OSError as error:  # a name too long: a picture's bytes in base64, perhaps
        raise ValueError(f"{path[:60]}... must be a file, a URL or data:image/...: {error.strerror}") from None
    if not there:
        raise ValueError(f"{path} must be a file, got none at {place}")
    return str(place)
