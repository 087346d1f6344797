"""Answers that leave the question's work undone: what it gives, in the form in which it gives it, 36 km/h where m/s are
asked for, (x + 1)(x + 2) or (x + 2)(x + 1) where it is to be expanded, 9/12 where the lowest terms are asked for; and
what a question says of the form of an equation."""

from __future__ import annotations

import math
import re

from .number import Number, read_number, unmark
from .units import is_measure, unit_name

SYMBOLS = frozenset("+-*/^=<>≤≥(){}[]\\√π∞±|!²³½")
REWRITE = re.compile(r"\b(?:simpl|reduc|lowest terms|convert|rewrite|express)|化简|约分|换算|化为|化成", re.IGNORECASE)
_WORK_OUT = re.compile(
    r"\b(?:expand|factor|evaluat|calculat|comput|rationali[sz]|value of)|计算|分解|展开|求值|的值", re.IGNORECASE
)
_FORM = re.compile(
    r"\b(?:as|to|into|in) (?:an? |its |the )?(?:\w+ )?(?:decimals?|fractions?|percent\w*|mixed|improper|scientific"
    r"|standard (?:form|notation)|exponential (?:form|notation)|simplest)\b|写成|改写|表示[为成]|科学[记计]数法",
    re.IGNORECASE,
)
# What stands right behind these is what the question asks to be worked out.
_ASKED = (
    r"(?:\b(?i:what(?: is|['’]s)|find|work out|give|write|multiply|add|subtract|divide|combine|collect|change"
    r"|how much is)(?i: the (?:sum|product|difference|quotient|value|result)(?: of)?)?\s*[:：]?|求|计算[:：]?)\s*"
)
# Behind a quantity: 36 km/h in m/s, or how many of them it is.
_INTO = r"\s*(?:(?i:in|to|into|as)\s+([^\s?!,;，。？]+)|(?:等于|[是合为=])\s*(?:多少|几|[?？_(（]))"
_EXPAND = re.compile(  # and no gas that does
    r"\b(?:expand|multiply)(?: and simplify| fully| completely| out)?:?\s*"
    r"(?:(?:the )?(?:expression|product|following|brackets?)\b|[$\\(\d]|[a-z][(^])|\bexpanded form|展开(?!图)",
    re.IGNORECASE,
)
_FACTOR = re.compile(
    r"(?:\A|[.,:;?!\n]\s*|\b(?:to|and|then|please|completely|fully) )factor\b|\bfactori[sz]|\bfactored form"
    r"|\bfactor completely|\bproduct of (?:its )?prime|分解质?因[式数]|因[式数]分解|质因数",
    re.IGNORECASE,
)
_LOWEST = re.compile(r"\blowest terms|\bsimplest|\bsimplif|\breduce\b(?! by)|约分|最简|化简", re.IGNORECASE)
_FRACTION = re.compile(r"(?:.*=)?\s*-?(?:\d+ )?(\d{1,40})/(\d{1,40})")
_SUM_IN_BRACKETS = re.compile(r"\([^()]*[^()^*/]\s*[-+][^()]*\)(?!\s*/\s*\d+\s*$)")
_SOLVED = re.compile(r"[\s$]*(\\?[A-Za-z]+(?:_\{?\w+\}?)?)\s*(?:[=<>≤≥]|\\[gln]e)")  # x = 4, x > 2

# A line's equation may stand in any form: x + 1 = 0 is x = -1.
_LINE = re.compile(
    r"\b(?:equations? (?:of|for)|(?<!number )lines?\b(?! segment)|asymptote|directri|tangent|ax[ei]s of|bisector|locus)"
    r"|直线|[切准法]线|渐近线|对称轴|轨迹|平分线",
    re.IGNORECASE,
)


def form_asked(truth: str, question: str | None) -> str:
    """What an equation may look like: "solved" for the name on the truth's left where that is a measurement or the
    question asks for the name, or for y = mx + b; "any" where it is a line's; "" where nothing says it."""
    number, named = read_number(truth), _SOLVED.match(unmark(truth))
    if number is not None and number.name and number.unit:
        return "solved"
    if named and re.search(r"\bslope[- ]intercept", question or "", re.IGNORECASE):
        return "solved"
    if named:
        article = named[1] == "a"  # for a car
        name = re.escape(named[1]) + (r"(?=[$.,;?!]|\s*\Z|\s+in\b)" if article else r"(?![A-Za-z0-9_(])")
        if re.search(rf"(?:(?i:\b(?:for|find|express|isolate|make|what is))|表示|求出?)\s*\$?{name}", question or ""):
            return "solved"
    return "any" if _LINE.search(question or "") else ""


