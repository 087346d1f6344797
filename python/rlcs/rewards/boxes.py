"""Boxes ``[x1, y1, x2, y2]`` in per mille of the image: read, compared, matched."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

Box = tuple[float, float, float, float]

LIMIT = 1000.0  # coordinates go from 0 to here
_MOST_CHARS, _MOST_BOXES = 20_000, 500
_FOUR = re.compile(r"[\[(]\s*(-?\d+(?:\.\d+)?)" + r"\s*,\s*(-?\d+(?:\.\d+)?)" * 3 + r"\s*[\])]")
_REST = re.compile(r"[\[\](),;\s]*")
_KEYS = ("bbox_2d", "box_2d", "bbox", "box")
_ANSWER = "<answer>"  # what Python calls the file that a text comes from
warnings.filterwarnings("ignore", module=_ANSWER)


def literal(text: str) -> Any:
    """JSON, or Python's way to write the same (single quotes, True); never evaluated.

    Raises:
        ValueError: neither.
    """
    if len(text) > _MOST_CHARS:
        raise ValueError("too long")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(tree(re.sub(r"(?<=[:\[,\s])(true|false)(?=\s*[,}\]])", lambda m: m[1].title(), text)))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"neither JSON nor a literal: {text[:60]!r}") from None


def tree(text: str) -> ast.expr:
    """Python's syntax tree of an expression, which is never run. Python's doubts about it concern nobody.

    Raises:
        ValueError, SyntaxError, TypeError, MemoryError, RecursionError: there is none.
    """
    return ast.parse(text.strip(), _ANSWER, "eval").body


def read_boxes(text: str) -> list[tuple[Box, str]] | None:
    """(box, label) of every box, labels from ``{"bbox_2d": …, "label": …}``; None if the text is not boxes alone."""
    try:
        return _from_value(literal(text))
    except ValueError:
        pass
    if len(text) > _MOST_CHARS or not _REST.fullmatch(_FOUR.sub("", text)):
        return None
    return [(_box(found), "") for found in _FOUR.findall(text)][:_MOST_BOXES] or None


def _from_value(value: Any) -> list[tuple[Box, str]] | None:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value or len(value) > _MOST_BOXES:
        return None
    if all(_is_number(x) for x in value):
        return [(_box(value), "")] if len(value) == 4 else None
    boxes: list[tuple[Box, str]] = []
    for entry in value:
        label = ""
        if isinstance(entry, dict):
            label = str(entry.get("label", ""))
            entry = next((entry[key] for key in _KEYS if key in entry), None)
            if isinstance(entry, (list, tuple)) and len(entry) == 1 and isinstance(entry[0], (list, tuple)):
                entry = entry[0]
        if not isinstance(entry, (list, tuple)) or len(entry) != 4 or not all(_is_number(x) for x in entry):
            return None
        boxes.append((_box(entry), label))
    return boxes


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e9


def _box(values: Any) -> Box:
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2


def valid(box: Box) -> bool:
    """Whether it has an area and lies in the image."""
    return 0 <= box[0] < box[2] <= LIMIT and 0 <= box[1] < box[3] <= LIMIT


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 if either is no valid box."""
    if not (valid(a) and valid(b)):
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def most_pairs(allowed: list[list[bool]]) -> int:
    """The most pairs (row, column) with ``allowed`` and no row or column twice (augmenting paths, Kuhn)."""
    column_of: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fits in enumerate(allowed[row]):
            if fits and column not in tried:
                tried.add(column)
                if column not in column_of or place(column_of[column], tried):
                    column_of[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(allowed)))
