"""Texts compared: normal forms, hedges, edit distance."""

from __future__ import annotations

import re
import unicodedata

from .dates import whole_names

MOST_CHARS = 20_000  # of an answer, beyond twice its truth's
_SPACES = re.compile(r"\s+")
_ARTICLES = re.compile(r"(?:\b(?:a|an|the)\s+|(?<=-)the-)(?=\w)")
_DASHES = re.compile("[‐-―−]")
# The vowel signs of the scripts from Thaana on, India's and Thailand's among them, are letters of theirs: का is not की.
# Points of Hebrew and Arabic, before those, may be left out, and so may accents that combine with Latin letters.
_VOWEL_SIGNS = "".join(
    char
    for first, end in ((0x07A6, 0x1AB0), (0xA800, 0xAC00), (0x11000, 0x12000))
    for char in map(chr, range(first, end))
    if unicodedata.category(char).startswith("M")
)
# What says nothing in words: all signs but those of mathematics (∥ and ⊥), of sexes and cards, ~, the @ of addresses,
# those within numbers (2019-2020, 10:30), in front of them (-3, .5, ±2), and a minus at the end (A-).
_LOOSE = re.compile(
    rf"[^\w\s%+#@~<>±¬×÷\u2190-\u22ff\u2640-\u2642\u2660-\u2667.\-/:{_VOWEL_SIGNS}]"
    r"|[./:](?!\d)|-(?!\d|$)|(?<!\d)[/:]|(?<=[^\W\d])(?:\.|-(?!$))"
)
# Beside other digits these are no part of their number: 5² is not 52, nor log₂8 log 28.
_RAISED, _LOWERED = re.compile(r"(?<=\d)[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+"), re.compile(r"(?<=\d)(?=[₀-₉])|(?<=[₀-₉])(?=\d)")
_SIDE = re.compile(  # to the left, on the left-hand side; 左侧, 向左
    r"(?:(?:in|on|at|to|towards?) )?"
    r"((?:(?:top|bottom|upper|lower|left|right|front|back|north|south|east|west)[ -]?)+?)(?:[ -]hand)?(?: side)?"
    r"|[在向往朝]?([上下左右前后东南西北]+)(?:[边侧面部]|方[向位]?)?"
)
_GAPS = re.compile(r"(?<!\d) | (?!\d)")
_LIST = re.compile(r"\[(.*)\]|\((.*)\)", re.DOTALL)
_SEPARATOR = re.compile(r" ?(?:[;；、，→]|->) ?| ?, (?:(?:and|&) )?| (?:and|&) |,(?!\d{3}(?!\d))")
_BOLD = re.compile(r"(\*\*|\*|`)([^*`]+)\1")
_CALLED = re.compile(
    r"(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:(?:final|correct) )?answer(?: is\b:?|:) ?|答案(?:[是为]|：|:) ?",
    re.IGNORECASE,
)
_IN_YEAR = re.compile(r"\A(?:in )?(?:(?:the )?year |in )(?=[12]\d{3}\W*$)", re.IGNORECASE)
_NUMBERED = re.compile(
    r"\A(?:(?:on|in) )?(?:the )?(page|section|chapter|figure|table|step|slide|number|p\.|no\.|#) ?(?=\d[\w.]*$)",
    re.IGNORECASE,
)
_PART = re.compile(r"(?:\A|(?<=[\s;,；，、。]))[(（]?((?<=[(（])[1-9a-i](?=[)）])|[①-⑨])[)）]?")
_MARKS = ("123456789", "abcdefghi", "①②③④⑤⑥⑦⑧⑨")
_ABOUT_IT = re.compile(r"\s*(?:(?:about|around|approximately|roughly)\s|≈|\\approx(?![A-Za-z])|~|大?约)\s*", re.I)
_ABOUT = re.compile(r"≈|\\approx(?![A-Za-z])")
_EXACT = re.compile(r"\\(?:d?frac|sqrt|pi|log|ln|sin|cos|tan)(?![A-Za-z])|[√π]|\d\s*/\s*\d")
_ADDRESS = re.compile(r"\w@\w|\bwww\.|://")
_SHORT = {"p.": "page", "no.": "number", "#": "number"}
_DECADE = re.compile(r"(?:the )?([12]\d\d0)['’]?s", re.IGNORECASE)
_HEDGES = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|probably|likely|unless|either|between|about|around|roughly|approximately|nearly"
    r"|almost|close to|at least|at most|more than|less than|not sure|unsure|cannot|can't|unknown|any|some)\b"
    r"|或|大约|约|可能|也许|左右|至少|至多|接近|不确定|[~≈∼?？]",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"\b(?:rank|arrang|sort)|(?<!any )\border(?:ing)?\b(?! to\b| of magnitude)|排[序列]|顺序|从[大小高低早多少]到",
    re.IGNORECASE,
)
_YES = frozenset(("yes", "y", "true", "t", "correct", "√", "✓", "✔", "是", "是的", "对", "正确"))
_NO = frozenset(("no", "n", "false", "f", "incorrect", "×", "✗", "✘", "否", "不", "不是", "没有",
                 "不对", "不正确", "错", "错误"))  # fmt: skip
