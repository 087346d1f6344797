"""Mathematics, physics, chemistry, biology, geography: numbers within a tolerance, units as units, symbols as symbols.

Easy answers (numbers, options, equal texts) are judged here; the rest goes to sympy and pint in a worker.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from . import worker
from .choice import judge_option, letters_of, options_of
from .copies import REWRITE, SYMBOLS, bare, copied, form_asked
from .dates import same_moment
from .formulas import STATE, WRITTEN, chain, formula
from .judge import Judge
from .number import (
    CUT_OFF,
    MULTIPLES,
    Number,
    close,
    other_name,
    percent_left_out,
    read_count,
    read_number,
    scaled,
    unmark,
)
from .text import (
    asks_for_order,
    denies,
    entries,
    explained,
    hedges,
    last_value,
    numbered,
    overlong,
    plain,
    said,
    same_decade,
    same_words,
    tidy,
    truth_value,
    unlabelled,
)
from .units import asked_unit, coins, divided_by_all, is_measure, is_unit, unit_name
from .verdict import Verdict, judged, right, wrong

_MARKUP = frozenset("(){}[]\\^")
_HYPHEN = re.compile(
    r"(?<=[^\W\d_])-(?=[^\W\d_]{2})|(?<=[^\W\d_]{2})-(?=[^\W\d_])|\*\*"  # x-ray, **bold**
    r"|(?<=[^\W\d_]{4})-(?=\d)"  # carbon-14, not mgh-2
    r"|(?<=[^\W\d_]{3})\([IVX]+\)"  # iron(III) oxide
    r"|(?<=\d)-(?!sin|cos|tan|sec|csc|cot|log|exp|arc)(?=[^\W\d_][a-z]{5})"  # 2-methylpropane
)
_GENOTYPE = re.compile(r"(?:([A-Za-z])(?i:\1))+")  # AaBb
_CHEMICAL = re.compile(r"(?:[A-Z][a-z]?|[\d()\[\]])+")
# What pint takes for a unit, and an answer of mathematics for a constant or a variable.
_NO_UNITS = frozenset((*"abcekuBDPRπħ‰", "pi", "alpha", "gamma", "mu", "hbar"))
# pint takes nearly any two letters for one.
_SHORT_UNITS = frozenset((
    "ft", "in", "yd", "lb", "oz", "mi", "ha", "ly", "au", "AU", "ms", "kV", "mV", "mA", "MW", "GW", "kN", "eV", "dB",
    "MB", "GB", "K", "C", "F", "bp", "kb", "Mb", "mM", "nM", "uM", "cM", "Da", "IU",
))  # fmt: skip
_SCALES = {word: scale for word, scale in MULTIPLES.items() if word not in ("k", "mn", "bn")}  # 3k may be a product
_OR = re.compile(r"(?<!\s)\s+(?:or|and)\s+|[或和、]")
_EITHER = re.compile(r"\bor\b|或")
_INEQUALITY = re.compile(r"[<>≤≥≠]|\\(?:[gln]eq?(?:slant)?|[gl]t)(?![A-Za-z])")
_CLASSIFIERS = frozenset("个只名位张本件条支枚棵辆颗朵头匹种倍")  # three of whatever
_DIRECTED = re.compile(r"\s*(?:,\s*)?\b(?:to the|towards? the|towards?|due) |\s*,?\s*方向|\s*,\s*")  # N, to the left
_WORD = re.compile(r"[^\W\d_]{3,}[\w ]*|[\u3400-\u9fff]+")
_UNIT_BEHIND = re.compile(
    r"(.*?\S)\s*(?:\\(?:text|mathrm)\s*\{([^{}]+)\}(\^\{?\d\}?)?"
    r"|\s(rad(?:ians?)?|[a-z]{2}(?:\^\{?\d\}?|[²³])?|(?:square |cubic )?units)"
    r"|(?<![\u4e00-\u9fff])([\u4e00-\u9fff]{1,4}))\s*\$?",
    re.DOTALL,
)
# In what stands behind a number: no letters of a product, nor a function.
_NAME = re.compile(r"(?<![\\A-Za-z])(?!sin|cos|tan|log|exp)[A-Za-z]{3,}|[\u3400-\u9fff]")

_GREEK = frozenset("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ")
_LONG_WORD = re.compile(r"(?<![\\a-z{])[a-z]{5,}")
_FUNCTION = re.compile(
    "sin|cos|tan|sec|csc|cot|log|exp|sqrt|infin|alpha|gamma|delta|epsilon|theta|kappa|lambda|sigma|upsilon|omega"
)
_ALONE = re.compile(r"(?<![A-Za-z\\])[A-Za-zα-ω](?![A-Za-z])")
_LABELS = [frozenset(run) for run in ("ABCDEFGH", "PQRS", "XYZ", "ACGTU")]
_STRAND = re.compile(r"\b(?:sequen|codon|strand|path|route)", re.IGNORECASE)
_SIGNS = {"angle": "∠", "triangle": "△", "parallel": "∥", "perp": "⊥", "cong": "≅", "sim": "∽"}
_SIGN = re.compile(r"\\(angle|triangle|parallel|perp|cong|sim)(?![A-Za-z])\s*")
_REALS = re.compile(
    r"(?:[a-z]\s*(?:∈|\\in)\s*)?(?:R|ℝ|\\mathbb\s*\{?R\}?)|(?i:all reals|all real numbers)|[全一][体切]实数"
)
_RATIO = re.compile(r"\bratio|\bproportion|比", re.IGNORECASE)
_GOES_ON = re.compile(r"\.\.\.|…|\\[cl]?dots")
_NESTED = re.compile(r"\{\s*(?:\\(?:emptyset|varnothing)(?![A-Za-z])|∅)")  # {∅} is not ∅
_SAME = (  # in words, and beside a sign
    re.compile(r"(?:there (?:is|are) )?no solutions?(?: exists?)?|empty ?set|varnothing|∅|无解|空集"),
    re.compile(r"(?:limit )?does(?: not|n t) exist|d ?n ?e|不存在"),
)
# 6 R 3, 6 remainder 3, 6……3: what a division leaves
_WITH_REMAINDER = re.compile(
    r"(\d+)\s*(?:,? ?(?:with )?(?:a )?(?:R|r|[Rr]emainder)(?: of)?|余|\.{3,6}|(?:\\[cl]?dots\s*){1,2})\s*(\d+)"
)
_CODED = re.compile(r"0[xX][\dA-Fa-f]{1,400}|0[bB][01]{1,400}|0[oO][0-7]{1,400}")
_BASED = re.compile(r"(\d[\dA-F]*)(?:_\{?(\d+)\}?)?")  # 1101_2
# Dates, times, ranges, scores and ratios: 2020-01-05, 2:30, 10-3 are no differences and quotients.
_LABEL = re.compile(r"\d+(?:-\d+)+|\d*√?\d+(?::\d*√?\d+)+|\d+(?:/\d+){2,}")
_YEAR = re.compile(
    r"\b(?:which|what|in|the|that) years?\b|\byear of\b|\bwhen (?:was|were|is|did)\b|哪一?年|年份", re.IGNORECASE
)


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
        if overlong(answer, truth):
            return wrong("too long")
        answer, truth = unlabelled(last_value(said(answer), truth), truth, question)
        if tidy(answer) == tidy(truth) or unmark(tidy(answer)) == unmark(tidy(truth)):
            return right("the same text")
        if same_moment(answer, truth):
            return right("the same day or time")
        if truth.isdecimal() and same_decade(answer, truth) is not None:
            return wrong("a decade is no year")
        given, due = numbered(answer), numbered(truth)
        ordered = (given, due) != (answer, truth) or asks_for_order(question)
        verdict = self._compare(given, due, question, ordered)
        if verdict.score and question and copied(answer, truth, question):
            return wrong("what the question gives, not what it asks for")
        return verdict

    def _compare(self, answer: str, truth: str, question: str | None, ordered: bool) -> Verdict:
        if (option := judge_option(answer, truth, question, ordered)) is not None:
            return option
        if _LABEL.fullmatch(label := re.sub(r"\s", "", bare(truth))):
            given = re.sub(r"\s", "", re.sub(r"(?<=\d)(?:\s+to\s+|比)(?=\d)", ":", bare(answer))).rpartition("=")[2]
            given, label = (re.sub(r"\A0(?=\d:\d\d)", "", text.replace("/", ":")) for text in (given, label))
            if _RATIO.search(question or "") and not REWRITE.search(question or ""):
                return judged(_shares(given) == _shares(label), "as ratios")
            return judged(given == label, "as written")
        if divided := _WITH_REMAINDER.fullmatch(unmark(truth)):
            mine = _WITH_REMAINDER.fullmatch(unmark(answer))
            return judged(mine is not None and mine.groups() == divided.groups(), "quotient and remainder")
        if _CODED.fullmatch(truth):
            return judged(_CODED.fullmatch(answer) is not None and int(answer, 0) == int(truth, 0), "as code")
        if (digits := _digits(truth)) is not None and digits[1]:
            return judged(_digits(answer) in (digits, (digits[0], "")), "digits of a base")
        if (based := _digits(answer)) is not None and based[1] == "10":
            answer = based[0]
        nested = any(_NESTED.search(unmark(text)) for text in (answer, truth))
        if not nested and any(same.fullmatch(plain(answer)) and same.fullmatch(plain(truth)) for same in _SAME):
            return right("the same in other words")
        measured = self.tolerance > CUT_OFF
        if measured and (verdict := self._one_by_one(answer, truth, question)) is not None:
            return verdict
        a, b = read_number(answer), read_number(truth)
        if a is not None and b is not None and (verdict := self._numbers(a, b, question)) is not None:
            return verdict
        if (yes := truth_value(truth)) is not None and not options_of(question):
            return judged(explained(answer) is yes, "yes or no")
        if (a is None) != (b is None):  # two for 2
            count = read_count(truth, named=False)
            if count is not None and count == read_count(answer, named=False):
                return right("in words")
        if b is None and _same_words(answer, truth, question):
            return right("the same words")
        due, given = formula(truth), formula(answer)
        if not (STATE.search(due) and STATE.search(given)):  # of a state that only one of them names
            due, given = (STATE.sub("", text) for text in (due, given))
        if due == given and WRITTEN.fullmatch(due):
            return right("the same formula")
        if (steps := chain(truth)) is not None and chain(answer) == steps:
            return right("the same chain")
        answer, truth = (
            "(-\\infty, \\infty)" if _REALS.fullmatch(text.strip(" $.")) else text for text in (answer, truth)
        )
        # x = 1 or x = 2 are two values
        said, meant = (_OR.sub(", ", _at_once(x, other)) for x, other in ((answer, truth), (truth, answer)))
        said, meant = (said, meant) if b is None else (answer, truth)
        said, meant = (text.replace("且", "∧") for text in (said, meant))  # k < 1 and k ≠ 0
        either = [bool(_EITHER.search(text)) for text in (answer, truth)]
        if either[0] != either[1] and "∧" in (meant if either[0] else said):
            return wrong("or is not and")
        other = b is not None and a is None and (denies(answer) or not SYMBOLS & set(answer))
        if other or (hedges(said) and not hedges(truth)):
            return wrong("no single value")
        measure = a is None and b is not None and self._is_measured(b.unit, question)
        if measure and b and (said_of := _of_unit(said, b.unit)) and (meant_of := _of_unit(meant, b.unit)):
            said, meant = said_of, meant_of
        elif a is None or b is None:
            said, meant = self._without_unit(said, meant, question)
        spelt = (steps or (_spelt(answer) and _spelt(truth))) and not _product(truth, question)
        words = _long_words(meant)
        spelt = spelt or (bool(words) and _long_words(said) != words)
        if _mathematical(said) and _mathematical(meant) and not spelt:
            try:
                equal = worker.call(
                    "rlcs.rewards.symbolic:equal",
                    *(said, meant, self.tolerance, ordered or (measured and not hedges(truth))),
                    form_asked(truth, question),
                    measure,
                    deadline_s=self.deadline_s,
                )
            except worker.WorkerFault as fault:
                if not str(fault).startswith("ValueError"):
                    if not self._works("rlcs.rewards.symbolic:check", meant):
                        raise
                    return wrong(f"as mathematics: {fault}")
            else:
                return judged(equal, "as mathematics")
        if self.judge is not None:
            return self.judge.compare(answer, truth, question)
        return wrong("neither equal nor equivalent")

    def _one_by_one(self, answer: str, truth: str, question: str | None) -> Verdict | None:
        """Several measurements each by itself: those of one name in any order, others by their names if all have one,
        else in the truth's order."""
        given, due = entries(answer), entries(truth)
        if len(due) < 2 or len(given) != len(due) or truth[:1] in tuple("([{\\"):
            return None
        numbers = zip(map(read_number, given), map(read_number, due), strict=True)
        pairs = [(a, b) for a, b in numbers if a is not None and b is not None]
        if {a.name for a, _ in pairs} == {b.name for _, b in pairs} and len({b.name for _, b in pairs}) == len(due):
            by_name = {a.name: a for a, _ in pairs}
            pairs = [(by_name[b.name], b) for _, b in pairs]
        elif len(names := {x.name for pair in pairs for x in pair}) == 1 and "" not in names:
            pairs = list(zip(*(sorted(side, key=lambda x: x.value) for side in zip(*pairs, strict=True)), strict=True))
        verdicts = [self._numbers(a, b, question) for a, b in pairs]
        if len(pairs) < len(due) or None in verdicts:
            return None
        return judged(all(verdict and verdict.score for verdict in verdicts), "one by one")

    def _numbers(self, a: Number, b: Number, question: str | None) -> Verdict | None:
        """None where the texts behind the numbers are no units."""
        if other_name(a.name, b.name):
            return wrong(f"{a.name} is not {b.name}")
        a, b = (replace(x, value=value, unit=unit) for x in (a, b) for value, unit in [scaled(x, _SCALES)])
        mine, theirs = (unit_name(_DIRECTED.sub(" ", x.unit)) for x in (a, b))
        asked, plainly = asked_unit(question, mine) if mine and not theirs else ("", False)
        if asked and (mine == asked or self._ratio(mine, asked)):
            theirs = asked
        if len(a.name) == len(b.name) == 1 and a.name != b.name and not (mine or theirs):
            return None  # x = 5 and y = 5: two lines
        if not b.value and len(b.name) == 1 and 1 < len(a.name) < 4 and b.name in a.name:
            return None  # xy = 0
        if a.plain_integer and b.plain_integer and 1000 <= b.value < 2200 and _YEAR.search(question or ""):
            return judged(a.value == b.value, "as years")
        if percent_left_out(a, b, question):
            return right("as per cent")
        if {mine, theirs} == {"", "degree"}:  # the sign left out, or the other in radians
            return right("as degrees") if close(a.value, b.value, self.tolerance) else None
        if mine == theirs:
            return judged(close(a.value, b.value, self.tolerance), "as numbers")
        if not mine and asked_unit(question, theirs) == (theirs, True):
            return judged(close(a.value, b.value, self.tolerance), "as numbers, in the unit asked for")
        if not mine and self.bare_numbers:
            if not self._may_be_left_out(b.unit, theirs, question):
                return None
            return judged(close(a.value, b.value, self.tolerance), "as numbers, the unit left out")
        if not mine and not a.value:
            return judged(not b.value, "zero of whatever")
        if not mine:
            return wrong(f"the unit is missing, expected {b.unit}")
        if not theirs:
            if not close(a.value, b.value, self.tolerance):
                return wrong("as numbers")
            if plainly and is_measure(mine):
                return wrong(f"{a.unit} is not {asked}")
            if a.unit in _CLASSIFIERS or (
                question and _WORD.fullmatch(a.unit) and a.unit.casefold() in question.casefold()
            ):
                return right("as numbers, with what the question counts")
            return self._known_unit(mine)
        factor = coins(mine, theirs) or self._ratio(mine, theirs)
        if factor is None and (names := [divided_by_all(name) for name in (mine, theirs)]) != [mine, theirs]:
            factor = self._ratio(*names)
        if factor is None:
            worded = _NAME.search(f"{a.unit} {b.unit}") and _letters(a.unit) != _letters(b.unit)
            return wrong(f"{a.unit} is not {b.unit}") if worded else None
        turned = a.value * Fraction(factor[0]) + Fraction(factor[1])
        # 32 °F are 0 °C; where it is measured, and in books, so are 273 K.
        least = Fraction(6, 10**4) if self.tolerance > CUT_OFF else Fraction(1, 10**12)
        rounded = abs(turned - b.value) <= abs(Fraction(factor[1])) * least
        return judged(rounded or close(turned, b.value, max(self.tolerance, 1e-9)), "as quantities")

    def _without_unit(self, answer: str, truth: str, question: str | None) -> tuple[str, str]:
        """Both without the unit behind an expression (``5\\sqrt{2} cm``), where it is one or may be left out."""
        (said, mine), (meant, theirs) = _unit_behind(answer), _unit_behind(truth)
        if mine and not theirs and (asked := asked_unit(question, mine))[1]:
            theirs = asked[0]
        factors = set(_letters(re.sub(r"\\[A-Za-z]+", "", truth)))
        if mine and not theirs and set(_letters(answer[len(said) :])) <= factors:  # the mg of \mu mg
            return answer, truth
        if mine == theirs or not theirs or (not mine and self.bare_numbers):
            return said, meant
        return answer, truth

    def _is_measured(self, unit: str, question: str | None) -> bool:
        """Whether a text behind a number is a unit and no product of what the question names."""
        name = unit_name(unit)
        known = is_measure(name) or (self.tolerance > CUT_OFF and self._ratio(name, name) is not None)
        return bool(name) and known and not (question and _product(unit, question))

    @staticmethod
    def _may_be_left_out(unit: str, name: str, question: str | None) -> bool:
        """Whether the truth names a unit or things that are counted, not a variable or a constant (the x of 5x)."""
        if _NAME.search(unit):
            return not _product(unit, question)
        parts = re.findall(r"[^\W\d_]+", name)
        return bool(parts) and all(is_unit(part) or part in _SHORT_UNITS for part in parts)

    def _known_unit(self, unit: str) -> Verdict | None:
        """Neither truth nor question names a unit: any will do, but not a variable or a word."""
        # Pint knows no yuan, and takes x/x for 1.
        parts = [unit, *re.findall(r"[^\W\d_]+", unit)]
        if unit in _NO_UNITS or not (is_measure(unit) or all(self._ratio(part, part) for part in parts)):
            return None
        return right("as numbers, the unit not asked for")

    def _ratio(self, mine: str, theirs: str) -> list[float] | None:
        target = "rlcs.rewards.conversion:ratio_of_units"
        try:
            return worker.call(target, mine, theirs, deadline_s=self.deadline_s)
        except worker.WorkerFault as fault:
            known = theirs if mine != theirs else "m"
            if str(fault).startswith("ValueError") or self._works(target, known, known):
                return None  # not a unit that pint knows, or one that it cannot compute
            raise

    def _works(self, target: str, *arguments: str) -> bool:
        """Whether a function does its work without the answer. Then what failed is the answer's doing: it is wrong, and
        not an error, which an answer could choose over a zero."""
        try:
            worker.call(target, *arguments, deadline_s=self.deadline_s)
        except worker.WorkerFault:
            return False
        return True


