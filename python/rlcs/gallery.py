"""Tasks with their pictures and answers as cards of a page; which ones show what a run has learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from glm4v.answer import separate

from . import page
from .pictures import data_uri, framed, opened
from .record import Record, Row, mean_score, number, pictures, said
from .rewards.boxes import Box, read_boxes

LARGEST = (480, 320)  # pixels of a picture
SMALL = 200  # a narrower one is shown at twice its size
WAVES, DOMAINS, TASKS = 10, 8, 2  # read from either end; shown; of each domain
BOX = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.S)
TRUTH, ANSWER = "#22a06b", "#e8833a"
Shown = tuple[int, Row]  # wave, group


def gallery(record: Record) -> list[str]:
    """A few cards: of each domain the task that gained most and the one that still goes worst, if asked twice."""
    early, late = _ends(record)
    cards = []
    domains = list(dict.fromkeys(str(group.get("domain")) for _, group in [*early, *late]))
    for domain in domains[:DOMAINS]:
        first, last = (
            {str(group.get("task")): (wave, group) for wave, group in shown if group.get("domain") == domain}
            for shown in (reversed(early), late)
        )
        both = sorted(first.keys() & last.keys(), key=lambda t: (_gain(first[t], last[t]), t))
        if both:
            best = both[-1]
            worst = min(both, key=lambda t: (np.nan_to_num(mean_score(last[t][1])), t))
            cards += [card([first[t], last[t]], record.folder) for t in dict.fromkeys([best, worst])]
        else:
            found = [_middle(list(shown.values())) for shown in (first, last) if shown]
            cards += [card([one], record.folder) for one in found[:TASKS]]
    return cards


def card(shown: Sequence[Shown], folder: Path, only: Sequence[Row] | None = None) -> str:
    """One task, with some of its answers in each of the waves; ``only`` these answers, if given."""
    group = shown[0][1]
    chips = [group.get("domain"), group.get("category"), group.get("tier"), *([group.get("used")] if only else [])]
    head = "".join(f'<span class="chip">{escape(str(chip))}</span>' for chip in chips if chip)
    body = [f"<div>{head}<code>{escape(str(group.get('task')))}</code></div>"]
    truth = _boxes(group.get("truth")) if group.get("domain") == "grounding" else []
    body += [_picture(kind, files, truth) for kind, files in pictures(group, folder)]
    body.append(f"<p>{escape(said(group))}</p><p>truth: <b>{escape(str(group.get('truth')))}</b></p>")
    columns = []
    for wave, one in shown:
        scores = [number(a.get("score")) for a in one.get("answers") or [] if a.get("outcome") != "error"]
        right = sum(score == 1 for score in scores)
        title = f"wave {wave}: {right} of {len(scores)} right"
        title += f", mean {np.mean(scores):.2f}" if any(0 < score < 1 for score in scores) else ""
        parts = [f"<b>{escape(title)}</b>"]
        for answer in _ends_of(one) if only is None else only:
            parts.append(_answer(answer))
            given = _boxes(answer.get("text")) if truth else []
            if given:
                parts += [_picture(k, files, truth, given) for k, files in pictures(one, folder)]
        columns.append("<div>" + "".join(parts) + "</div>")
    return '<div class="card">' + "".join(body) + f'<div class="columns">{"".join(columns)}</div></div>'


def verdict(answer: Row) -> str:
    """What was said of an answer, in a line."""
    words = [str(answer.get("outcome")), f"{number(answer.get('score')):.2f}"]
    words += ["forced"] if answer.get("forced") else []
    words += [f"{answer.get('tokens')} tokens"] if answer.get("tokens") is not None else []
    words += ["cut off"] if answer.get("finish_reason") == "length" else []
    return ", ".join(words) + (f": {answer['detail']}" if answer.get("detail") else "")


def _answer(answer: Row) -> str:
    text, outcome = str(answer.get("text", "")), str(answer.get("outcome"))
    shown = escape(text)
    if outcome != "format" and "</think>" in text:  # of a bad format every sign counts
        thinking, rest = text.split("</think>", 1)
        rest = re.sub(r"</?answer>", "", rest).strip()
        boxed = BOX.sub(lambda m: f"\0{m[1]}\1", rest)
        marked = escape(boxed).replace("\0", "<mark>").replace("\1", "</mark>")
        shown = f'<span class="think">{escape(thinking.replace("<think>", "").strip())}</span>\n{marked}'
    kind = outcome if outcome in ("score", "wrong", "format", "error") else ""
    return f'<div class="soft">{escape(verdict(answer))}</div><div class="answer {kind}">{shown or "(nothing)"}</div>'


def _picture(kind: str, files: Sequence[Path], truth: Sequence[Box], given: Sequence[Box] = ()) -> str:
    names = ", ".join(str(file) for file in files)
    try:
        picture = opened(kind, files, LARGEST)
    except ValueError as error:
        return f'<p class="soft">{escape(kind)} not shown: {escape(str(error))}</p>'
    if truth:
        picture = framed(picture, truth, TRUTH, 4)
    if given:
        picture = framed(picture, given, ANSWER, 2)
    small = picture.width <= SMALL
    width = picture.width * (2 if small else 1)
    kind_of = ' class="small"' if small else ""
    return f'<img{kind_of} width="{width}" alt="{escape(names)}" src="{data_uri(picture)}">'


def _boxes(text: object) -> list[Box]:
    """Boxes of a truth or of an answer, as far as they can be read."""
    said = str(text)
    return [box for box, _ in read_boxes(separate(said).box or said) or []]


def _ends(record: Record) -> tuple[list[Shown], list[Shown]]:
    """Groups of the first and of the last waves; the latter are none where there is one wave."""
    steps = record.steps_shown
    count = max(1, min(WAVES, len(steps) // 2))
    early, late = steps[:count], steps[count:][-count:]
    return tuple([(step, group) for step in part for group in record.groups(step)] for part in (early, late))  # type: ignore[return-value]


def _ends_of(group: Row) -> list[Row]:
    """The best and the worst answer, or one where all are alike."""
    answers = sorted(group.get("answers") or [], key=lambda a: (a.get("outcome") != "error", number(a.get("score"))))
    if not answers:
        return []
    best, worst = answers[-1], answers[0]
    return (
        [best]
        if (best.get("outcome"), best.get("score")) == (worst.get("outcome"), worst.get("score"))
        else [best, worst]
    )


def _gain(first: Shown, last: Shown) -> float:
    return float(np.nan_to_num(mean_score(last[1]) - mean_score(first[1])))


def _middle(shown: Sequence[Shown]) -> Shown:
    """The group with the median score."""
    return sorted(shown, key=lambda one: np.nan_to_num(mean_score(one[1])))[len(shown) // 2]


def page_of(title: str, cards: Sequence[str]) -> str:
    """Cards alone, as a page."""
    return page.document(title, [f"<h1>{escape(title)}</h1>", '<div class="cards">', *cards, "</div>"])