def bare(text: str) -> str:
    """A text without braces and signs of products, fractions with strokes."""
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", unmark(text))
    text = re.sub(r"(?<![A-Za-z])\\?sqrt\s*\(([^()]*)\)|√\(([^()]*)\)", r"√\1\2", text)
    return re.sub(r"[{}*]|(?<=\d),(?=\d{3}(?!\d))", "", text).replace("\\sqrt", "√").replace("\\pi", "π").rstrip(" .。")


def copied(answer: str, truth: str, question: str) -> bool:
    """Whether an answer that equals the truth is still to be brought into the form that the question asks for."""
    if len(answer) + len(truth) > 400:
        return False
    named, equals, value = answer.rpartition("=")
    values = (answer, value) if equals and "=" not in truth and len(named) < 20 else (answer,)
    return _undone(answer, truth, question) or any(_stands(text, truth, question) for text in values)


def _undone(answer: str, truth: str, question: str) -> bool:
    """Whether the truth is a sum where one is to be expanded and the answer is a product; the other way round where
    there is to be a product; or a fraction can still be reduced."""
    kind, due = _kind(answer), _kind(truth)
    if due == "sum" and kind == "product" and _EXPAND.search(question):
        return _SUM_IN_BRACKETS.search(unmark(answer)) is not None
    if due == "product" and _FACTOR.search(question):
        whole = unmark(answer).isdecimal() and not unmark(truth).isdecimal()
        return whole or (kind == "sum" and _SUM_IN_BRACKETS.search(unmark(truth)) is not None)
    if _LOWEST.search(question):
        given, low = (_FRACTION.fullmatch(bare(text)) for text in (answer, truth))
        return given is not None and _common(given) > 1 and not (low and _common(low) > 1)
    return False


def _common(fraction: re.Match[str]) -> int:
    return math.gcd(int(fraction[1]), int(fraction[2]))


def _kind(text: str) -> str:
    """What an expression is in the end, a "sum" or a "product", one factor included; "" if it is no expression."""
    text, depth, before = unmark(text), 0, ""
    for char in text:
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif not depth and (char in "=<>≤≥±,;|" or char > "\u2fff"):
            return ""
        elif not depth and char in "+-" and before not in ("", *"^*/"):
            return "sum"
        before = char if not char.isspace() else before
    return "product" if before else ""


def _stands(answer: str, truth: str, question: str) -> bool:
    """Whether the answer stands as it is in a question that asks for another form of it, as the truth is."""
    asked = bare(question)
    letters = (r"\s*".join(map(re.escape, re.sub(r"\s", "", bare(text)))) for text in (answer, truth))
    given, due = (rf"(?<![A-Za-z0-9_.]){run}(?![A-Za-z0-9_]|\.\d)" for run in letters)
    if not re.search(given, asked) or re.search(due, asked):
        return False
    exactly = re.search(rf"{_ASKED}{given}(?!\s*[-+/^=(])", asked) is not None
    a, b = read_number(answer), read_number(truth)
    if a is None or b is None:
        worked = REWRITE.search(question) or _WORK_OUT.search(question) or _FORM.search(question)
        mine, solved = _SOLVED.match(answer), _SOLVED.match(truth)  # to be solved for x, whatever the verb
        unsolved = solved and set(answer) & set("=<>≤≥\\") and not (mine and mine[1] == solved[1])
        return bool(unsolved or (SYMBOLS & set(answer) and (worked or exactly)))
    into = re.search(given + _INTO, asked) if unit_name(a.unit) != unit_name(b.unit) else None
    if into and (not into[1] or unit_name(into[1]) == unit_name(b.unit) or (not b.unit and is_measure(into[1]))):
        return True
    return _changed(a, b, answer, truth) and bool(REWRITE.search(question) or _FORM.search(question) or exactly)


def _changed(a: Number, b: Number, answer: str, truth: str) -> bool:
    """Whether two equal numbers are written in two ways, not as 2 and 2.0 are."""
    given, due = bare(answer), bare(truth)
    units = (a.unit, a.percent) != (b.unit, b.percent)
    return "/" in given + due or units or ("^" in given) != ("^" in due)