_EXPLAINED = re.compile(r"[,，;；]|\s[-–—]\s|(?:(?<=\byes)|(?<=\bno))[.:](?=\s)", re.IGNORECASE)
_TAKEN_BACK = re.compile(r"\b(?:yes|no|but|however|though|true|false)\b|但|不过|是的", re.IGNORECASE)
_WRONG = re.compile(r"\b(?:is|was|not|never|wrong|incorrect|false)\b|n['’]t\b|不[是对]|错", re.IGNORECASE)
# y' and A'', no quotation mark nor rock n' roll; 6√3 (≈ 10.39) and (approximately 10.39)
_PRIMED = re.compile(r"(?<![\w'’‘])[A-MO-Za-mo-z](['′’]+)(?!\w)")
_OPERATORS = re.compile(r"[!=<>]=|&&|\|\||(?<![\w!])!(?=\w)")
_ABOUT_BEHIND = re.compile(
    r"[(（]\s*(?:\\text\s*\{\s*)?(?:≈|\\approx(?![A-Za-z])|(?:approximately|approx\.?|about|约)(?![a-z]))\s*\}?"
    r"\s*(-?[\d.,]+)\s*[)）]\s*\Z"
)
_CONVERTED = re.compile(r"[\s$]*-?\d[^+=]*=[\s$]*-?\d[^+=]*[^\W\d_][^+=]*")  # 36 km/h = 10 m/s
_ARROW = re.compile(r"->|[→⟶⇌⇄]|\\(?:long|x)?right(?:arrow|left)|\\to(?![A-Za-z])")  # and no reaction
_DENIED = re.compile(r"\b(?:not|none|never|neither)\b|n['’]t\b|[不没无]", re.IGNORECASE)


def overlong(answer: str, truth: str) -> bool:
    """Whether an answer is longer than any that could be right: it costs no time."""
    return len(answer) > MOST_CHARS + 2 * len(truth)


