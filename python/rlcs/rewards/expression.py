"""Mathematical texts, plain or LaTeX, read into sympy's trees.

A small grammar of our own, never ``eval``, which sympy's ``sympify`` and ``parse_expr`` call. What it does not know is
:class:`Unreadable`. Imports sympy: for workers (see worker.py).
"""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy import Add, Expr, FiniteSet, Integer, Interval, Rational, S, Symbol, Tuple, Union

from .number import unmark
from .values import (
    Around,
    Both,
    Chain,
    Choices,
    Listed,
    Relation,
    Unfinished,
    Unreadable,
    complex_number,
    counts,
    dropped_out,
    expressions,
    has_plain_value,
    interval,
    is_ten,
    multiplies_out,
    raised,
)

_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "asin", "acos", "atan", "exp", "log", "ln",
    "sqrt", "abs", "arcsin", "arccos", "arctan", "lg",
}  # fmt: skip
_FUNCTION_NAMES = tuple(_FUNCTIONS)
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan"}  # written sin^{-1} x
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "abs": "Abs"}
_CONSTANTS = {"pi": sympy.pi, "π": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": S.Infinity, "infinity": S.Infinity,
              "infty": S.Infinity, "∞": S.Infinity, "oo": S.Infinity}  # fmt: skip
_ALPHABET = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
)
_CAPITALS = "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
_GREEK = _ALPHABET.split() + _CAPITALS.split()
_LETTERS = dict(zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ", _GREEK, strict=True))
_RELATIONS = {"=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "≤": "<=", "≥": ">=", "\\le": "<=",
              "\\ge": ">=", "\\leq": "<=", "\\geq": ">=", "\\lt": "<", "\\gt": ">", "≠": "!=", "!=": "!=",
              "\\ne": "!=", "\\neq": "!="}  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][+-]?\d+(?![\w.]))?|\.\d+)"
    r"|(?P<word>\\[A-Za-z]+|[^\W\d_]+)"
    r"|(?P<sign>\*\*|<=|>=|==|!=|\\[{}|]|[-+*/^!()\[\]{}|,;=<>≤≥≠±∞∪∈∧√'_°]))"
)


_WITHIN = re.compile(r"[{(][^{}()]*±")  # the sign of two values within brackets
# An environment of equations one below the other, with its brace.
_CASES = re.compile(
    r"(?:\\left\s*)?(?:\\\{\s*)?\\begin\s*\{(?:cases|array|aligned)\}(?:\s*\{[lcr]+\})?"
    r"|\\end\s*\{(?:cases|array|aligned)\}(?:\s*\\right\s*\.)?"
)
_COLUMN = re.compile(
    r"(?:\\left\s*[\[(]\s*)?\\begin\s*\{(?:([pb]matrix)|(array)\}\s*\{c)\}([^&=]*?\\\\[^&=]*?)\\end\s*\{(?:\1|\2)\}"
    r"(?:\s*\\right\s*[\])])?"
)
# What is one name though it reads as a product: an angle, a derivative.
_ANGLE = re.compile(r"m?(?:∠|\\angle(?![A-Za-z]))\s*(?:([A-Z])\s*([A-Z])\s*([A-Z])|([A-Z1-9]))(?![A-Za-z\d])")
_DERIVATIVE = re.compile(
    r"\\frac\s*\{\s*(d|∂|\\partial)\s*([A-Za-z])\s*\}\s*\{\s*\1\s*([A-Za-z])\s*\}"
    r"|(?<![A-Za-z])(d|∂|\\partial) ?([A-Za-z])\s*/\s*\4 ?([A-Za-z])(?![A-Za-z])"
)