def _same_words(answer: str, truth: str, question: str | None) -> bool:
    """Words alone, to which no sign has come; of one or two letters (CO, Co; M, m), in products (mgR, mgr) and in
    formulas (CoCl2, COCl2) the case counts."""
    answer, truth = (_SIGN.sub(lambda m: _SIGNS[m[1]], unmark(text)).replace("≌", "≅") for text in (answer, truth))
    if bool(_GOES_ON.search(answer)) != bool(_GOES_ON.search(truth)):  # 1, 2, 3, ...
        return False
    if SYMBOLS & set(_HYPHEN.sub("", truth)) or (SYMBOLS - _MARKUP) & set(_HYPHEN.sub("", answer)):
        return False
    short = len(truth) <= 2 and truth.isalpha() and (letters_of(truth) is None or truth > "J")
    cased = (
        short
        or (truth.isalpha() and _product(truth, question))
        or _GENOTYPE.fullmatch(truth)
        or (_CHEMICAL.fullmatch(truth) and re.search(r"\d", truth))
    )
    if cased:
        return re.sub(r"(?<=[A-Z])\.", "", answer) == re.sub(r"(?<=[A-Z])\.", "", truth)  # U.S.
    return same_words(answer, truth)


def _digits(text: str) -> tuple[str, str] | None:
    """Digits and the base below them, 1101_2 or 1101₂; "" if none is given."""
    found = _BASED.fullmatch(re.sub(r"\s", "", unmark(re.sub("([₀-₉]+)", r"_\1", text))))
    return (found[1], found[2] or "") if found else None


