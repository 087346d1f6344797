"""Actions of an agent on a screen, as GLM-4.1V writes them on Android, on a desktop and in a browser.

Android: JSON, ``{"action_type": "click", "box_2d": [[x1, y1, x2, y2]]}``. Desktop and browser: calls,
``left_click(start_box='[x, y]')`` and ``CLICK(point=(x, y), box=[[x1, y1, x2, y2]])``. Coordinates are per mille.

Another action than the true one is worth 0, and so is a missing or a surplus argument. Otherwise the score is the
product over the arguments: IoU of boxes (a point in place of a ``box_2d`` or a ``box`` is worth 0: it would outdo an
honest box); for a point 1 inside the true box, else falling to 0 over ``reach`` per mille from it or from the true
point; 1 - edit distance / length of texts; smaller over larger of amounts; 1 or 0 of the rest. The paper says "action +
IoU" and no more: product and reach are ours.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from .boxes import Box, iou, literal, tree, valid
from .judge import Judge
from .text import edit_distance, same_words, tidy
from .verdict import Verdict, graded, right, wrong

Action = dict[str, Any]

_MOST_CHARS = 4000
_TEXTS = {"text", "content"}
_AMOUNTS = {"step", "distance", "steps", "time", "duration"}
_REMARKS = {"element_info", "element_type", "element"}  # what the target is called, for people
_BOXES = {"box_2d", "box", "start_box", "end_box", "point", "start_point", "end_point", "coordinates"}
_AREAS = {"box_2d", "box"}  # what start_box holds is a point, mostly
_KEYS = {"return": "enter", "esc": "escape", "control": "ctrl", "del": "delete", "pgdn": "pagedown", "pgup": "pageup"}


@dataclass(frozen=True)
class Gui:
    """``form`` is ``"json"`` or ``"call"``; ``remarks``: whether names of targets may stand in the action unasked."""

    form: str
    remarks: bool
    reach: float = 50.0
    judge: Judge | None = None

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        read = read_json_action if self.form == "json" else read_call
        expected = read(truth)
        if expected is None:
            raise ValueError(f"gui: truth must be an action, got {truth[:80]!r}")
        given = read(answer)
        if given is None:
            return wrong("not an action")
        name, true_name = given.pop("action_type"), expected.pop("action_type")
        if name != true_name:
            return wrong(f"{name} is not {true_name}")
        if self.remarks:
            given, expected = ({k: v for k, v in x.items() if k not in _REMARKS} for x in (given, expected))
        target = expected.get("box")  # where a call gives a point and the box that it must fall into
        if "point" in expected and "point" in given:
            given.pop("box", None), expected.pop("box", None)
        if given.keys() != expected.keys():
            return wrong(f"arguments {sorted(given)}, expected {sorted(expected)}")
        if str(true_name).casefold() == "answer":
            return self._said(given, expected, question)
        score = 1.0
        for key, value in expected.items():
            score *= self._argument(key, given[key], value, target)
        return graded(score, f"{name}: {score:.2f}")

    def _said(self, given: Action, expected: Action, question: str | None) -> Verdict:
        pairs = [(str(given[k]), str(expected[k])) for k in expected]
        if all(same_words(a, b) for a, b in pairs):
            return right("the same words")
        return self.judge.compare(pairs[0][0], pairs[0][1], question) if self.judge and pairs else wrong("other words")

    def _argument(self, key: str, given: Any, expected: Any, target: Any) -> float:
        if key in _BOXES:
            place, due = _numbers(given), _numbers(expected)
            if key in _AREAS and place and due and len(place) < len(due):
                return 0.0
            return self._place(place, due, _numbers(target) if key == "point" else None)
        if key in _TEXTS:
            a, b = tidy(str(given)), tidy(str(expected))
            return 1 - edit_distance(a, b) / max(len(a), len(b)) if a or b else 1.0
        if key in _AMOUNTS and _is_amount(given) and _is_amount(expected):
            if given == expected:
                return 1.0
            small, large = sorted((abs(given), abs(expected)))
            return small / large if given * expected > 0 else 0.0
        if key in ("key", "keys"):
            return float(_key(given) == _key(expected))
        if isinstance(given, str) and isinstance(expected, str):
            return float(given.strip().casefold() == expected.strip().casefold())
        return float(type(given) is type(expected) and given == expected)

    def _place(self, given: list[float] | None, expected: list[float] | None, target: list[float] | None) -> float:
        if given is None or expected is None:
            return 0.0
        if len(given) == 4 and len(expected) == 4:
            return iou(_as_box(given), _as_box(expected))
        if len(given) == 4:  # a box for a point: its middle is meant
            given = [(given[0] + given[2]) / 2, (given[1] + given[3]) / 2]
        area = expected if len(expected) == 4 else target
        if area is not None and len(area) == 4 and valid(_as_box(area)):
            away = [max(area[i] - given[i], given[i] - area[i + 2], 0.0) for i in (0, 1)]
        else:
            away = [abs(given[i] - expected[i]) for i in (0, 1)]
        return max(0.0, 1 - (away[0] ** 2 + away[1] ** 2) ** 0.5 / self.reach)


def read_json_action(text: str) -> Action | None:
    try:
        value = literal(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("action_type"), str):
        return None
    return dict(value) if all(isinstance(key, str) for key in value) else None


def read_call(text: str) -> Action | None:
    """``name(key=value, …)`` with literal values, read from its syntax tree and never run."""
    if len(text) > _MOST_CHARS:
        return None
    try:
        call = tree(re.sub(r"=\s*(true|false)\b", lambda m: "=" + m[1].title(), text))
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        action: Action = {"action_type": call.func.id}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in action:
                return None
            action[keyword.arg] = ast.literal_eval(keyword.value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return action


def _numbers(value: Any) -> list[float] | None:
    """Two or four coordinates, however nested or quoted."""
    if isinstance(value, str):
        try:
            value = literal(value)
        except ValueError:
            return None
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 4) or not all(_is_amount(x) for x in value):
        return None
    return [float(x) for x in value]


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _as_box(values: list[float]) -> Box:
    return values[0], values[1], values[2], values[3]


def _key(value: Any) -> tuple[str, ...]:
    """Keys pressed together, in any order but the last: ``Ctrl+Shift+s``; Return and Enter are one key."""
    if isinstance(value, (list, tuple)):
        value = "+".join(map(str, value))
    *held, last = (_KEYS.get(k, k) for k in re.split(r"\s*\+\s*|\s+", str(value).strip().casefold()))
    return *sorted(held), last