def parse(text: str, finished: bool = False, measured: bool = False) -> Any:
    """A text of the small grammar as sympy's objects, :class:`Relation`, :class:`Chain`, :class:`Choices` or
    :class:`Around`. If it must be ``finished``, numbers that could be put together are :class:`Unfinished`, and so are
    functions that have a plain value; powers, roots, factorials and fractions of whole numbers may stand. Of what is
    ``measured`` the names are units: 10 N/2 and 2 N + 3 N are unfinished, too."""
    text = _COLUMN.sub(lambda found: "({})".format(found[3].replace("\\\\", ",")), text)  # a vector is a point
    if _CASES.search(text):
        text = re.sub(r",?\s*\\\\", ", ", _CASES.sub("", text))
    text = re.sub(r"\\(?:vec|overrightarrow)\s*\{([A-Z])([A-Z])\}", r" \1_{\1\2}", unmark(text))  # BA is not AB
    text = re.sub(r"\\(?:vec|hat)\s*\{([A-Za-z])\}", r" \1 ", text)
    text = re.sub(r"[\u20d7\u0304]|\\(?:vec|hat)(?![A-Za-z])", "", text).replace("根号", "√")
    text = re.sub(r"\\langle(?![A-Za-z])", "(", re.sub(r"\\rangle(?![A-Za-z])", ")", text))
    text = _ANGLE.sub(lambda m: f" θ_{{{m[4] or m[2] + ''.join(sorted((m[1], m[3])))}}} ", text)
    text = _DERIVATIVE.sub(lambda found: " D_{{{}d{}}} ".format(*filter(None, found.group(2, 3, 5, 6))), text)
    text = re.sub(r"\\hbar(?![A-Za-z])", "ħ", text)
    text = re.sub(r"\\(?:cup)(?![A-Za-z])", "∪", text)
    text = re.sub(r"\\pm(?![A-Za-z])", "±", text)
    text = re.sub(r"\\(?:emptyset|varnothing)(?![A-Za-z])|∅", "{}", text)
    text = re.sub(r"\bU\b(?=\s*[\[(])", "∪", text)
    if _WITHIN.search(text) and text.count("±") == 1:  # two values: (3 ± √5)/2
        return Choices(_parse(text.replace("±", sign), finished, measured) for sign in "+-")
    return _parse(text, finished, measured)


def _parse(text: str, finished: bool, measured: bool) -> Any:
    parser = _Parser(text, finished, measured)
    try:
        value = parser.everything()
    except (TypeError, AttributeError, ArithmeticError, NotImplementedError, RecursionError) as error:
        # Its objects don't go together ([0, 1] ∪ 2, ±(0, 1)): an answer must not choose to be an error.
        raise Unreadable(f"sympy refuses it: {error}") from None
    if parser.kind:
        raise Unreadable(f"unexpected {parser.token!r}")
    return value


