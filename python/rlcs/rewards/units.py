"""Units by their names: the everyday ones in English and Chinese as pint spells them.

Two texts that name one unit need no conversion; the others go to pint (see conversion.py).
"""

from __future__ import annotations

import re

from .text import same_words

_NAMES = {
    "米": "m", "厘米": "cm", "毫米": "mm", "千米": "km", "公里": "km", "分米": "dm", "微米": "um", "纳米": "nm",
    "千克": "kg", "公斤": "kg", "克": "g", "毫克": "mg", "吨": "tonne", "秒": "s", "分钟": "min", "分": "min",
    "小时": "hour", "时": "hour", "天": "day", "年": "year", "升": "L", "毫升": "mL", "牛": "N", "牛顿": "N", "焦": "J",
    "焦耳": "J", "瓦": "W", "瓦特": "W", "伏": "V", "伏特": "V", "安": "A", "安培": "A",
    "欧": "ohm", "欧姆": "ohm", "帕": "Pa", "帕斯卡": "Pa", "赫兹": "Hz", "摩尔": "mol", "度": "degree",
    "摄氏度": "degC", "公顷": "hectare", "千瓦时": "kWh", "角": "jiao",
    "米/秒": "m/s", "千米/小时": "km/hour", "千米/时": "km/hour", "元": "yuan", "美元": "dollar",
    "欧元": "euro", "英镑": "sterling", "弧度": "rad", "rad": "rad", "radians": "rad", "radian": "rad",
    "dollars": "dollar", "usd": "dollar", "us dollars": "dollar", "cents": "cent", "euros": "euro", "eur": "euro",
    "rmb": "yuan", "cny": "yuan", "gbp": "sterling", "rupees": "rupee", "inr": "rupee",
    "rubles": "ruble", "roubles": "ruble", "krw": "won", "¢": "cent",
    "°": "degree", "deg": "degree", "degrees": "degree", "°c": "degC", "℃": "degC", "celsius": "degC",
    "degrees celsius": "degC", "degree celsius": "degC", "°f": "degF", "℉": "degF", "degrees fahrenheit": "degF",
    "Ω": "ohm", "kΩ": "kohm", "MΩ": "Mohm", "h": "hour", "hr": "hour", "hrs": "hour", "hours": "hour", "mins": "min",
    "minute": "min", "minutes": "min", "sec": "s", "secs": "s", "second": "s", "seconds": "s", "meters": "m",
    "metres": "m", "meter": "m", "metre": "m", "kilograms": "kg", "kilogram": "kg", "grams": "g", "gram": "g",
    "newtons": "N", "newton": "N", "joules": "J", "joule": "J", "watts": "W", "watt": "W", "volts": "V", "volt": "V",
    "amps": "A", "amperes": "A", "ampere": "A", "ohms": "ohm", "pascals": "Pa", "kilopascals": "kPa", "moles": "mol",
    "liters": "L", "litres": "L", "l": "L", "ml": "mL", "kilometers": "km", "centimeters": "cm", "km/h": "km/hour",
    "kmh": "km/hour", "kph": "km/hour", "mph": "mile/hour", "days": "day", "years": "year", "microfarads": "uF",
    "rev": "turn", "r/min": "rpm", "weeks": "week", "months": "month", "ounces": "oz", "ounce": "oz",
    "feet": "ft", "foot": "ft", "inches": "inch", "in": "inch", "miles": "mile", "pounds": "lb", "lbs": "lb",
    "kg": "kg", "km": "km", "kj": "kJ", "kw": "kW", "kwh": "kWh", "hz": "Hz", "khz": "kHz",
    "A°": "angstrom", "Å": "angstrom", "years old": "year", "year old": "year", "岁": "year", "u.s. dollars": "dollar",
    "u.s. dollar": "dollar", "us dollar": "dollar",
    "units": "unit", "square units": "unit^2", "units^2": "unit^2", "cubic units": "unit^3", "units^3": "unit^3",
    "psi": "psi", "pounds per square inch": "psi", "lbf": "lbf",
    "people": "person", "persons": "person", "人": "person",
}  # fmt: skip
_NAMES |= {  # 平方分米, 毫安
    f"{sign}{name}": f"{_NAMES[name]}^{power}"
    for sign, power in (("平方", 2), ("立方", 3))
    for name in ("米", "分米", "厘米", "毫米", "千米", "公里")
} | {
    f"{sign}{name}": f"{prefix}{_NAMES[name]}"
    for sign, prefix in (("千", "k"), ("兆", "M"), ("毫", "m"), ("微", "u"))
    for name in ("伏", "安", "欧", "瓦", "帕", "焦", "牛")
}
# A unit -> the smaller one that people name behind it, and how many of those it has.
PARTS = {"day": ("hour", 24), "hour": ("min", 60), "min": ("s", 60), "ft": ("inch", 12), "lb": ("oz", 16),
         "kg": ("g", 1000), "km": ("m", 1000), "m": ("cm", 100), "year": ("month", 12), "week": ("day", 7),
         "tonne": ("kg", 1000), "yuan": ("jiao", 10)}  # fmt: skip