def _shares(ratio: str) -> list[str]:
    """The numbers of a ratio without their common factor: 5:3 of 10:6."""
    parts = ratio.split(":")
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        return parts
    factor = math.gcd(*map(int, parts)) or 1
    return [str(int(part) // factor) for part in parts]


def _spelt(text: str) -> bool:
    """Whether letters (and digits) stand in an order that matters: words, ranks (CBA), sequences (AUG), formulas
    (H2O); not so in a product like mgh."""
    quoted = re.fullmatch(r"\s*(['\"“‘])(.*)['\"”’]\s*", text)
    letters = re.sub(r"[\s,]", "", unmark(quoted[2] if quoted else text))
    long = bool(quoted) or len(letters) > 3 or (len(letters) > 1 and letters.isupper())
    return letters.isalnum() and letters[0].isalpha() and long


def _long_words(text: str) -> list[str]:
    """Words that are no names of functions or letters, and no products: the methylpropane of 2-methylpropane."""
    return [word for word in _LONG_WORD.findall(unmark(text).casefold()) if not _FUNCTION.search(word)]


def _unit_behind(text: str) -> tuple[str, str]:
    """An expression and the everyday unit behind it; a bare letter may be a variable and is none."""
    found = _UNIT_BEHIND.fullmatch(text)
    name = unit_name(unmark(f"{found[2] or found[4] or found[5]}{found[3] or ''}")) if found else ""
    return (found[1], name) if found and is_unit(name) else (text, "")


def _of_unit(text: str, unit: str) -> str:
    """The expression in front of a given unit, 5√2 of ``5\\sqrt{2} N``; "" where it is not that unit."""
    for behind in re.finditer(r"(?<=[\d)}πi])[\s~]*(?=[^\W\d_]|[\\°%])", text[:400]):
        if unit_name(unmark(text[behind.end() :])) == unit_name(unit):
            return text[: behind.start()]
    return ""


def _at_once(text: str, other: str) -> str:
    """Inequalities joined by "and" hold at once, but beside a list of them."""
    parts = re.split(r"(?<!\s)\s+and\s+", text)
    if len(parts) < 2 or not all(map(_INEQUALITY.search, parts)):
        return text
    signs = list(_INEQUALITY.finditer(other))
    listed = signs and re.search("[,，;；]", other[signs[0].end() : signs[-1].start()])
    return text if listed else " ∧ ".join(parts)


def _letters(text: str) -> list[str]:
    """Of a product, whose order is no matter."""
    return sorted(re.findall(r"[^\W\d_]", text))


def _product(text: str, question: str | None) -> bool:
    """Whether letters are factors, as IR and mght are: the question names each by itself, they are no labels (A, B, C;
    P, Q, R) or bases, and it asks for no order. Greek among Latin letters is mathematics anyway."""
    letters = set(re.sub(r"[\s,]", "", unmark(text)))
    if letters & _GREEK and not letters <= _GREEK:
        return True
    named = set(_ALONE.findall(question or ""))
    if any(letters <= run for run in _LABELS) or asks_for_order(question) or _STRAND.search(question or ""):
        return False
    return letters <= named


def _mathematical(text: str) -> bool:
    """Whether the text may be mathematics rather than a sentence."""
    return len(text) <= 2000 and (bool(SYMBOLS & set(text)) or len(text.split()) <= 3 or text[:1].isdigit())