def tidy(text: str) -> str:
    """Unicode composed (NFC), runs of white space made one space, ends stripped; nothing else changes."""
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def plain(text: str) -> str:
    """For answers in words: case, articles, punctuation and markup dropped."""
    text = _LOWERED.sub(" ", _RAISED.sub(r"^\g<0>", text))
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?<=\d)\s*(?:[*x×]|\\times)\s*(?=\d)", "×", re.sub(r"(?<=\d)_\{?(?=\d)", " ", text))
    text = re.sub(r"(?<=\d)\s*\^\s*\{?(?=[-−]?\d)", "↑", text)
    text = re.sub(r"(?<=\d)\s+([-/])\s+(?=\d)", r"\1", _DASHES.sub("-", text))  # 18 - 24
    text = re.sub(r"(?<![\w.:])(?:00?:(?=\d\d?:))?0?(?=\d\d?:\d\d)", "", text)  # 00:01:23
    text = re.sub(r"(?<=\d) (?:to|through) (?=\d)", "-", text)  # 18 to 24
    text = _ARTICLES.sub("", re.sub(r"[*_`$]", "", text).casefold())
    return tidy(_LOOSE.sub(" ", whole_names(text)))


def same_words(answer: str, truth: str) -> bool:
    """Equal after :func:`plain`, or with the spaces gone too (``e-mail`` and ``email``, ``U.S.A.`` and ``USA``); those
    between numbers stay: ``1, 2`` is not ``12``. Texts of signs alone are equal as they are."""
    if _read_as_is(answer) != _read_as_is(truth):
        return False
    if _ADDRESS.search(truth):  # whose dots and strokes say something
        a, b = (re.sub(r"\s|^https?://", "", text).casefold().strip(".<>/") for text in (answer, truth))
        return a == b
    a, b = plain(answer), plain(truth)
    if not (a or b):
        return tidy(answer) == tidy(truth)
    sides = [found[1] or found[2] for found in map(_SIDE.fullmatch, (a, b)) if found]
    if len(sides) == 2 and sides[0] == sides[1]:
        return True
    a, b = _GAPS.sub("", a), _GAPS.sub("", b)
    return a == b or _telephone(answer) == _telephone(truth) != [] or (len(b) > 3 and _unaccented(a) == _unaccented(b))


def _read_as_is(text: str) -> tuple[list[int], list[str]]:
    """The primes and the operators of code, which :func:`plain` would drop."""
    return [len(marks) for marks in _PRIMED.findall(text)], _OPERATORS.findall(text)


def _telephone(text: str) -> list[str]:
    """The groups of digits of a number that is dialled, or of a date; [] of anything else."""
    groups = re.findall(r"\d+", text) if re.fullmatch(r"\+?[\d ()-]{7,30}|[\d.]{7,30}", text.strip()) else []
    return groups if len(groups) > 2 and sum(map(len, groups)) > 6 else []


def _unaccented(text: str) -> str:
    """Latin letters without their accents: Zurich for Zürich."""
    return re.sub("(?<=[a-z])[\u0300-\u036f]+", "", unicodedata.normalize("NFD", text))


def said(text: str) -> str:
    """What an answer says, without the signs that make it bold and without "The answer is" in front."""
    text = text.strip()
    for _ in range(2):  # in either order
        text = text[called.end() :].strip() if (called := _CALLED.match(text)) else text
        text = bold[2] if (bold := _BOLD.fullmatch(text)) else text
    return text


def last_value(answer: str, truth: str) -> str:
    """The 5 of an answer ``AB = AC = 5`` or ``3 + 2 = 5``. Not so 0, which any equation may have on its right."""
    answer = _ABOUT_BEHIND.sub(r" ≈ \1", answer)
    parts = _ABOUT.split(answer)
    if len(parts) == 2 and _EXACT.search(parts[0]) and not _ABOUT.search(truth):  # 6√3 ≈ 10.39: the truth's kind of it
        answer = parts[0 if _EXACT.search(truth) else 1].strip()
    first, *others, last = answer.split("=") if "=" in answer else (answer, answer)
    several = re.search(r"[<>≤≥,;，、；且\n]|[\d)}]\s*[和与]|\\\\|\\[gln]e", answer) or hedges(answer)  # or x=1 y=2
    if "=" in truth or several or any(re.search(r"\S\s+[A-Za-z]\w*$", part.strip()) for part in others):
        return answer
    named = re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", first))
    converted = _CONVERTED.fullmatch(f"{first}={last}") and not _ARROW.search(truth)
    return answer if named and not (others or converted) else last if re.search("[1-9]", last) else answer


def numbered(text: str) -> str:
    """The ``5, 6`` of parts with their numbers, ``(1) 5; (2) 6`` or ``① 5 ② 6``."""
    first, *parts = _PART.split(text)
    marks, values = parts[::2], [value.strip(" ;,；，、。\n") for value in parts[1::2]]
    if first.strip() or len(marks) < 2 or not all(values) or not any(run.startswith("".join(marks)) for run in _MARKS):
        return text
    return ", ".join(values)


def unlabelled(answer: str, truth: str, question: str | None) -> tuple[str, str]:
    """Both without a label in front of a number that only one of them has, where the question names it: page 12 beside
    12. The year may say so without a question. A truth's own "about" is dropped in both."""
    if about := _ABOUT_IT.match(truth):
        answer, truth = _ABOUT_IT.sub("", answer, count=1), truth[about.end() :]
    labels = [_NUMBERED.match(text) for text in (answer, truth)]
    if labels.count(None) == 1:
        (label,) = filter(None, labels)
        if _SHORT.get(label[1].casefold(), label[1].casefold()) in (question or "").casefold():
            answer, truth = (_NUMBERED.sub("", text, count=1) for text in (answer, truth))
    return _IN_YEAR.sub("", answer, count=1), truth


def same_decade(answer: str, truth: str) -> bool | None:
    """Whether a decade is the true one; None if neither is one or the truth is no year. A decade is no year."""
    given, due = _DECADE.fullmatch(answer.strip()), _DECADE.fullmatch(truth.strip())
    if due is None and (given is None or not re.fullmatch(r"[12]\d{3}", truth.strip())):
        return None
    return given is not None and due is not None and given[1] == due[1]


def entries(text: str) -> list[str]:
    """What a list holds, with or without brackets; commas within numbers don't part."""
    text = tidy(text)
    if found := _LIST.fullmatch(text):
        text = found[1] if found[1] is not None else found[2]
    return [part.strip(" '\"") for part in _SEPARATOR.split(text) if part.strip()]


def truth_value(text: str) -> bool | None:
    """True or False for a yes or a no in English or Chinese, None for anything else."""
    if _PRIMED.search(text):  # y' is no y
        return None
    word = plain(text) or text.strip()
    return True if word in _YES else False if word in _NO else None


def explained(text: str) -> bool | None:
    """As :func:`truth_value`, of a yes or a no that goes on behind a comma, say, and takes nothing back."""
    word, *rest = _EXPLAINED.split(text, maxsplit=1)
    taken_back = any(hedges(part) or _TAKEN_BACK.search(part) for part in rest)
    value = truth_value(word)
    return None if taken_back or (value and any(_DENIED.search(part) for part in rest)) else value


def asks_for_order(question: str | None) -> bool:
    """Whether a question says that what it asks for stands in an order."""
    return bool(_ORDER.search(question or ""))


def hedges(text: str) -> bool:
    """Whether an answer leaves room: alternatives, ranges, "about"."""
    return bool(_HEDGES.search(text))


def denies(text: str) -> bool:
    """Whether what stands behind a number says something of it: 5 is wrong, 5 not 6."""
    return bool(_WRONG.search(text))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements that turn ``a`` into ``b``.

    Bit-parallel: a column of the table is one long integer, its bits say where the distance grows or falls by one from
    row to row (Myers 1999, in Hyyrö's form of 2003).
    """
    if len(a) > len(b):  # the integers' length is the shorter one's
        a, b = b, a
    if not a:
        return len(b)
    ones, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    rows: dict[str, int] = {}
    for i, char in enumerate(a):
        rows[char] = rows.get(char, 0) | 1 << i
    grows, falls, distance = ones, 0, len(a)  # down the column
    for char in b:
        match = rows.get(char, 0)
        stays = match | falls
        reached = (((match & grows) + grows) ^ grows) | match
        right_grows = falls | (ones & ~(reached | grows))  # from the column before to this one
        right_falls = grows & reached
        distance += bool(right_grows & last) - bool(right_falls & last)
        right_grows = (right_grows << 1 | 1) & ones
        right_falls = (right_falls << 1) & ones
        grows = right_falls | (ones & ~(stays | right_grows))
        falls = right_grows & stays
    return distance