# A coin -> what it is a part of, and how many make one.
_COINS = {"cent": ("dollar", 100), "jiao": ("yuan", 10)}

_UNITS = frozenset(_NAMES.values())
_ASKED = re.compile(
    r"\b(?:in|how many|convert\b[^.?!;]{0,60}\bto)(?: total| more| units of)?"
    r" (?=([^\W\d_][\w/^]*(?: [^\W\d_]+){0,5}))",
    re.IGNORECASE,
)
# In V, at the end of a clause. In A and in K may be anything else, too.
_LETTER = re.compile(
    r"\b(?:in ([mghsNJWVLΩ])|[Cc]urrent\b[^.?!]* in (A)|[Tt]emperature\b[^.?!]* in (K))(?=\s*(?:[.,;:?!)]|\Z))"
)
_WORDS = frozenset(("in", "won", "unit", "turn", "cent", "hour", "day", "week", "year"))  # short, and no plurals
_COUNTED = frozenset(("unit", "unit^2", "unit^3", "person"))  # beside which a question may ask for a measurement
_ALSO = {"degree": ("degC", "degF"), "lb": ("lbf", "sterling")}  # what the name of a unit means, too
# What the case tells apart: a prefix (mW and MW; no PM, which is no length) and bits from bytes (Mb and MB).
_PREFIX = re.compile(r"(?<![^\W\d_])([mMpP])(?=(?:[mgsAVWJNLFCΩKbB]|Pa|Hz|[eW][Vh]|ol|[bB]ps)(?![^\W\d_]))")
_BITS = re.compile(r"(?<![^\W\d_])[kKmMgGtT]i?([bB])(?=(?:ps|/s)?(?![^\W\d_]))")
_SENTENCE = re.compile(r"(?<=[.?!])\s+|\n")
_CONDITION = re.compile(r"\b(?:if|given|when|where|suppose)\b[^,?]*,", re.IGNORECASE)
_ASKS = re.compile(
    r"\?|^\W*in\b|\b(?:what|which|how|find|give|answer|express|state|determine|calculate|compute|estimate|write|convert)\b",
    re.IGNORECASE,
)


def is_unit(text: str) -> bool:
    """Whether the text is one of the everyday units."""
    return unit_name(text) in _UNITS


def is_measure(text: str) -> bool:
    """Whether the text is an everyday unit, or a quotient or a power of some: ft/s, yuan/kg."""
    parts = [re.sub(r"(?<=\w)\^-?[1-4]$", "", part) for part in unit_name(text).split("/")]
    return all(is_unit(part) or is_unit(f"{part}s") for part in parts)


def coins(mine: str, theirs: str) -> list[float] | None:
    """[factor, offset] from one of a currency's two units to the other, which pint does not know; else None."""
    for coin, (whole, many) in _COINS.items():
        if {mine, theirs} == {coin, whole}:
            return [1 / many if mine == coin else many, 0]
    return None


def divided_by_all(name: str) -> str:
    """J/mol*K read as J/(mol*K), which is what is mostly meant."""
    return re.sub(r"/([^/()]+\*[^/()]+)\Z", r"/(\1)", name)


