"""Mathematics compared as mathematics. Runs inside a worker (see worker.py): sympy may take any time and memory.

What expression.py cannot read is left to math-verify's LaTeX grammar. Two expressions are equal when they agree, to
twenty digits, at random points of either sign: sympy's ``simplify`` would take seconds to say the same.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
from typing import Any

import math_verify
import sympy
from sympy import Expr, FiniteSet, Interval, Mul, Rational, S, Symbol, Tuple, Union

from .expression import parse
from .number import CUT_OFF
from .values import (
    Around,
    Both,
    Chain,
    Choices,
    Listed,
    Relation,
    TooLarge,
    Unfinished,
    Unreadable,
    dropped_out,
    interval,
)

DIGITS, POINTS, AGREE = 40, 8, Rational(1, 10**20)
_OPERATOR = re.compile(
    r"(?<!_)(?<!_\{)\\(?:sum|int|prod|lim|max|min|gcd|lcm|det|lfloor|lceil|[bp]?mod|d?binom)(?![A-Za-z])"
    r"|\\operatorname\s*\{(?:max|min|gcd|lcm|det)\}|\\choose(?![A-Za-z])|\\begin\s*\{[vV]matrix\}"
    r"|\\frac\s*\{\s*(d|\\partial)\s*\}\s*\{\s*\1\s*[a-z]\s*\}"  # d/dx
)
_ARITHMETIC = re.compile(r"\\(?:times|cdot|div)(?![A-Za-z])|(?<=[\w)}])\s*[-+*/]")
# {x | x > 3}
_SET = re.compile(
    r"[\s$]*\\?\{\s*[A-Za-z]\s*(?:(?:∈|\\in)\s*(?:R|ℝ|\\mathbb\s*\{?R\}?)\s*)?"
    r"(?:\||∣|\\mid|:)(.*?(?:[<>=≤≥≠]|\\[gln]e).*?)\\?\}[\s$]*"
)
_PRIME = re.compile(r"['′]")
_EQUALS = re.compile(r"=(?=.*=)")  # but one, which an answer may leave out or add
_APART = re.compile(r"\\q?quad(?=[^=]*=)")  # x = 1 \quad y = 2
# Behind what holds for each: (k ∈ Z)
_EACH = re.compile(
    r"[,，;；(（]\s*\$?[a-z]\s*(?:∈|\\in(?![A-Za-z]))\s*(?:Z|ℤ|\\math(?:bb|bf|rm)\s*\{?\s*Z\s*\}?)[\s)）$.]*\Z"
)
# f(x) = ..., dy/dx = ..., y' = ..., x in ..., P(1, 2), A∩B = {1}
_NAME = re.compile(
    r"\s*\$?(?:\\frac\s*\{d[a-z]\}\s*\{d[a-z]\}|d[a-z]/d[a-z]|[a-z]'+)\s*="
    r"|\s*\$?[A-Z](?:\s*(?:[∩∪]|\\c[au]p(?![A-Za-z]))\s*[A-Z])?\s*=(?=\s*(?:\\left\s*)?\\?[{(\[])"
    r"|\s*\$?[A-Za-z]\s*(?:(?:'|\^\{?-1\}?)?\s*\([A-Za-z]\)\s*=|∈|\\in(?![A-Za-z])|['′]*(?=\([^()]*,[^()]*\)\s*\$?$))"
)


def equal(
    answer: str, truth: str, tolerance: float, ordered: bool = False, form: str = "", measured: bool = False
) -> bool:
    """Whether both texts say the same: numbers within ``tolerance``, expressions, equations, sets, intervals, tuples;
    lists in any order unless ``ordered``. A number must be worked out, unless the truth is not: 17*23 is not 391, nor
    is sin^2 x + 390 + cos^2 x; so must sums, integrals, derivatives, determinants, limits. Where the truth is
    ``measured`` so must 10 N/2: names are units.
    An equation or inequality must be solved, 3x - 5 = 7 is not x = 4, where the truth gives a name's value; a formula
    (a = F/m) where the ``form`` is "solved"; none where it may be "any".

    Raises:
        ValueError: the truth can't be read. An answer that can't be read is wrong.
    """
    if _OPERATOR.search(answer) and not _OPERATOR.search(truth):
        work, equals, answer = answer.rpartition("=")  # what it comes to; the = of a sum's first term is in braces
        several = re.search(r"[,;∧<>]", work) or _OPERATOR.search(answer)
        if not equals or answer.count("{") != answer.count("}") or several:
            return False
    answer, truth = (re.sub(r"\^\s*(?:\{\s*)?\\prime(?:\s*\})?", "'", text) for text in (answer, truth))
    answer, truth = (_EACH.sub("", _APART.sub(", ", text)) for text in (answer, truth))
    answer, truth = (found[1] if (found := _SET.fullmatch(text)) else text for text in (answer, truth))
    names = [_NAME.match(text) for text in (answer, truth)]
    if names.count(None) == 1:
        answer, truth = (text[name.end() if name else 0 :] for text, name in zip((answer, truth), names, strict=True))
    try:
        b, finished = _read(truth, measured)
    except Unreadable:
        return _by_grammar(answer, truth)
    try:
        a = parse(answer, finished, measured)
    except (TooLarge, Unfinished):
        return False
    except Unreadable:
        if "\\" not in answer or (finished and _is_number(_without_name(b))):
            return False
        return _by_grammar(answer, truth, named=isinstance(b, Expr) and not _is_number(b))
    a, b = _without_names(a), _without_names(b)
    if isinstance(a, Relation) != isinstance(b, Relation):
        a, b = _value_said(_without_name(a)), _without_name(b)
    if isinstance(a, Around) != isinstance(b, Around):
        a, b = _both(a), _both(b)
    if form != "any" and _unsolved(a, b, formulas=form == "solved"):
        return False
    a, b = _spread(a), _spread(b)
    a, b = _at_once(a, b), _at_once(b, a)
    a, b = _as_set(a, b), _as_set(b, a)
    a, b = _as_point(a, b), _as_point(b, a)
    a, b = _by_order(a, b)
    if ordered and isinstance(a, Choices) and isinstance(b, Choices):
        a, b = Listed(a), Listed(b)
    try:
        return same(a, b, tolerance)
    except OverflowError:  # e^e^e^9: no number that sympy can hold
        return False


def _read(truth: str, measured: bool) -> tuple[Any, bool]:
    """What a truth is, and whether it is worked out."""
    try:
        return parse(truth, True, measured), True
    except Unfinished:
        return parse(truth), False


def check(truth: str) -> None:
    """Returns if the truth can be compared, with itself and with x + 1, and both grammars are there; else raises."""
    for answer in (truth, "x + 1"):
        equal(answer, truth, 0.0)
    _by_grammar("1", "1")


def _by_grammar(answer: str, truth: str, named: bool = False) -> bool:
    """math-verify on LaTeX, whose timeouts by signals don't work here; the worker's deadline stands in for them. Of a
    truth with names, 5 m, it may not make a number."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

    # It reads f'' as f, and of A = B = C as much as the answer says.
    if any(len(sign.findall(answer)) != len(sign.findall(truth)) for sign in (_PRIME, _EQUALS)):
        return False
    config = [math_verify.LatexExtractionConfig()]
    answer, truth = (text.replace("$", " ") for text in (answer, truth))  # of several formulas it would take the last
    gold = math_verify.parse(f"${truth}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the truth is no mathematics that can be read: {truth[:80]!r}")
    if named and not any(isinstance(x, Expr) and x.free_symbols for x in gold):
        return False
    found = math_verify.parse(f"${answer}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    endless = (S.Infinity, S.NegativeInfinity, S.ComplexInfinity, S.NaN)  # which it takes for any number
    found = [x for x in found if not (isinstance(x, Expr) and x.has(*endless))]
    return bool(found) and bool(math_verify.verify(gold, found, timeout_seconds=None))


def _without_name(value: Any) -> Any:
    """The 5 of ``x = 5``."""
    if not isinstance(value, Relation) or value.kind != "=":
        return value
    if isinstance(value.left, Tuple) and isinstance(value.right, Tuple):  # (x, y) = (1, 2)
        return value.right if all(isinstance(x, Symbol) for x in value.left) else value
    segment = _is_segment(value.left) and _is_number(value.right)
    parts = value.left.args if isinstance(value.left, Mul) else ()
    change = len(parts) == 2 and Symbol("Delta") in parts and all(isinstance(x, Symbol) for x in parts)
    if not (isinstance(value.left, Symbol) or segment or change):  # x, AB, ΔU
        return value
    return value if isinstance(value.right, Expr) and value.right.has(value.left) else value.right


def _unsolved(value: Any, truth: Any, formulas: bool) -> bool:
    """Whether a relation of the truth is solved for a name, x = 4, and none of the answer's for that: 3x - 5 = 7."""
    values, truths = (x if isinstance(x, Choices) else (x,) for x in (value, truth))
    if not all(isinstance(x, Relation) for x in values):
        return False  # 4 beside x = 4
    solved = {name for x in values for name in _solved_for(x, formulas)}
    return any(names and solved.isdisjoint(names) for names in (_solved_for(x, formulas) for x in truths))


def _solved_for(value: Any, formulas: bool) -> set[Any]:
    """The x of x = 4, of 4 = x and of x > 2; with ``formulas`` the a of a = F/m."""
    sides = (value.left, value.right) if isinstance(value, Relation) else ()
    if not all(isinstance(x, Expr) for x in sides):
        return set()
    pairs = zip(sides, reversed(sides), strict=True)
    return {
        name
        for name, other in pairs
        if isinstance(name, Symbol) or _is_segment(name)
        if not (other.has(*name.free_symbols) if formulas else other.free_symbols)
    }


def _is_segment(value: Any) -> bool:
    """Whether it is AB, which reads as a product of two points."""
    names = value.args if isinstance(value, Mul) else ()
    return len(names) == 2 and all(isinstance(x, Symbol) and str(x).isalpha() and str(x).isupper() for x in names)


def _value_said(value: Any) -> Any:
    """The 5 of an answer ``m + n = 5``. Not so 0, which any equation may have on its right."""
    said = isinstance(value, Relation) and value.kind == "=" and _is_number(value.right) and value.right != 0
    return value.right if said and isinstance(value.left, Expr) and value.left.free_symbols else value


def _without_names(value: Any) -> Any:
    """The 1 and 2 of ``x = 1, x = 2`` and of ``x_1 = 1, x_2 = 2``; of several unknowns each keeps its name."""
    if isinstance(value, Choices) and all(isinstance(x, (Expr, Around)) for x in value[1:]):  # x = 1, 2
        return Choices((_without_name(value[0]), *value[1:]))
    if not isinstance(value, Choices) or not all(isinstance(x, Relation) and x.kind == "=" for x in value):
        return value
    if len({str(x.left).partition("_")[0] for x in value}) > 1:
        return value
    return Choices(map(_without_name, value))


def _as_set(value: Any, other: Any) -> Any:
    """The interval that ``x > 2`` and ``1 < x <= 2`` say beside one in brackets, and those brackets beside them."""
    if isinstance(other, Union) and isinstance(value, Choices):  # x < 1 or x > 2
        parts = [_bounds(part) for part in value]
        join = sympy.Intersection if all(map(_leaves_out, value)) else Union  # x != 1, x != 2
        return value if None in parts else join(*parts)
    if isinstance(other, (Interval, Union, Tuple, Listed)) and (said := _bounds(value)) is not None:
        return said
    pair = isinstance(value, (Tuple, Listed)) and len(value) == 2
    return interval(value) if pair and (isinstance(other, Interval) or _bounds(other) is not None) else value


def _at_once(value: Any, other: Any) -> Any:
    """The numbers for which relations hold at once, x >= -2 ∧ x != 1, beside what is written otherwise. Those of
    several names, a = 1 ∧ b < 2, are values side by side."""
    if not isinstance(value, Both) or isinstance(other, Both):
        return value
    parts = [_bounds(part) for part in value]
    sides = (x for part in value if isinstance(part, Relation) for x in (part.left, part.right))
    several = len({x for x in sides if isinstance(x, Symbol)}) > 1
    listed = isinstance(other, Choices) and all(isinstance(x, (Relation, Chain)) for x in other)  # k < 1, k != 0
    return Choices(value) if several or listed or None in parts else sympy.Intersection(*parts)


def _leaves_out(value: Any) -> bool:
    """Whether it is x != 1."""
    unequal = isinstance(value, Relation) and value.kind == "!="
    return unequal and isinstance(value.left, Symbol) and _is_number(value.right)


def _bounds(value: Any) -> Any:
    """The interval of a name between numbers, or all but one; None if the value is none."""
    if _leaves_out(value):
        return Union(Interval.open(S.NegativeInfinity, value.right), Interval.open(value.right, S.Infinity))
    if isinstance(value, Relation) and value.kind in ("<", "<=", ">", ">="):
        value = Chain([value.left, value.right], [value.kind])
        from_name = isinstance(value.values[0], Symbol)
        value.values.insert(0 if from_name else 2, S.NegativeInfinity if from_name else S.Infinity)
        value.kinds.insert(0 if from_name else 1, "<")
    if not isinstance(value, Chain) or len(value.values) != 3:
        return None
    low, name, high = value.values
    real = all(isinstance(x, Expr) and x.is_extended_real and not x.free_symbols for x in (low, high))
    return Interval(low, high, *(kind == "<" for kind in value.kinds)) if real and isinstance(name, Symbol) else None


def _as_point(value: Any, other: Any) -> Any:
    """The (1, 2) of ``x = 1, y = 2`` and of ``{(1, 2)}`` beside a point: names in the order of the alphabet."""
    if isinstance(other, Tuple) and isinstance(value, FiniteSet) and len(value) == 1:
        return value.args[0]
    if not isinstance(other, Tuple) or not isinstance(value, Choices):
        return value
    if not all(isinstance(x, Relation) and x.kind == "=" and isinstance(x.left, Symbol) for x in value):
        return value
    return Tuple(*(x.right for x in sorted(value, key=lambda x: str(x.left))))


def _by_order(a: Any, b: Any) -> tuple[Any, Any]:
    """The values of several names, ``k = 2, b = -1``, beside a list without: they stand in its order."""
    if not all(isinstance(x, Choices) for x in (a, b)) or not all(isinstance(x, Relation) for x in a):
        return a, b
    values = [_without_name(x) for x in a]
    return (Listed(values), Listed(b)) if all(isinstance(x, Expr) for x in (*values, *b)) else (a, b)


def _is_number(value: Any) -> bool:
    return isinstance(value, Expr) and not value.free_symbols


def _both(value: Any) -> Any:
    """The two values of ``1 ± 2``."""
    return Choices((value[0] + value[1], value[0] - value[1])) if isinstance(value, Around) else value


def _spread(value: Any) -> Any:
    """A list with the two values of each ``1 ± 2`` one by one."""
    if not isinstance(value, Choices) or isinstance(value, Both):
        return value
    parts = map(_both, value)
    return Choices(x for part in parts for x in (part if isinstance(part, Choices) else (part,)))


def same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Relation) and isinstance(b, Relation):
        return _same_relation(a, b, tolerance)
    if isinstance(a, Both) != isinstance(b, Both):
        return False
    if isinstance(a, Chain) and isinstance(b, Chain):
        return a.kinds == b.kinds and all(same(x, y, tolerance) for x, y in zip(a.values, b.values, strict=True))
    if isinstance(a, (Around, Listed, Tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if all(isinstance(x, (Choices, FiniteSet)) or x is S.EmptySet for x in (a, b)):
        return _match(list(a), list(b), tolerance)
    if isinstance(a, (Interval, Union)) and isinstance(b, (Interval, Union)):
        return bool(a == b) or _same_intervals(a, b, tolerance)
    if isinstance(a, Expr) and isinstance(b, Expr):
        return _same_expression(a, b, tolerance)
    return False


def _match(a: list[Any], b: list[Any], tolerance: float) -> bool:
    """A pairing of equals; equality within a tolerance is close enough to transitive for the first found to do."""
    rest = list(b)
    for x in a:
        for y in rest:
            if same(x, y, tolerance):
                rest.remove(y)
                break
        else:
            return False
    return not rest


def _same_intervals(a: Any, b: Any, tolerance: float) -> bool:
    parts_a, parts_b = (sorted(x.args, key=lambda i: i.inf) if isinstance(x, Union) else [x] for x in (a, b))
    return len(parts_a) == len(parts_b) and all(
        isinstance(x, Interval)
        and isinstance(y, Interval)
        and (x.left_open, x.right_open) == (y.left_open, y.right_open)
        and _same_expression(x.start, y.start, tolerance)
        and _same_expression(x.end, y.end, tolerance)
        for x, y in zip(parts_a, parts_b, strict=True)
    )


def _same_expression(a: Expr, b: Expr, tolerance: float) -> bool:
    if a == b:
        return True
    if dropped_out(b, a):
        return False
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    if not names:
        if tolerance <= CUT_OFF and a.is_Integer and b.is_Integer:
            return False
        x, y = a.evalf(DIGITS), b.evalf(DIGITS)
        return bool(y.is_finite and x.is_finite and sympy.Abs(x - y) <= Rational(tolerance) * sympy.Abs(y))
    return _vanishes(a - b, names, sympy.Abs(a) + sympy.Abs(b), tolerance)


def _points(names: list[Symbol], signs: tuple[int, ...] = (1, 1, -1)) -> Any:
    """Random values for the names, signs mixed, the same on every call."""
    chance = random.Random(20250701)
    while True:
        yield {n: Rational(chance.randint(100, 3000), 1009) * chance.choice(signs) for n in names}


def _vanishes(difference: Expr, names: list[Symbol], size: Expr, tolerance: float) -> bool:
    """Whether the difference is zero beside ``size`` wherever it is defined. Below roots and in logarithms what is
    measured is positive: √(GM)/√r is √(GM/r), though not for negative G and r."""
    tried, measured = 0, tolerance > CUT_OFF
    signs = (1,) if measured and _has_roots(difference) else (1, 1, -1)
    for point in itertools.islice(_points(names, signs), 4 * POINTS):
        # Not subs: exact powers of fractions may have any number of digits.
        x, scale = difference.evalf(DIGITS, subs=point), size.evalf(DIGITS, subs=point)
        if not (x.is_number and scale.is_number and x.is_finite and scale.is_finite):
            continue
        if sympy.Abs(x) > AGREE * (1 + scale):
            return False
        tried += 1
        if tried == POINTS:
            return True
    return False


def _has_roots(value: Expr) -> bool:
    """Whether names stand below roots or in logarithms."""
    parts = value.atoms(sympy.Pow, sympy.log)
    return any(x.free_symbols and (isinstance(x, sympy.log) or not x.exp.is_Integer) for x in parts)


def _same_relation(a: Relation, b: Relation, tolerance: float) -> bool:
    turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
    if not all(isinstance(x, Expr) for x in (a.left, a.right, b.left, b.right)):
        return a.kind == b.kind and same(a.left, b.left, 0) and same(a.right, b.right, 0)
    f, g = a.left - a.right, b.left - b.right
    kind_a, kind_b = a.kind, b.kind
    if kind_a in ("<", "<="):
        f, kind_a = -f, turned[kind_a]
    if kind_b in ("<", "<="):
        g, kind_b = -g, turned[kind_b]
    if kind_a != kind_b or f.free_symbols != g.free_symbols:
        return False
    names = sorted(f.free_symbols, key=str)
    if not names:
        return False
    if kind_a in (">", ">="):  # the same, but for a positive constant
        ratio = (f / g).subs(next(_points(names))).evalf(DIGITS)
        return bool(ratio.is_real and ratio > 0) and _vanishes(f - ratio * g, names, sympy.Abs(f), tolerance)
    return _implies(f, g, names, tolerance) and _implies(g, f, names, tolerance)


def _have_factor(a: Expr, b: Expr) -> bool:
    """Whether two polynomials have one in common. Of what is measured it would be positive."""
    names = a.free_symbols | b.free_symbols
    return bool(a.is_polynomial(*names) and b.is_polynomial(*names) and sympy.gcd(a, b).free_symbols)


def _implies(f: Expr, g: Expr, names: list[Symbol], tolerance: float) -> bool:
    """Whether g is zero wherever f is, for an f that is linear in one of its names."""
    for name in names:
        slope, rest = sympy.diff(f, name), f.subs(name, 0)
        if slope != 0 and not slope.has(name):
            if tolerance <= CUT_OFF and _have_factor(slope, rest):  # x(x - 2y) is zero where x is, too
                continue
            root = -rest / slope
            others = [n for n in names if n != name]
            at_root = g.subs(name, root)
            size = sum((sympy.Abs(term.subs(name, root)) for term in sympy.Add.make_args(g)), S.Zero)
            return (
                _vanishes(at_root, others, size, tolerance)
                if others
                else bool(sympy.Abs(at_root.evalf(DIGITS)) < AGREE)
            )
    ratio = (f / g).subs(next(_points(names))).evalf(DIGITS)
    return bool(ratio.is_finite and ratio != 0) and _vanishes(f - ratio * g, names, sympy.Abs(f), tolerance)
