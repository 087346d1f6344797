"""Mathematics, physics, chemistry, biology, geography: numbers within a tolerance, units as units, symbols as symbols.

Easy answers (numbers, options, equal texts) are judged here; the rest goes to sympy and pint in a worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from . import worker
from .choice import judge_option, options_of
from .judge import Judge
from .number import Number, close, read_number
from .text import hedges, same_words, tidy, truth_value
from .units import unit_name
from .verdict import Verdict, judged, right, wrong

_SYMBOLS = frozenset("+-*/^=<>≤≥(){}[]\\√π∞±|!²³½")


@dataclass(frozen=True)
class Stem:
    """Equal numbers to ``tolerance`` (relative), equal quantities after conversion, equal expressions, equal words.

    A unit that the truth names and the answer leaves out is taken as meant when ``bare_numbers`` is set: a maths
    question says its unit. Where nothing here decides, a ``judge`` may; without one the answer is wrong.
    """

    tolerance: float
    bare_numbers: bool = True
    deadline_s: float = worker.DEADLINE_S
    judge: Judge | None = None

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        if tidy(answer) == tidy(truth):
            return right("the same text")
        if (option := judge_option(answer, truth, question)) is not None:
            return option
        a, b = read_number(answer), read_number(truth)
        if a is not None and b is not None and (verdict := self._numbers(a, b, question)) is not None:
            return verdict
        if (yes := truth_value(truth)) is not None and not options_of(question):
            return judged(truth_value(answer) is yes, "yes or no")
        if b is None and same_words(answer, truth) and not _SYMBOLS & set(truth):
            return right("the same words")
        if (b is not None and a is None and not _SYMBOLS & set(answer)) or (hedges(answer) and not hedges(truth)):
            return wrong("no single value")
        if _mathematical(answer) and _mathematical(truth):
            try:
                equal = worker.call(
                    "rlcs.rewards.symbolic:equal", answer, truth, self.tolerance, deadline_s=self.deadline_s
                )
            except worker.WorkerFault as fault:
                if not str(fault).startswith("ValueError"):
                    raise
            else:
                return judged(equal, "as mathematics")
        if self.judge is not None:
            return self.judge.compare(answer, truth, question)
        return wrong("neither equal nor equivalent")

    def _numbers(self, a: Number, b: Number, question: str | None) -> Verdict | None:
        """None where the texts behind the numbers are no units."""
        mine, theirs = unit_name(a.unit), unit_name(b.unit)
        if mine == theirs or (not theirs and mine == "degree"):
            return judged(close(a.value, b.value, self.tolerance), "as numbers")
        if not mine and (self.bare_numbers or theirs == "degree"):
            return judged(close(a.value, b.value, self.tolerance), "as numbers, the unit left out")
        if not mine:
            return wrong(f"the unit is missing, expected {b.unit}")
        if not theirs:
            if not close(a.value, b.value, self.tolerance):
                return wrong("as numbers")
            if question and a.unit and a.unit.casefold() in question.casefold():
                return right("as numbers, with what the question counts")
            return self._known_unit(mine)
        factor = self._ratio(mine, theirs)
        if factor is None:
            return None if len(mine) <= 2 and len(theirs) <= 2 else wrong(f"{a.unit} is not {b.unit}")
        turned = a.value * Fraction(factor[0]) + Fraction(factor[1])
        return judged(close(turned, b.value, max(self.tolerance, 1e-9)), "as quantities")

    def _known_unit(self, unit: str) -> Verdict | None:
        """The truth names no unit, so the question does: any unit will do, but not a variable or a word."""
        return right("as numbers, the unit not asked for") if self._ratio(unit, unit) is not None else None

    def _ratio(self, mine: str, theirs: str) -> list[float] | None:
        try:
            return worker.call("rlcs.rewards.units:ratio_of_units", mine, theirs, deadline_s=self.deadline_s)
        except worker.WorkerFault as fault:
            if str(fault).startswith("ValueError"):
                return None  # not a unit that pint knows
            raise


def _mathematical(text: str) -> bool:
    """Whether the text may be mathematics rather than a sentence."""
    return len(text) <= 2000 and (bool(_SYMBOLS & set(text)) or len(text.split()) <= 3 or text[:1].isdigit())
