"""Charts and tables: numbers within 2.5 % of the truth, years exactly, words as words, lists entry by entry."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .choice import judge_option, options_of
from .dates import same_moment
from .judge import Judge
from .number import LETTERS, MULTIPLES, Number, close, read_count, read_number, scaled, unmark
from .text import (
    entries,
    explained,
    hedges,
    last_value,
    overlong,
    said,
    same_decade,
    same_words,
    tidy,
    truth_value,
    unlabelled,
)
from .units import asked_unit, is_measure, same_unit, unit_name
from .verdict import Verdict, judged, right, wrong

_YEARS = range(1000, 2200)
_BEFORE_CHRIST = re.compile(r"b\.? ?c(?:\.? ?e)?", re.IGNORECASE)
_POWER = re.compile(r"-?\s*10\s*\^")
_SCALE = re.compile(r"(?:\bin|how many|\() ?(thousand|million|billion|trillion)", re.IGNORECASE)


@dataclass(frozen=True)
class Chart:
    """``tolerance`` is relative. A number of four digits alone that may be a year is one."""

    tolerance: float = 0.025
    judge: Judge | None = None

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        if overlong(answer, truth):
            return wrong("too long")
        answer, truth = unlabelled(last_value(said(answer), truth), truth, question)
        if tidy(answer) == tidy(truth):
            return right("the same text")
        if (decade := same_decade(answer, truth)) is not None:
            return judged(decade, "as decades")
        if same_moment(answer, truth):
            return right("the same day or time")
        verdict = self._entry(answer, truth, question)
        if verdict is None:
            expected, given = entries(truth), entries(answer)
            if len(expected) > 1:
                if len(expected) != len(given):
                    return wrong(f"{len(given)} entries, expected {len(expected)}")
                pairs = zip(given, expected, strict=True)
                return judged(all((v := self._entry(a, b, None)) and v.score == 1 for a, b in pairs), "entry by entry")
        if verdict is None:
            if hedges(answer) and not hedges(truth):
                return wrong("the answer hedges")
            return self.judge.compare(answer, truth, question) if self.judge else wrong("other words")
        return verdict

    def _entry(self, answer: str, truth: str, question: str | None) -> Verdict | None:
        """One value; None where words alone don't decide."""
        if options_of(question) and (option := judge_option(answer, truth, question)) is not None:
            return option
        b = read_number(truth)
        if b is None:
            if (yes := truth_value(truth)) is not None and truth.strip() not in ("y", "n", "t", "f"):
                return judged(explained(answer) is yes, "yes or no")
            if (count := read_count(truth)) is not None and count == read_count(answer):
                return right("in words")
            return right("the same words") if same_words(answer, truth) else None
        a = read_number(answer)
        if a is None:
            count = read_count(answer)
            return judged(count is not None and b.value == count, "in words")
        if _POWER.match(unmark(truth)):  # of a scale of powers
            return replace(self, tolerance=0.0)._numbers(a, b, question)
        if b.plain_integer and int(b.value) in _YEARS:
            exact = replace(self, tolerance=0.0)._numbers(a, b, question).score == 1
            return judged(exact and not (a.percent or _BEFORE_CHRIST.fullmatch(a.unit)), "as years")
        return self._numbers(a, b, question)

    def _numbers(self, a: Number, b: Number, question: str | None) -> Verdict:
        mine, theirs = (unit_name(scaled(x)[1]) for x in (a, b))
        due, plainly = asked_unit(question, mine) if is_measure(mine) and not theirs else ("", False)
        if plainly and mine != due:
            return wrong(f"{a.unit} is not {due}")
        scales = MULTIPLES if plainly or mine == theirs else MULTIPLES | LETTERS  # 8848 m and meters
        (x, unit_a), (y, unit_b) = scaled(a, scales), scaled(b, scales)
        if asked := _SCALE.search(question or ""):  # 5 of "in millions", where the other says it
            x *= MULTIPLES[asked[1].casefold()] if x == a.value and y != b.value else 1
            y *= MULTIPLES[asked[1].casefold()] if x != a.value and y == b.value else 1
        if unit_a and unit_b and not same_unit(unit_a, unit_b):
            return wrong(f"{unit_a} is not {unit_b}")
        if close(x, y, self.tolerance):
            return right("as numbers")
        if a.percent != b.percent and not (unit_b if a.percent else unit_a):  # 50 for 50 %
            return judged(
                close(x * 100 if a.percent else x, y * 100 if b.percent else y, self.tolerance), "as per cent"
            )
        return wrong("as numbers")
