"""What a mathematical text may be beside sympy's own objects, and which numbers are worked out. Imports sympy: for
workers (see worker.py).
"""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy import Expr, Interval, Set, Tuple

MOST_BITS = 1 << 20  # of a number; a larger one is refused before it is computed


class Unreadable(ValueError):
    """Not a text of the small grammar."""


class TooLarge(Unreadable):
    """A number that would take too long to compute."""


class Unfinished(Unreadable):
    """Arithmetic that is left to do: 17*23, 1/2 + 1/3."""


class Relation:
    def __init__(self, left: Any, kind: str, right: Any) -> None:
        self.left, self.kind, self.right = left, kind, right


class Chain:
    """``0 < x <= 1``: values in rising order, and < or <= between them."""

    def __init__(self, values: list[Any], kinds: list[str]) -> None:
        falls = kinds[0][0] == ">"
        self.values = values[::-1] if falls else values
        self.kinds = [kind.replace(">", "<") for kind in (kinds[::-1] if falls else kinds)]


class Choices(tuple):
    """Values side by side, in any order: the roots of an equation."""


class Both(Choices):
    """Relations that hold at once: k < 1 ∧ k != 0."""


class Listed(tuple):
    """Values in square brackets: a list, or an interval with its ends."""


class Around(tuple):
    """(value, uncertainty)"""


def interval(value: Any) -> Any:
    """What a union may hold: of two numbers in brackets their kind says whether the ends belong to it."""
    if isinstance(value, (Listed, Tuple)) and len(value) == 2:
        return Interval(value[0], value[1], isinstance(value, Tuple), isinstance(value, Tuple))
    if not isinstance(value, Set):
        raise Unreadable("a union of what is no set")
    return value


def counts(value: Expr) -> bool:
    """Whether a number has a factor that another number's could be multiplied with."""
    factor = value.as_coeff_Mul()[0]
    return bool(factor.is_Rational and abs(factor) != 1 and not is_ten(value))


def complex_number(value: Expr) -> bool:
    return not value.free_symbols and value.is_extended_real is False


def multiplies_out(a: Expr, b: Expr) -> bool:
    """Whether two numbers have a product that is left to be multiplied out: (1 + √2)(3 - √2), (1 + i)i."""
    sums = not (a.free_symbols or b.free_symbols) and a.is_Add and b.is_Add
    return bool(sums or (complex_number(a) and complex_number(b)))


def dropped_out(value: Expr, *parts: Expr) -> bool:
    """Whether names of the parts are in their result no more: x - x, 391x/x."""
    return not value.free_symbols and any(part.free_symbols for part in parts)


def has_plain_value(value: Expr) -> bool:
    """Whether a function of numbers has a value without one: cos 60°, log_4 8, e^(ln 5); not so ln 2, cos 1."""
    exact = sympy.expand_log(value, force=True)
    return bool(exact.is_number and exact.is_algebraic and not exact.has(sympy.Function))


def is_ten(value: Expr) -> bool:
    """Whether it is a power of ten, as in ``1.2 * 10^5``."""
    if not value.is_Rational or 1 not in (value.p, value.q) or max(value.p, value.q).bit_length() > 4000:
        return False
    return re.fullmatch("10*", str(value.p * value.q)) is not None


def expressions(*values: Any) -> None:
    for value in values:
        if not isinstance(value, Expr):
            raise Unreadable("arithmetic on what is no expression")


def raised(base: Expr, exponent: Expr) -> Expr:
    number = base.as_coeff_Mul()[0]  # of 2 x, which powers take out
    bits = max(number.p.bit_length(), number.q.bit_length()) if number.is_Rational else 1
    if exponent.is_Rational and abs(exponent) * bits > MOST_BITS:
        raise TooLarge(f"a power of more than {MOST_BITS} bits")
    return base**exponent