class _Parser:
    def __init__(self, text: str, finished: bool, measured: bool) -> None:
        if len(text) > 2000:
            raise Unreadable("too long")
        self._text, self._at = text.rstrip(" .。"), 0
        self._finished, self._measured = finished, measured
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

    # everything := together (, together)*, together := relation (∧ relation)*
    def everything(self) -> Any:
        values = [self.together()]
        while self.take(",", ";"):
            values.append(self.together())
        if len(values) == 1:
            return values[0]
        return Choices(values)

    def together(self) -> Any:
        values = [self.relation()]
        while self.take("∧"):
            values.append(self.relation())
        return Both(values) if len(values) > 1 else values[0]

    def relation(self) -> Any:
        values, kinds = [self.union()], []
        while self.kind and self.token in _RELATIONS:
            kinds.append(_RELATIONS[self.advance()])
            values.append(self.union())
        if not kinds:
            return values[0]
        if len(kinds) == 1:
            return Relation(values[0], kinds[0], values[1])
        if {kind[0] for kind in kinds} not in ({"<"}, {">"}):
            raise Unreadable("a chain of equations")
        return Chain(values, kinds)

    def union(self) -> Any:
        value = self.sum()
        while self.take("∪"):
            value = Union(interval(value), interval(self.sum()))
        return value

    def sum(self) -> Any:
        if self.take("±"):
            value = self.product()
            return Choices((value, -value))
        value = self.product()
        while self.kind and self.token in ("+", "-", "±"):
            sign = self.advance()
            right = self.product()
            expressions(value, right)
            if sign == "±":
                value = Around((value, right))
                break
            total = value + right if sign == "+" else value - right
            if self._finished and self.is_number(value, right):
                a, b, both = (len(Add.make_args(x)) for x in (value, right, total))
                self.finish(both < a + b)
            value = self.joined(total, value, right)
        return value

    def product(self) -> Any:
        value = self.signed()
        while self.kind:
            if self.take("*"):
                right = self.signed()
                expressions(value, right)
                self.finish(multiplies_out(value, right))
                self.finish(self.is_number(value, right) and counts(value) and counts(right))
                value = self.joined(value * right, value, right)
            elif self.take("/"):
                right = self.signed()
                expressions(value, right)
                value = self.quotient(value, right)
            elif self.begins_factor():
                right = self.power()
                expressions(value, right)
                self.finish((value.is_Rational and right.is_Rational) or multiplies_out(value, right))
                value = self.joined(value * right, value, right)
            else:
                break
        return value

    def quotient(self, top: Expr, bottom: Expr) -> Any:
        """Finished are 2/3, 4π/3 and 1.2/10^5; not 48/2, 1.2/5, 5/0.1, nor 5/(1 + 2i)."""
        self.finish(complex_number(bottom))
        below = bottom.as_coeff_Mul()[0] if self._measured else bottom  # 20 m / 4 s
        if below.is_Rational and self.is_number(top) and not (is_ten(below) and below.is_Integer):
            factor = top.as_coeff_Mul()[0]
            whole = factor.is_Integer and below.is_Integer
            self.finish(factor.is_Rational and not (whole and (below in (0, 1) or factor % below)))
        return self.joined(top / bottom, top, bottom)

    def joined(self, value: Expr, *parts: Expr) -> Expr:
        dropped = dropped_out(value, *parts) and S.Zero not in parts  # 0 m is no work
        self.finish(dropped or (value.has(sympy.log) and has_plain_value(value)))
        return value

    def is_number(self, *values: Expr) -> bool:
        return self._measured or not any(value.free_symbols for value in values)

    def finish(self, left: Any) -> None:
        if self._finished and left:
            raise Unfinished("arithmetic that is left to do")

    def begins_factor(self) -> bool:
        return (
            self.kind == "number"
            or (self.kind == "word" and self.token not in _RELATIONS)
            or self.token in ("(", "√", "{", "∞")
        )

    def signed(self) -> Any:
        if sign := self.take("-", "+"):
            value = self.signed()
            expressions(value)
            return -value if sign == "-" else value
        return self.power()

    def power(self) -> Any:
        base = self.factorial()
        if self.take("^", "**"):
            exponent = self.group() if self.token == "{" else self.signed()
            expressions(base, exponent)
            value = self.joined(raised(base, exponent), base)
            self.finish((base == sympy.E or not exponent.is_Rational) and has_plain_value(value))
            self.finish(complex_number(base) and exponent.is_Integer)  # i^4
            return value
        return base

    def factorial(self) -> Any:
        value = self.atom()
        while self.take("!"):
            expressions(value)
            if not (value.is_Integer and 0 <= value <= 1000) and not value.free_symbols:
                raise Unreadable("a factorial of what is no small integer")
            value = sympy.factorial(value)
        return value

    def group(self) -> Any:
        self.need("{")
        value = self.sum()
        self.need("}")
        return value

    def operand(self) -> Any:
        """Of ``\\frac{1}{2}``, ``\\frac\\pi6``, ``\\frac mk``."""
        if self.token == "{":
            return self.group()
        if self.kind == "word" and self.token[0] != "\\":
            self._at, self.token = self._at - len(self.token) + 1, self.token[0]
        if len(self.token) > 1 and not self.token.startswith("\\"):
            raise Unreadable(f"{self.token!r} stands without braces")
        return self.atom()

    def atom(self) -> Any:
        if self.kind == "number":
            return self.number()
        if self.token in ("\\frac", "\\dfrac"):
            self.advance()
            top, bottom = self.operand(), self.operand()
            expressions(top, bottom)
            return self.quotient(top, bottom)
        if self.token in ("\\sqrt", "√", "sqrt"):
            self.advance()
            degree = Integer(2)
            if self.take("["):
                degree = self.sum()
                self.need("]")
            value = self.group() if self.token == "{" else self.atom()
            expressions(value, degree)
            return raised(value, 1 / degree)
        if self.token == "|":
            self.advance()
            value = self.sum()
            self.need("|")
            expressions(value)
            self.finish(has_plain_value(value))
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

    def number(self) -> Any:
        """A number; ``2 1/3`` is a mixed one, and other numbers side by side are nothing."""
        digits, _, power = self.advance().replace(",", "").casefold().partition("e")
        value = Rational(digits) * raised(Integer(10), Integer(power or 0))
        if self.kind != "number":
            return value * sympy.pi / 180 if self.take("°") else value
        top, slash = Rational(self.advance().replace(",", "")), self.take("/")
        if not (value.is_Integer and top.is_Integer and slash and self.token.isdigit() and int(self.token)):
            raise Unreadable("numbers side by side")
        return value + top / Integer(self.advance())

    def brackets(self) -> Any:
        opening = self.advance()
        values = [self.sum() if opening == "[" else self.union()]
        while self.take(",", ";"):
            values.append(self.sum())
        closing = self.advance()
        if closing not in (")", "]"):
            raise Unreadable(f"a bracket is missing before {closing!r}")
        if len(values) == 1 and opening + closing in ("()", "[]"):
            return values[0] if opening == "(" else Listed(values)
        if len(values) == 2 and (
            opening + closing in ("(]", "[)") or any(v in (S.Infinity, -S.Infinity) for v in values)
        ):
            return Interval(values[0], values[1], opening == "(", closing == ")")
        if opening + closing not in ("()", "[]"):
            raise Unreadable("brackets that don't match")
        expressions(*values)
        return Tuple(*values) if opening == "(" else Listed(values)

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
        end = self._at
        command, word = self.token.startswith("\\"), self.advance().lstrip("\\")
        lower = _LETTERS.get(word, word)
        if word in _FUNCTIONS:
            return self.function(word)
        if lower in _CONSTANTS and (lower != "e" or word == "e"):
            return _CONSTANTS[lower]
        if lower in _GREEK or len(word) == 1:
            return self.symbol(lower)
        if word.casefold() in _FUNCTIONS:
            return self.function(word.casefold())
        if command:
            raise Unreadable(f"\\{word} is not known")
        # Letters side by side are a product; a name or function may hide among them ("2sinx", "πr").
        known = next((n for n in sorted(_FUNCTIONS, key=len, reverse=True) if word.startswith(n)), None)
        head = known or word[0]
        self._at = end - (len(word) - len(head))
        self.advance()
        if known:
            return self.function(known)
        head = _LETTERS.get(head, head)
        return _CONSTANTS[head] if head in _CONSTANTS else Symbol(head)

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
        if exponent == -1 and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        if name == "log" and self.take("_"):
            # Of log_2 3 the digits alone: 2 3 is no number.
            digits = self.token.isdecimal()
            base = self.group() if self.token == "{" else Integer(self.advance()) if digits else self.atom()
            value = sympy.log(self.argument(), base)
        elif name == "lg":
            value = sympy.log(self.argument(), 10)
        else:
            value = getattr(sympy, _ALIASES.get(name, name))(self.argument())
        self.finish(name != "sqrt" and has_plain_value(value))
        return value if exponent is None else raised(value, exponent)

    def signed_exponent(self) -> Any:
        """The 2 of ``sin^2 x``."""
        if not self.take("^", "**"):
            return None
        return self.group() if self.token == "{" else self.atom()

    def argument(self) -> Expr:
        value = self.group() if self.token == "{" else self.brackets() if self.token == "(" else self.bare_argument()
        expressions(value)
        return value

    def bare_argument(self) -> Any:
        """``2x`` of ``sin 2x``: factors, up to the next sign or function."""
        value = self.power()
        while self.begins_factor() and not self.token.lstrip("\\").startswith(_FUNCTION_NAMES) and self.token != "(":
            value = value * self.power()
        return value
