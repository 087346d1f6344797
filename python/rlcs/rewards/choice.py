"""Options by letter, and short answers in words: vqa, choice, spatial."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from . import worker
from .dates import same_moment
from .judge import Judge
from .number import close, percent_left_out, read_count, read_number, scaled, unmark
from .text import (
    asks_for_order,
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
from .units import asked_unit, coins, is_measure, is_unit, same_unit, unit_name
from .verdict import Verdict, judged, right, wrong

_OPTION = re.compile(r"(?:^|\n|\s)\(?([A-Z])[).:、．]\s*(.+?)(?=\s+\(?[A-Z](?:[).:、．]\s|[):、．])|\n|$)")
_BOLD_LETTER = re.compile(r"(?<!\S)\*\*(\(?[A-Z](?:[).:、．]|(?=\*\*)))(?:\*\*)?")  # **A.** red, **A. red**
_LINE = re.compile(
    r"^([ \t]*)(?:\(?([a-z])[).]|\[([A-Za-z])\])[ \t]+(?=\S.*?(\?)?\s*$)", re.MULTILINE
)  # a) red, [A] red
_LONE = re.compile(r"[(\[]?([A-Za-z])(?:[)\]]?\.?$|[).:\]](?=\s))")
_LETTERS = re.compile(r"\(?\s*([A-Z])\s*\)?")
_CALLED = re.compile(
    r"(?:(?:the )?(?:correct )?(?:options?|choices?|answers?|figures?|images?)(?: is)?[:：]?\s+"
    r"|故?(?:正确)?(?:答案|(?:答案)?应?选项?)(?:是|为)?[:：]?\s*)"
    r"(?=\(?(?-i:[A-Z])(?![A-Za-z]))",
    re.IGNORECASE,
)
_CAPITAL = re.compile(r"[A-Z](?![a-z])")
_SEVERAL = re.compile(r"(?<!\w)(?:[A-H]\s*[).:、．]|[B-H](?!\w))")  # letters behind an option's own
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])(?:[).:、．]|\s*:|\s*[-–](?=\s*\S)|\s(?=[\w($\\]))\s*(.*)", re.DOTALL)
_AT = re.compile(r"(?:in|on|at|to) (?:the )?(.+?)(?: side)?", re.IGNORECASE)
_SIGNED = re.compile(r"[\\^=√<>|]|(?<![^\W\d_]{3})[-+](?![^\W\d_]{3})|(?<![^\W\d_]{4})[/(](?![^\W\d_]{4})")
_ATOM, _TERM = re.compile(r"[\d.]+|√?(?:\d+|\w)"), re.compile(r"[^-+/]*")
_WORD = re.compile(r"(?!sin|cos|tan|log)(?<![\\A-Za-z])(?=[A-Za-z]{0,2}[aeiouyAEIOUY])[A-Za-z][a-z]{2}")  # red, not mgR
_MARKUP = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|[*$]")


def options_of(question: str | None) -> dict[str, str]:
    """Letter -> text of the options that a question lists, e.g. ``(A) red``, ``B. blue``, ``**C.** green``; also
    ``a) red`` and ``[A] red``, where lines begin so from A on and don't ask: those may be concentrations or questions.
    """
    question = _BOLD_LETTER.sub(r"\1", question or "")
    if not _OPTION.search(question):
        lines = list(_LINE.finditer(question))
        letters = "".join(m[2] or m[3] for m in lines).upper()
        if len(lines) > 1 and "ABCDEFGHIJ".startswith(letters) and not any(m[4] for m in lines):
            question = _LINE.sub(lambda m: f"{m[1]}{(m[2] or m[3]).upper()}. ", question)
    return {m[1]: m[2].strip() for m in _OPTION.finditer(question)}


def _in_capitals(text: str, options: Mapping[str, str]) -> str:
    """``B. blue`` of ``b) blue`` and ``[B] blue``, where b is an option's letter and no option."""
    found = _LONE.match(text)
    if found is None or found[1].upper() not in options or found[1] in options.values():
        return text
    return f"{found[1].upper()}.{text[found.end() :]}"


def _unmarked(text: str) -> str:
    for _ in range(2):  # one may stand in the other
        text = _MARKUP.sub(lambda m: m[1] or "", text)
    return text