def same_unit(a: str, b: str) -> bool:
    """Whether two texts name one unit, or the same things, in any case but that which tells units apart."""
    if not (same_words(a, b) or unit_name(a) == unit_name(b)):
        return False
    pairs = ([found[1] for found in (sign.search(a), sign.search(b)) if found] for sign in (_PREFIX, _BITS))
    return all(len(set(letters)) < 2 for letters in pairs)


def asked_unit(question: str | None, mine: str = "") -> tuple[str, bool]:
    """The unit that a question asks for, in meters or how many meters, and whether the sentence that asks names it;
    "" if the question names none or several. Where it may mean ``mine`` it does: degrees those of °C, dollars those of
    each hour. Names in the singular are none: a runner comes in second."""
    sentences = _SENTENCE.split(question or "")
    asking = {name for sentence in sentences if _ASKS.search(sentence) for name in _named(_CONDITION.sub("", sentence))}
    names = asking if len(asking) == 1 else _named(question or "")
    (unit,) = names if len(names) == 1 else ("",)
    meant = unit and (mine in _ALSO.get(unit, ()) or mine.startswith(f"{unit}/"))
    return mine if meant else unit, bool(unit and asking)


def _named(text: str) -> set[str]:
    names = {next(filter(None, found.groups())) for found in _LETTER.finditer(text)}
    for found in _ASKED.finditer(text):
        words = found[1].split()
        ends = (end for end in range(len(words), 0, -1) if "per" not in words[end - 1 : end + 1])  # all of x per y
        phrases = (" ".join(words[:end]) for end in ends)
        names.add(next((phrase for phrase in phrases if _is_name(phrase)), ""))
    return {unit_name(name) for name in names if name} - _COUNTED


def _is_name(text: str) -> bool:
    """Whether it is a unit, and no word that stands there for something else."""
    words = text.casefold().split()
    sure = any(word.endswith(("s", "feet")) for word in words) or len(words) > 1 or "/" in text or "^" in text
    short = 1 < len(text) < 5 and words[0] not in _WORDS
    return (sure or short) and "*" not in unit_name(text) and is_measure(text)


def unit_name(text: str) -> str:
    """The unit as pint spells it, without markup: ``m s^{-2}`` is ``m*s^-2``, ``℃`` is ``degC``."""
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", re.sub(r"\^\s*\{(-?\d)\}", r"^\1", text))
    text = re.sub(r"\\mu(?![A-Za-z])\s*", "u", text).replace("\\Omega", "Ω").replace("\\AA", "Å")
    text = re.sub(r"\s+", " ", text.replace("{", "").replace("}", "").replace("\\", "")).strip(" .。")
    text = text.replace("μ", "u").replace("µ", "u").replace("° ", "°").replace("每", "/")
    text = text.replace("²", "^2").replace("³", "^3")
    text = re.sub(r"(?<=[A-Za-z])([23])(?![\w.])", r"^\1", text)  # m/s2
    text = re.sub(r"((?:[*·]|(?<=[A-Za-z]) |(?<=-[1-4]) )\s*[A-Za-z]{1,3})(-[1-4])(?![\w.])", r"\1^\2", text)  # mol L-1
    for known in (text, text.casefold() if len(text) > 1 else text):  # H is henry
        if known in _NAMES:
            return _NAMES[known]
    text = re.sub(r"\b(?:square|sq\.?) ([A-Za-z]+)|\b([A-Za-z]+) squared\b", lambda m: f"{m[1] or m[2]}^2", text)
    text = re.sub(r"\bcubic ([A-Za-z]+)|\b([A-Za-z]+) cubed\b", lambda m: f"{m[1] or m[2]}^3", text)
    text = re.sub(r" ?\bper\b ?", "/", text)
    text = re.sub(r"(?<=[A-Za-zΩ])\s*[*·]?\s+(?=[A-Za-zΩ])", "*", text)
    return "".join(_NAMES.get(part.strip(), part.strip()) for part in re.split(r"([*/()^])", text))
