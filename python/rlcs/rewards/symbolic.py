"""Mathematics compared as mathematics. Runs inside a worker (see worker.py): sympy may take any time and memory.

Texts become trees by the small parser below, never by ``eval`` (which sympy's own ``sympify`` and ``parse_expr`` call);
what it does not know is left to math-verify's LaTeX grammar. Two expressions are equal when they agree, to twenty
digits, at random points of either sign: sympy's ``simplify`` would take seconds to say the same.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import sympy
from sympy import Expr, FiniteSet, Integer, Interval, Rational, S, Symbol, Tuple, Union

from .number import unmark

DIGITS, POINTS, AGREE = 40, 8, Rational(1, 10**20)
LARGEST_POWER = 10_000  # of integers; larger ones are refused before they are computed

_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "asin", "acos", "atan", "exp", "log", "ln",
    "sqrt", "abs", "arcsin", "arccos", "arctan", "lg",
}  # fmt: skip
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "abs": "Abs"}
_CONSTANTS = {"pi": sympy.pi, "π": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": S.Infinity, "infinity": S.Infinity,
              "infty": S.Infinity, "∞": S.Infinity, "oo": S.Infinity}  # fmt: skip
_ALPHABET = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
)
_GREEK = _ALPHABET.split()
_LETTERS = dict(zip("αβγδεζηθικλμνξρστυφχψω", _GREEK, strict=True))
_RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "≤": "<=", "≥": ">=", "\\le": "<=",
              "\\ge": ">=", "\\leq": "<=", "\\geq": ">=", "\\lt": "<", "\\gt": ">", "≠": "!=", "!=": "!=",
              "\\ne": "!=", "\\neq": "!="}  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+(?![\w.]))?|\.\d+)"
    r"|(?P<word>\\[A-Za-z]+|[^\W\d_]+)"
    r"|(?P<sign>\*\*|<=|>=|==|!=|\\[{}|]|[-+*/^!()\[\]{}|,;=<>≤≥≠±∞∪∈√'_]))"
)


class Unreadable(ValueError):
    """Not a text of the small grammar."""


def equal(answer: str, truth: str, tolerance: float) -> bool:
    """Whether both texts say the same: numbers within ``tolerance``, expressions, equations, sets, intervals, tuples.

    Raises:
        ValueError: the truth can't be read. An answer that can't be read is wrong.
    """
    try:
        b = parse(truth)
    except Unreadable:
        return _by_grammar(answer, truth)
    try:
        a = parse(answer)
    except Unreadable:
        return _by_grammar(answer, truth) if "\\" in answer else False
    if isinstance(a, Relation) != isinstance(b, Relation):
        a, b = _without_name(a), _without_name(b)
    return same(a, b, tolerance)


def _by_grammar(answer: str, truth: str) -> bool:
    """math-verify on LaTeX, whose timeouts by signals don't work here; the worker's deadline stands in for them."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

    config = [LatexExtractionConfig()]
    gold = parse(f"${truth.strip('$ ')}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the truth is no mathematics that can be read: {truth[:80]!r}")
    found = parse(f"${answer.strip('$ ')}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return bool(found) and bool(verify(gold, found, timeout_seconds=None))


def _without_name(value: Any) -> Any:
    """The 5 of ``x = 5``."""
    if not isinstance(value, Relation) or value.kind != "=" or not isinstance(value.left, Symbol):
        return value
    return value if isinstance(value.right, Expr) and value.right.has(value.left) else value.right


# --- what the texts mean ----------------------------------------------------------------------------------------------


class Relation:
    def __init__(self, left: Any, kind: str, right: Any) -> None:
        self.left, self.kind, self.right = left, kind, right


class Choices(tuple):
    """Values side by side, in any order: the roots of an equation."""


class Around(tuple):
    """(value, uncertainty)"""


def same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Relation) and isinstance(b, Relation):
        return _same_relation(a, b)
    if isinstance(a, (Around, Tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    kinds = (Choices, FiniteSet)
    if isinstance(a, kinds) and isinstance(b, kinds):
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
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    if not names:
        x, y = a.evalf(DIGITS), b.evalf(DIGITS)
        return bool(y.is_finite and x.is_finite and sympy.Abs(x - y) <= Rational(tolerance) * sympy.Abs(y))
    return _vanishes(a - b, names, sympy.Abs(a) + sympy.Abs(b))


def _points(names: list[Symbol]) -> Any:
    """Random values for the names, signs mixed, the same on every call."""
    chance = random.Random(20250701)
    while True:
        yield {n: Rational(chance.randint(100, 3000), 1009) * chance.choice((1, 1, -1)) for n in names}


def _vanishes(difference: Expr, names: list[Symbol], size: Expr) -> bool:
    """Whether the difference is zero beside ``size`` wherever it is defined."""
    tried = 0
    for point in itertools.islice(_points(names), 4 * POINTS):
        x, scale = difference.subs(point).evalf(DIGITS), size.subs(point).evalf(DIGITS)
        if not (x.is_number and scale.is_number and x.is_finite and scale.is_finite):
            continue
        if sympy.Abs(x) > AGREE * (1 + scale):
            return False
        tried += 1
        if tried == POINTS:
            return True
    return False


def _same_relation(a: Relation, b: Relation) -> bool:
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
        return bool(ratio.is_real and ratio > 0) and _vanishes(f - ratio * g, names, sympy.Abs(f))
    return _implies(f, g, names) and _implies(g, f, names)


def _implies(f: Expr, g: Expr, names: list[Symbol]) -> bool:
    """Whether g is zero wherever f is, for an f that is linear in one of its names."""
    for name in names:
        slope = sympy.diff(f, name)
        if slope != 0 and not slope.has(name):
            root = -f.subs(name, 0) / slope
            others = [n for n in names if n != name]
            at_root = g.subs(name, root)
            size = sum((sympy.Abs(term.subs(name, root)) for term in sympy.Add.make_args(g)), S.Zero)
            return _vanishes(at_root, others, size) if others else bool(sympy.Abs(at_root.evalf(DIGITS)) < AGREE)
    ratio = (f / g).subs(next(_points(names))).evalf(DIGITS)
    return bool(ratio.is_finite and ratio != 0) and _vanishes(f - ratio * g, names, sympy.Abs(f))


# --- the parser -------------------------------------------------------------------------------------------------------


def parse(text: str) -> Any:
    """A text of the small grammar as sympy's objects, :class:`Relation`, :class:`Choices` or :class:`Around`."""
    text = re.sub(r"[\u20d7\u0304]|\\vec(?![A-Za-z])", "", unmark(text)).replace("根号", "√").replace("ℏ", "h_bar")
    text = re.sub(r"\\(?:cup)(?![A-Za-z])", "∪", text)
    text = re.sub(r"\\pm(?![A-Za-z])", "±", text)
    text = re.sub(r"\bU\b(?=\s*[\[(])", "∪", text)
    parser = _Parser(text)
    value = parser.everything()
    if parser.kind:
        raise Unreadable(f"unexpected {parser.token!r}")
    return value


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > 2000:
            raise Unreadable("too long")
        self._text, self._at = text.rstrip(" .。"), 0
        self.advance()

    def advance(self) -> str:
        token = getattr(self, "token", "")
        if self._at >= len(self._text):
            self.kind, self.token = "", ""
            return token
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            if self._text[self._at :].strip():
                raise Unreadable(f"unexpected {self._text[self._at :][:10]!r}")
            self.kind, self.token = "", ""
            return token
        self._at, self.kind = found.end(), str(found.lastgroup)
        self.token = found[self.kind]
        return token

    def take(self, *tokens: str) -> str:
        return self.advance() if self.token in tokens and self.kind else ""

    def need(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(f"{token!r} is missing before {self.token!r}")

    # everything := relation (, relation)*
    def everything(self) -> Any:
        values = [self.relation()]
        while self.take(",", ";"):
            values.append(self.relation())
        if len(values) == 1:
            return values[0]
        return Choices(values)

    def relation(self) -> Any:
        left = self.union()
        if self.kind and self.token in _RELATIONS:
            kind = _RELATIONS[self.advance()]
            relation = Relation(left, kind, self.union())
            if self.kind and self.token in _RELATIONS:
                raise Unreadable("a chain of relations")
            return relation
        return left

    def union(self) -> Any:
        value = self.sum()
        while self.take("∪"):
            value = Union(value, self.sum())
        return value

    def sum(self) -> Any:
        if self.take("±"):
            value = self.product()
            return Choices((value, -value))
        value = self.product()
        while self.kind and self.token in ("+", "-", "±"):
            sign = self.advance()
            right = self.product()
            _expressions(value, right)
            if sign == "±":
                value = Around((value, right))
                break
            value = value + right if sign == "+" else value - right
        return value

    def product(self) -> Any:
        value = self.signed()
        while self.kind:
            if self.take("*"):
                right = self.signed()
                _expressions(value, right)
                value = value * right
            elif self.take("/"):
                right = self.signed()
                _expressions(value, right)
                value = value / right
            elif self.begins_factor():
                right = self.power()
                _expressions(value, right)
                value = value * right
            else:
                break
        return value

    def begins_factor(self) -> bool:
        return (
            self.kind == "number"
            or (self.kind == "word" and self.token not in _RELATIONS)
            or self.token in ("(", "√", "{", "∞")
        )

    def signed(self) -> Any:
        if sign := self.take("-", "+"):
            value = self.signed()
            _expressions(value)
            return -value if sign == "-" else value
        return self.power()

    def power(self) -> Any:
        base = self.factorial()
        if self.take("^", "**"):
            exponent = self.group() if self.token == "{" else self.signed()
            _expressions(base, exponent)
            return _raise(base, exponent)
        return base

    def factorial(self) -> Any:
        value = self.atom()
        while self.take("!"):
            _expressions(value)
            if not (value.is_Integer and 0 <= value <= 1000) and not value.free_symbols:
                raise Unreadable("a factorial of what is no small integer")
            value = sympy.factorial(value)
        return value

    def group(self) -> Any:
        self.need("{")
        value = self.sum()
        self.need("}")
        return value

    def atom(self) -> Any:
        if self.kind == "number":
            digits = self.advance().replace(",", "")
            return Rational(digits)
        if self.token in ("\\frac", "\\dfrac"):
            self.advance()
            top, bottom = self.group(), self.group()
            _expressions(top, bottom)
            return top / bottom
        if self.token in ("\\sqrt", "√", "sqrt"):
            self.advance()
            degree = Integer(2)
            if self.take("["):
                degree = self.sum()
                self.need("]")
            value = self.group() if self.token == "{" else self.atom()
            _expressions(value, degree)
            return value ** (1 / degree)
        if self.token == "|":
            self.advance()
            value = self.sum()
            self.need("|")
            _expressions(value)
            return sympy.Abs(value)
        if self.token in ("(", "["):
            return self.brackets()
        if self.token in ("\\{", "{"):
            return self.braces()
        if self.take("∞"):
            return S.Infinity
        if self.kind == "word":
            return self.word()
        raise Unreadable(f"unexpected {self.token!r}")

    def brackets(self) -> Any:
        opening = self.advance()
        values = [self.sum() if opening == "[" else self.union()]
        while self.take(","):
            values.append(self.sum())
        closing = self.advance()
        if closing not in (")", "]"):
            raise Unreadable(f"a bracket is missing before {closing!r}")
        if len(values) == 1 and opening + closing in ("()", "[]"):
            return values[0] if opening == "(" else Tuple(values[0])
        if len(values) == 2 and (
            opening + closing in ("(]", "[)") or any(v in (S.Infinity, -S.Infinity) for v in values)
        ):
            return Interval(values[0], values[1], opening == "(", closing == ")")
        if opening + closing not in ("()", "[]"):
            raise Unreadable("brackets that don't match")
        _expressions(*values)
        return Tuple(*values)

    def braces(self) -> Any:
        closing = "\\}" if self.advance() == "\\{" else "}"
        if self.take(closing):
            return FiniteSet()
        values = [self.sum()]
        while self.take(","):
            values.append(self.sum())
        self.need(closing)
        return FiniteSet(*values)

    def word(self) -> Any:
        word = self.advance().lstrip("\\")
        lower = _LETTERS.get(word, word)
        if word in _FUNCTIONS:
            return self.function(word)
        if lower in _CONSTANTS and (lower != "e" or word == "e"):
            return _CONSTANTS[lower]
        if lower in _GREEK or len(word) == 1:
            return self.symbol(lower)
        if word.casefold() in _FUNCTIONS:
            return self.function(word.casefold())
        # Letters side by side are a product; a name or function may hide among them ("2sinx", "πr").
        known = next((n for n in sorted(_FUNCTIONS, key=len, reverse=True) if word.startswith(n)), None)
        head = known or word[0]
        self._at -= len(word) - len(head) + (self._at - self._end_of(word))
        self.advance()
        if known:
            return self.function(known)
        head = _LETTERS.get(head, head)
        return _CONSTANTS[head] if head in _CONSTANTS else Symbol(head)

    def _end_of(self, word: str) -> int:
        """Where ``word``, the token before the current one, ends."""
        return self._text.rfind(word, 0, self._at) + len(word)

    def symbol(self, name: str) -> Symbol:
        """A name with its subscript: ``v_0``, ``v_{max}``, ``v0`` (a digit that touches it)."""
        if self.token == "_":
            self.advance()
            if self.take("{"):
                parts = []
                while self.kind and self.token != "}":
                    parts.append(self.advance())
                self.need("}")
                return Symbol(f"{name}_{''.join(parts)}")
            return Symbol(f"{name}_{self.advance()}")
        if self.kind == "number" and self.token.isdigit() and self._text[self._at - len(self.token) - 1] != " ":
            return Symbol(f"{name}_{self.advance()}")
        return Symbol(name)

    def function(self, name: str) -> Any:
        exponent = self.signed_exponent()
        if name == "log" and self.take("_"):
            base = self.group() if self.token == "{" else self.atom()
            value = sympy.log(self.argument(), base)
        elif name == "lg":
            value = sympy.log(self.argument(), 10)
        else:
            value = getattr(sympy, _ALIASES.get(name, name))(self.argument())
        return value if exponent is None else _raise(value, exponent)

    def signed_exponent(self) -> Any:
        """The 2 of ``sin^2 x``."""
        if not self.take("^", "**"):
            return None
        return self.group() if self.token == "{" else self.atom()

    def argument(self) -> Expr:
        value = self.group() if self.token == "{" else self.brackets() if self.token == "(" else self.bare_argument()
        _expressions(value)
        return value

    def bare_argument(self) -> Any:
        """``2x`` of ``sin 2x``: factors, up to the next sign or function."""
        value = self.power()
        while self.begins_factor() and self.token.lstrip("\\") not in _FUNCTIONS and self.token != "(":
            value = value * self.power()
        return value


def _expressions(*values: Any) -> None:
    for value in values:
        if not isinstance(value, Expr):
            raise Unreadable("arithmetic on what is no expression")


def _raise(base: Expr, exponent: Expr) -> Expr:
    if base.is_Rational and exponent.is_Rational and abs(exponent) > LARGEST_POWER:
        raise Unreadable(f"a power beyond {LARGEST_POWER}")
    return base**exponent


# --- units ------------------------------------------------------------------------------------------------------------

_units: Any = None


def ratio_of_units(answer: str, truth: str) -> list[float] | None:
    """[factor, offset] that turn a number of the answer's unit into one of the truth's; None if they don't compare.

    Raises:
        ValueError: the truth's unit is unknown.
    """
    global _units
    if _units is None:
        import pint

        _units = pint.UnitRegistry(autoconvert_offset_to_baseunit=True, cache_folder=None)
    try:
        target = _units.parse_units(truth)
    except Exception as error:  # pint raises many kinds, from its tokenizer on
        raise ValueError(f"the unit {truth!r} of the truth is unknown: {error}") from None
    try:
        source = _units.parse_units(answer)
        at_0, at_1 = (_units.Quantity(x, source).to(target).magnitude for x in (0.0, 1.0))
    except Exception:
        return None
    return [float(at_1 - at_0), float(at_0)]