def letters_of(text: str) -> frozenset[str] | None:
    """The option letters that the whole text is: ``A``, ``(B)``, ``A, C``, ``AC``, ``B and D``."""
    text = unicodedata.normalize("NFKC", text)
    text = _CALLED.sub("", _unmarked(text).strip(" .。"))
    text = re.sub(r"(?<=[A-Z])\s*选?项$", "", text)
    parts = re.split(r"\s*(?:,|，|、|;|&|\band\b|和)\s*|\s+", text)
    if len(parts) == 1 and re.fullmatch(r"[A-H]{2,6}", text) and list(text) == sorted(set(text)):
        return frozenset(text)
    found = [_LETTERS.fullmatch(part) for part in parts]
    return frozenset(m[1] for m in found if m) if all(found) and found else None


def _statements(text: str) -> list[str] | None:
    """The numbers in circles that the whole text is: ``①③``, ``①、③``."""
    return re.findall("[①-⑳]", text) if re.fullmatch(r"(?:[①-⑳][\s,，、;；和与及]*)+[.。]?", text) else None


def judge_option(answer: str, truth: str, question: str | None, ordered: bool = False) -> Verdict | None:
    """For a truth that is one or several option letters or an option's text; None if it isn't, if it can't be told from
    a name, or if a text of no option answers a text."""
    ordered = ordered or asks_for_order(question)
    due, stated = _statements(truth), _statements(answer)
    if due and stated:
        return judged(stated == due if ordered else set(stated) == set(due), "by numbers of statements")
    options = options_of(question)
    answer, truth = (_in_capitals(text, options) for text in (answer, truth))
    lettered = letters_of(truth)
    expected = lettered or _listed(truth, options)
    if expected is None or (len(truth.strip()) == 1 and truth.strip() > "J" and not options):
        return None
    given = letters_of(answer)
    if given is not None and (not options or given <= options.keys()):
        mine, theirs = _CAPITAL.findall(answer), _CAPITAL.findall(truth)
        if len(expected) > 1 and (ordered or (theirs != sorted(theirs) and not options)):  # B, A, C is an order
            return judged(mine == theirs, "by letters in order")
        return judged(given == expected, "by letter")
    if len(expected) > 1:
        return wrong("not the letters asked for") if options else None
    (letter,) = expected
    text = _CALLED.sub("", _unmarked(answer).strip())
    if options:  # B, blue and blue (B)
        behind = re.search(r"(?<=.)[(（]([A-Z])[)）]\.?\Z", text)
        text = f"{behind[1]}. {text[: behind.start()].strip()}" if behind else re.sub(r"\A([A-Z]), ", r"\1. ", text)
    if letter in options and _same_option(answer, options[letter], options):
        return right("by the option's text")
    if given is not None and not (options and _LETTER_AND_TEXT.fullmatch(text)):
        return judged(given == expected, "by letter")
    if (named := _LETTER_AND_TEXT.fullmatch(text)) and not hedges(text):
        if options:
            fits = letter not in options or _same_option(named[2], options[letter])
        else:  # A man is no A, and A. red B. blue are two options
            fits = not re.match(r"[A-Z]\s+\w", text) and not _SEVERAL.search(named[2])
        return judged(named[1] == letter and fits, "by letter and text")
    return wrong("not the option's text") if options and lettered else None


def _same_option(text: str, option: str, options: Mapping[str, str] | None = None) -> bool:
    """Whether a text is an option's, in its words or by its value: 0.25 of 1/4, $\\frac{1}{4}$. By its value it must be
    no other's."""
    text = said(text)
    if _same_line(_unmarked(text), _unmarked(option)):
        return True
    a, b = read_number(text), read_number(option)
    if a is None or b is None or a.value != b.value or (a.unit and unit_name(a.unit) != unit_name(b.unit)):
        return False
    others = [read_number(other) for other in (options or {}).values()]
    return sum(other is not None and other.value == b.value for other in others) < 2


def _in_line(text: str) -> str:
    """A text without spaces, its fractions and roots with strokes and signs: mg/2 of ``\\frac{mg}{2}``."""
    text = unmark(text)
    for _ in range(2):  # one may stand in the other
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", lambda m: f"√{_grouped(m[1], _ATOM)}", text)
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", _stroke, text)
    text = re.sub(r"([_^])\s*\{(\w+)\}", r"\1\2", text).replace("\\pi", "π").replace("\\theta", "θ")
    text = re.sub(r"[\s*]", "", text).replace("{", "(").replace("}", ")").rstrip(".。")
    text = whole[1] if (whole := re.fullmatch(r"\(([^()]*)\)", text)) else text
    return re.sub(r"\^(\d*[+-])$", r"\1", text)  # an ion's charge


def _stroke(found: re.Match[str]) -> str:
    return f"{_grouped(found[1], _TERM)}/{_grouped(found[2], _ATOM)}"


def _grouped(text: str, alone: re.Pattern[str]) -> str:
    return text if alone.fullmatch(text.strip()) else f"({text})"


