"""Numbers as people write them, with what follows them: ``1,234.5``, ``-3/4``, ``\\frac{1}{2}``, ``1.2 × 10^{-3} m``.

Nothing is evaluated; a text either is one number, perhaps with a unit behind it, or it is not a number.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from .text import denies, hedges
from .units import PARTS, unit_name

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_VULGAR = re.compile("(?<=[0-9])?([¼½¾⅐-⅞])")
_UNCIRCLED = re.compile("[^①-⑳]+")  # those are names of statements, and ①② is no 12
_SIGNS = str.maketrans("−–‐×·⋅∗÷⁄∕∶％\u00a0\u2009", "---****///:%  ")


def _repeating(found: re.Match[str]) -> str:
    """0.1\\overline{6} as (15/90)."""
    whole, fixed, period = (digits.replace("\u0305", "") for digits in found.groups())
    top = int(whole + fixed + period) - int(whole + fixed)
    return f"({top}/{(10 ** len(period) - 1) * 10 ** len(fixed)})"


_MARKUP: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\A\s*\\[(\[]((?:[^\\]|\\[^()\[\]])*)\\[)\]]\s*\Z"), r"\1"),
    (re.compile(r"\A[\s$]*\\boxed\s*\{(.*)\}[\s$]*\Z", re.DOTALL), r"\1"),
    (re.compile(r"(\d{1,40})\.(\d{0,40})\\(?:overline|dot)\s*\{(\d{1,40})\}"), _repeating),
    (re.compile(r"(\d{1,40})\.(\d{0,40}?)((?:\d\u0305){1,40})"), _repeating),
    (re.compile(r",\\!\s*"), ","),  # 32,\! 349
    (re.compile(r"(?<=[A-Za-z}])\\[,;:](?=[A-Za-z])"), " "),  # of units: m\,s
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|,|;|:|!|quad|qquad)(?![A-Za-z])|\$"), ""),
    (re.compile(r"\\[ ~]|(?<=\S)~"), " "),
    (re.compile(r"\{,\}"), ","),
    (
        re.compile(
            r"\\(?:text|mathrm|mathbf|mathit|boldsymbol|bm|textbf|operatorname|rm|boxed|mbox|ce)"
            r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
        ),
        r" \1 ",
    ),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\var(?=epsilon|theta|phi|rho|sigma|kappa|pi)"), r"\\"),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<![\w.^{])(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1 \2/\3"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\degree"), "°"),
)
_SEPARATORS = re.compile("[, ]")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\ \d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""\(?\s*(?P<sign>[+-]?)\s*
    (?:\\frac\{{\s*(?P<top>[+-]?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_DECIMAL})\s*\}}
      |(?P<whole>\d+)\s+(?P<mixed_top>\d+)\s*/\s*(?P<mixed_bottom>\d+)
      |10\s*(?:\^|\*\*)\s*[({{]?\s*(?P<power>[+-]?\d+)\s*[)}}]?
      |(?P<decimal>{_DECIMAL})(?P<on>\.\.\.|…)?
       (?:[eE](?P<e>[+-]?\d+)|\s*[*x]\s*10\s*(?:\^|\*\*)\s*[({{]?\s*(?P<ten>[+-]?\d+)\s*[)}}]?)?
       (?:\s*/\s*(?P<per>{_DECIMAL})(?!\w))?
    )\s*\)?\s*(?P<pi>\*?\s*(?:\\pi(?![A-Za-z])|π|pi\b))?\s*(?P<percent>%|percent\b|per\ cent\b)?\s*(?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_NAMED = re.compile(
    r"(m?(?:∠|\\angle(?![A-Za-z]))\s*\d|(?:m?∠|m?\\angle\s*|\|(?=[A-Z]{2}\|))?"
    r"(?:[A-Za-z]{2,15} ){0,3}(?:\\Delta\s*)?\\?[^\W\d_][\w'△]{0,15}(?:_\s*\{[^{}=]{1,20}\})?"
    r"(?:(?<=[A-Z]{2})\|)?(?:\s*\([^()]{1,12}\))?)"
    r"\s*(?:=|≈|\\approx(?![A-Za-z]))\s*(?=[^=])"
)
_SYMBOL = re.compile(r"([^\W\d_]+)(?:_?(\d+)|_([^\W\d_]+))?")  # v, v_0, v0, v_max
_WHOLE = frozenset(
    ("eq", "equivalent", "total", "tot", "net", "sum", "all", "总", "合")
)  # one name is as good as another
_CURRENCY = re.compile(
    r"^((?:[^=]{1,20}=)?\s*[+-]?)\s*(?:US ?)?\\?([$€£¥￥₹₩₽]|(?:USD|EUR|GBP|RMB|CNY|INR)\b|Rs\.?(?=\s*\d))"
    r"|\\?([$€£¥￥₹₩₽])\s*$"
)
# As units.py names them.
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yuan", "￥": "yuan", "USD": "dollar", "EUR": "euro",
               "GBP": "sterling", "RMB": "yuan", "CNY": "yuan", "₹": "rupee", "INR": "rupee", "Rs": "rupee",
               "Rs.": "rupee", "₩": "won", "₽": "ruble"}  # fmt: skip
_AND = r"[\s,]*(?:and\b\s*)?"
_QUANTITY = r"(\d+(?:\.\d+)?)\s*([^\W\d_]+)\.?"
_IN_PARTS = re.compile(rf"{_QUANTITY}{_AND}{_QUANTITY}(?:{_AND}{_QUANTITY})?")
_BOUND = re.compile(
    r"(?:and|plus|minus|over|under|above|below|up|half|squared|cubed|ish)\b|以[上下内]|[几多余半来些]|个半",
    re.IGNORECASE,
)
_MINUS = re.compile(r"\A(?:minus |negative |负|零下)\s*(?=[\d.])", re.IGNORECASE)
_SEASON = re.compile(r"([12]\d{3})/(\d\d|\d{4})")  # 2015/16
_PERCENT = re.compile("percent|per cent|%|百分", re.IGNORECASE)
_POWERS = re.compile(  # of a unit
    r"\^\s*\{?[+-]?\d+\}?|[A-Za-zµμΩ°]\d|(?:[*]|(?<=[A-Za-z]) |(?<=-[1-4]) )\s*[A-Za-z]{1,3}-[1-4](?![\w.])"
)
_MOST_DIGITS = 400  # longer ones are no answers, and Fraction would take its time
_MOST_CHARS = 2000  # with markup
_MOST_OF_COUNT = 200
CUT_OFF = 1e-6  # the largest tolerance that is for digits cut off
_PI = Fraction("3.14159265358979323846264338327950288419716939937510")

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_TO_TWENTY, _BY_TEN = _ONES.split(), _TENS.split()
WORDS = dict(zip(_TO_TWENTY, range(20), strict=True)) | dict(zip(_BY_TEN, range(20, 100, 10), strict=True))
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
MULTIPLES = {"dozen": 12, "hundred": 100, "k": 10**3, "thousand": 10**3, "thousands": 10**3, "mn": 10**6,
             "million": 10**6, "millions": 10**6, "bn": 10**9, "billion": 10**9, "billions": 10**9,
             "trillion": 10**12, "万": 10**4, "亿": 10**8}  # fmt: skip
LETTERS = {"m": 10**6, "b": 10**9, "t": 10**12}  # of a chart's axis; elsewhere metres, say
_HAN = {char: i for i, char in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_HAN_DIGITS = str.maketrans({char: str(digit) for char, digit in _HAN.items()})
_HAN_SCALES = {"十": 10, "百": 100, "千": 1000}
_HAN_MULTIPLE = re.compile("[十百千]?[万亿]{1,2}")
_THERE_ARE = re.compile(
    r"^\s*(?:(?:there (?:is|are)(?: only| exactly)?|only|just|exactly|an?(?= (?:dozen|hundred|thousand|million)))\b"
    r"|total:|图[中里](?:[总一]?共)?有|[总一]?共有?|有)",
    re.IGNORECASE,
)
_TWICE = re.compile(r"(.*?)\s*\((\w[\w -]*)\)(.*)", re.DOTALL)  # three (3) cats
_NONE = re.compile(
    r"\s*(?:none|没有|无|there (?:is|are) no [a-z-]+(?: [a-z-]+)?(?: in the [a-z]+)?)[.。]?\s*", re.IGNORECASE
)
_PARTS = "third fourth quarter fifth sixth seventh eighth ninth tenth hundredth thousandth"
_NO_THINGS = {*WORDS, *_SCALES, *MULTIPLES, *_PARTS.split(), *(f"{part}s" for part in _PARTS.split()), "half", "halves",
              "percent", "st", "nd", "rd", "th"}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """``value`` with a percent sign and a π behind it already applied; ``unit`` is the text behind it, unread."""

    value: Fraction
    unit: str = ""
    percent: bool = False
    plain_integer: bool = False  # digits alone: no separator, point, exponent, fraction, sign or unit
    name: str = ""  # x of ``x = 5``


def unmark(text: str) -> str:
    """LaTeX's and Unicode's ways to write the same number brought to one; superscripts become ``^``."""
    text = re.sub("log([₀-₉]+)", r"log_{\1}", text)  # log₂3 is no log 23
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^" + run[0].translate(_SUPERSCRIPTS), text)
    text = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m[1]).replace(chr(0x2044), '/')}", text)
    text = _UNCIRCLED.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text).translate(_SIGNS)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_number(text: str) -> Number | None:
    """The number that the whole text is, with its unit; None if it is anything else."""
    if len(text) > _MOST_CHARS:
        return None
    text, currency = _without_currency(text)
    text = unmark(text)
    named = _NAMED.match(text)
    if named and (hedges(named[1]) or denies(named[1])):
        return None
    text = _MINUS.sub("-", text[named.end() :] if named else text)
    if len(text) > _MOST_DIGITS or _is_season(text):
        return None
    if (mixed := _mixed(text)) is not None:
        return mixed
    found = _NUMBER.fullmatch(text)
    if found is None or text.count("(") != text.count(")"):
        return None
    if re.match(r"\.\.|…|\\(?:sqrt|angle)|[√∠]", found["rest"]):
        return None  # 5... may go on to anything, 5√2 N is no 5
    rest = found["rest"].strip().rstrip(".。")
    if currency and re.match(r"/|per\b", rest):  # $15/hour
        rest, currency = f"{currency} {rest}", ""
    if rest[:1] in tuple("^*+-/!(=<>,") or any(char.isdigit() for char in _POWERS.sub("", rest)) or "=" in rest:
        return None  # a second number, or the beginning of an expression
    if hedges(rest) or denies(rest) or _BOUND.match(rest) or not WORDS.keys().isdisjoint(rest.casefold().split()):
        return None  # 5 or more, 5 and a half, 5 six
    value = _value(found)
    if value is None:
        return None
    if found["sign"] == "-":
        value = -value
    if found["pi"]:
        value *= _PI
    if found["percent"]:
        value /= 100
    digits = found["decimal"]
    integer = bool(digits and digits.isdigit() and not (found["sign"] or rest or found["percent"] or found["pi"]))
    integer = integer and not (found["e"] or found["ten"] or found["per"] or found["on"] or currency)
    unit = f"{rest} {currency}".strip()
    return Number(value, unit, bool(found["percent"]), integer, _bare_name(named[1]) if named else "")


def _bare_name(name: str) -> str:
    """A name without markup: ∠ABC of ``m\\angle ABC``, v_max of ``v_{max}``."""
    name = re.sub(r"m?(?:∠|\\angle)\s*", "∠", name)
    return re.sub(r"\s*_\s*", "_", re.sub(r"[\\|]|\s*[{}]\s*", "", name))


def other_name(a: str, b: str) -> bool:
    """Whether two names cannot mean one thing: other corners of an angle, other ends of a segment, other subscripts, pH
    and pOH. Letters and words are free: A = 24 and S = 24, v and speed, v and v_max."""
    if a[:1] == b[:1] == "∠":
        a, b = a[1:], b[1:]
        return a[len(a) // 2] != b[len(b) // 2] if 1 in (len(a), len(b)) else b not in (a, a[::-1])  # ∠B is ∠ABC
    if all(re.fullmatch("[A-Z]{2}", name) for name in (a, b)):
        return sorted(a) != sorted(b)
    if all(re.match("p[A-Z]", name) for name in (a, b)):
        return a.replace("_", "") != b.replace("_", "")
    mine, due = _SYMBOL.fullmatch(a), _SYMBOL.fullmatch(b)
    if not (mine and due) or mine[1] != due[1]:
        return False
    if mine[2] and due[2]:
        return mine[2] != due[2]
    low, high = sorted((found[3] or "").casefold() for found in (mine, due))
    return not (high.startswith(low) or {low, high} <= _WHOLE)  # v_m is v_max, and so is v


def _mixed(text: str) -> Number | None:
    """A quantity in two or three units, each a part of the one before it: 1 hour 15 minutes, 5 ft 3 in."""
    found = _IN_PARTS.fullmatch(text)
    if found is None:
        return None
    values, names = [Fraction(x) for x in found.groups()[::2] if x], [unit_name(x) for x in found.groups()[1::2] if x]
    total, factor = values[0], 1
    for value, whole, name in zip(values[1:], names, names[1:], strict=False):
        part, many = PARTS.get(whole, ("", 0))
        if part != name or value >= many:
            return None
        factor *= many
        total += value / factor
    return Number(total, found[2])


def _without_currency(text: str) -> tuple[str, str]:
    """A text without the sign of a currency before or behind it, and its name; ``$5$`` is mathematics."""
    found = _CURRENCY.search(text)
    if found is None or (text.count("$") - text.count("\\$")) % 2 != ("\\" not in found[0] and "$" in found[0]):
        return text, ""
    return f"{text[: found.start()]}{found[1] or ''} {text[found.end() :]}", _CURRENCIES[found[2] or found[3]]


def _is_season(text: str) -> bool:
    """Whether it is two years, 2015/16 or 2015/2016, and no fraction."""
    found = _SEASON.fullmatch(text)
    return found is not None and (int(found[1]) + 1 - int(found[2])) % 10 ** len(found[2]) == 0


def _value(found: re.Match[str]) -> Fraction | None:
    def read(group: str) -> Fraction:
        return Fraction(_SEPARATORS.sub("", found[group]).rstrip(".") or "0")

    def divided(top: Fraction, bottom: Fraction) -> Fraction | None:
        """None of 48/2 and 1.5/3, too: a division that is left to do is no number."""
        if not bottom or top.denominator * bottom.denominator > 1 or (top / bottom).denominator == 1:
            return None
        return top / bottom

    if found["top"]:
        return divided(read("top"), read("bottom"))
    if found["whole"]:
        return read("whole") + read("mixed_top") / read("mixed_bottom") if read("mixed_bottom") else None
    if found["power"]:
        return Fraction(10) ** int(found["power"]) if abs(int(found["power"])) <= _MOST_DIGITS else None
    value = _go_on(_SEPARATORS.sub("", found["decimal"])) if found["on"] else read("decimal")
    if power := found["e"] or found["ten"]:
        if abs(int(power)) > _MOST_DIGITS:
            return None
        value *= Fraction(10) ** int(power)
    return divided(value, read("per")) if found["per"] else value


def _go_on(digits: str) -> Fraction:
    """0.333... as 1/3: the last digit, or a pair of digits that stands there twice, goes on for ever."""
    whole, _, tail = digits.partition(".")
    if not tail:
        return Fraction(digits)
    period = 2 if len(tail) >= 4 and tail[-2:] == tail[-4:-2] and tail[-1] != tail[-2] else 1
    known = Fraction(f"{whole or '0'}.{tail[:-period]}" if len(tail) > period else f"{whole or '0'}")
    return known + Fraction(int(tail[-period:]), (10**period - 1) * 10 ** (len(tail) - period))


def read_count(text: str, named: bool = True) -> int | None:
    """A number of things: digits or words of English or Chinese, with at most a few words that name the things; with
    none if it must not be ``named``."""
    if len(text) > _MOST_OF_COUNT:
        return None
    if named and _NONE.fullmatch(text):  # of x, none is no 0
        return 0
    text = _THERE_ARE.sub("", text)
    if twice := _TWICE.fullmatch(text):
        once, again = read_count(twice[1] + twice[3], named), read_count(twice[2], named=False)
        if once is not None and once == again:
            return once
    if (number := read_number(text)) is not None:
        count, things = scaled(number)
        plain = not number.percent and count.denominator == 1 and _names_things(things, named)
        return int(count) if plain else None
    tokens = re.findall(r"[a-z]+|[零〇一二两三四五六七八九十百千万]+|\S", unmark(text).casefold().rstrip(".。"))
    for end in range(len(tokens), 0, -1):
        if end > 1 and tokens[end - 1] in ("-", "and"):
            continue  # two and a half
        value = _in_words([t for t in tokens[:end] if t not in ("-", "and")] if end > 1 else tokens[:1])
        if value is not None:
            return value if _names_things(" ".join(tokens[end:]), named) else None
    return None


def _names_things(rest: str, named: bool) -> bool:
    words = rest.casefold().split()
    return (
        len(words) <= (4 if named else 0)
        and len(rest) <= 40
        and not (hedges(rest) or denies(rest) or _BOUND.match(rest))
        and all(re.fullmatch(r"[^\W\d_](?:[^\W\d_]|-)*", word) and word not in _NO_THINGS for word in words)
        and _HAN.keys().isdisjoint(rest)  # 三分之一, 三点五
    )


def _in_words(tokens: list[str]) -> int | None:
    if len(tokens) == 1 and set(tokens[0]) <= set(_HAN) | set(_HAN_SCALES) | {"万"}:
        return _in_han(tokens[0])
    if not tokens or any(t not in WORDS and t not in _SCALES for t in tokens):
        return None
    total, part = 0, 0
    for token in tokens:
        if token == "hundred":
            part = max(part, 1) * 100
        elif token in _SCALES:
            total, part = total + max(part, 1) * _SCALES[token], 0
        elif part % 10 or (part % 100 and WORDS[token] >= 10):
            return None  # "three four" are two numbers
        else:
            part += WORDS[token]
    return total + part


def _in_han(text: str) -> int | None:
    if "万" in text:
        high, _, low = text.partition("万")
        a, b = _in_han(high), _in_han(low) if low else 0
        return None if a is None or b is None else a * 10000 + b
    if not text:
        return None
    if len(text) == 2 and text.translate(_HAN_DIGITS) in "123456789":
        return None  # 五六 are five or six
    if not any(char in _HAN_SCALES for char in text):
        return int("".join(str(_HAN[char]) for char in text))
    total, digit = 0, None
    for char in text:
        if char in _HAN:
            digit = _HAN[char]
        else:
            total, digit = total + (1 if digit is None else digit) * _HAN_SCALES[char], 0
    return total + (digit or 0)


def scaled(number: Number, scales: dict[str, int] = MULTIPLES) -> tuple[Fraction, str]:
    """The value with a word of scale applied (``1.2 million``; ``$1.2M``), and the unit without it."""
    if han := _HAN_MULTIPLE.match(number.unit):  # 960万平方千米
        many = math.prod((_HAN_SCALES | MULTIPLES)[char] for char in han[0])
        return number.value * many, number.unit[han.end() :].strip()
    word, _, rest = number.unit.partition(" ")
    scale = (scales | LETTERS if rest in _CURRENCIES.values() else scales).get(word.casefold())
    return (number.value * scale, rest.strip()) if scale else (number.value, number.unit)


def percent_left_out(a: Number, b: Number, question: str | None) -> bool:
    """Whether they differ in nothing but the percent sign of one, where the question asks for per cent: 60 for 60 %. A
    truth of 1 or less may be a share, so that 0.5 % are not 0.5."""
    if a.percent == b.percent or a.unit or b.unit or not _PERCENT.search(question or ""):
        return False
    return (b.percent or abs(b.value) > 1) and (a.value * 100 if a.percent else a.value) == (
        b.value * 100 if b.percent else b.value
    )


def close(a: Fraction, b: Fraction, tolerance: float) -> bool:
    """Whether ``a`` is within ``tolerance`` of the truth ``b``, relative to it; a truth of 0 admits 0 alone, and where
    the tolerance is for digits cut off, not for measurements, a whole number admits no other whole number."""
    if tolerance <= CUT_OFF and a.denominator == b.denominator == 1:
        return a == b
    return a == b or (b != 0 and math.isfinite(tolerance) and abs(a - b) <= Fraction(repr(tolerance)) * abs(b))