def _same_line(text: str, option: str) -> bool:
    """The same words; of formulas (2^n + 1 and 2^{n+1}, mgR/r and mgr/R) the same signs, and letters without words."""
    a, b = _in_line(text), _in_line(option)
    if a == b or not (_SIGNED.search(a) or _SIGNED.search(b)):
        return a == b or same_words(text, option)
    signs, due = (re.sub(r"[^-+/^()=√<>|_\\]", "", line) for line in (a, b))
    return bool(_WORD.search(b)) and signs == due and (same_words(text, option) or a.casefold() == b.casefold())


def _listed(truth: str, options: dict[str, str]) -> frozenset[str] | None:
    """The letter of a truth that is an option as it stands in the list, ``B. blue``, or its text alone."""
    named = _LETTER_AND_TEXT.fullmatch(truth.strip())
    if named and named[1] in options and same_words(named[2], options[named[1]]):
        return frozenset(named[1])
    letters = [letter for letter, text in options.items() if same_words(text, truth)]
    return frozenset(letters) if len(letters) == 1 else None


@dataclass(frozen=True)
class Words:
    """A short answer: an option, a yes or no, a number (to ``tolerance``), or the same words; else a ``judge``."""

    tolerance: float = 1e-6
    judge: Judge | None = None

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        if overlong(answer, truth):
            return wrong("too long")
        answer, truth = unlabelled(last_value(said(answer), truth), truth, question)
        if tidy(answer) == tidy(truth):
            return right("the same text")
        if (decade := same_decade(answer, truth)) is not None:
            return judged(decade, "as decades")
        if (option := judge_option(answer, truth, question)) is not None:
            return option
        if (yes := truth_value(truth)) is not None:
            return judged(explained(answer) is yes, "yes or no")
        if re.fullmatch(r"0\d+", truth.strip()):
            return judged(same_words(answer, truth), "digits that are no number")
        if same_moment(answer, truth):
            return right("the same day or time")
        a, b = read_number(answer), read_number(truth)
        if b is not None:
            if a is None:
                return judged((count := read_count(answer)) is not None and count == read_count(truth), "as counts")
            (x, mine), (y, theirs) = scaled(a), scaled(b)
            if is_measure(mine) and not theirs:
                asked, plainly = asked_unit(question, unit_name(mine))
                turned = _turned(x, unit_name(mine), asked) if asked else None
                if plainly or turned is not None:
                    return judged(turned is not None and close(turned, y, self.tolerance), "as quantities")
            if not mine or not theirs or same_unit(mine, theirs):
                return judged(close(x, y, self.tolerance) or percent_left_out(a, b, question), "as numbers")
            if is_unit(mine) and is_unit(theirs):
                turned = _turned(x, unit_name(mine), unit_name(theirs))
                return judged(turned is not None and close(turned, y, self.tolerance), "as quantities")
        # 5¢ is not $5: the words of two numbers would leave out their signs.
        if (a is None or b is None) and same_words(answer, truth):
            return right("the same words")
        if b is None and (count := read_count(truth)) is not None and read_count(answer) == count:
            return right("as counts")
        given, due = entries(answer), entries(truth)
        if len(given) == len(due) > 1 and all(map(same_words, given, due)):
            return right("entry by entry")
        if (place := _AT.fullmatch(answer.strip(" ."))) and not _AT.fullmatch(truth) and same_words(place[1], truth):
            return right("the same place")
        if hedges(answer) and not hedges(truth):
            return wrong("the answer hedges")
        if self.judge is not None:
            return self.judge.compare(answer, truth, question)
        return wrong("other words")


def _turned(value: Fraction, mine: str, theirs: str) -> Fraction | None:
    """A number of one everyday unit in another; None if they don't compare, as currencies don't."""
    if mine == theirs:
        return value
    if factor := coins(mine, theirs):
        return value * Fraction(repr(factor[0]))
    try:
        factor = worker.call("rlcs.rewards.conversion:ratio_of_units", mine, theirs)
    except worker.WorkerFault as fault:
        if not str(fault).startswith("ValueError"):
            raise
        return None
    return value * Fraction(factor[0]).limit_denominator(10**9) + Fraction(factor[1]) if factor else None


@dataclass(frozen=True)
class Count:
    """A whole number of things: digits or words (English, Chinese), at most with what is counted behind it."""

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        expected = read_count(truth)
        if expected is None:
            raise ValueError(f"counting: truth must be a whole number, got {truth[:80]!r}")
        if overlong(answer, truth):
            return wrong("too long")
        given = read_count(last_value(said(answer), truth))
        return wrong("not one whole number") if given is None else judged(given == expected, "as counts")
