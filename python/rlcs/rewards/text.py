"""Texts compared: normal forms, hedges, edit distance."""

from __future__ import annotations

import re
import unicodedata

_SPACES = re.compile(r"\s+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\s+(?=\w)")
_DASHES = re.compile("[‐-―−]")
# What says nothing in words: all signs but those of mathematics (∥ and ⊥), ~, the @ of addresses, those within
# numbers (2019-2020, 10:30) and in front of them (-3, .5).
_LOOSE = re.compile(r"[^\w\s%+#@~<>\u2190-\u22ff.\-/:]|[.\-/:](?!\d)|(?<!\d)[/:]|(?<=[^\W\d])[.\-]")
_GAPS = re.compile(r"(?<!\d) | (?!\d)")
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
_YES = frozenset(("yes", "y", "true", "t", "correct", "是", "对", "正确"))
_NO = frozenset(("no", "n", "false", "f", "incorrect", "否", "错", "错误"))


def tidy(text: str) -> str:
    """Unicode composed (NFC), runs of white space made one space, ends stripped; nothing else changes."""
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def plain(text: str) -> str:
    """For answers in words: case, articles, punctuation and markup dropped."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?<=\d)\s+-\s+(?=\d)", "-", _DASHES.sub("-", text))  # 18 - 24
    text = _ARTICLES.sub("", re.sub(r"[*_`$]", "", text).casefold())
    return tidy(_LOOSE.sub(" ", text))


def same_words(answer: str, truth: str) -> bool:
    """Equal after :func:`plain`, or with the spaces gone too (``e-mail`` and ``email``, ``U.S.A.`` and ``USA``); those
    between numbers stay: ``1, 2`` is not ``12``. Texts of signs alone are equal as they are."""
    a, b = plain(answer), plain(truth)
    return _GAPS.sub("", a) == _GAPS.sub("", b) if a or b else tidy(answer) == tidy(truth)


def truth_value(text: str) -> bool | None:
    """True or False for a yes or a no in English or Chinese, None for anything else."""
    word = plain(text)
    return True if word in _YES else False if word in _NO else None


def asks_for_order(question: str | None) -> bool:
    """Whether a question says that what it asks for stands in an order."""
    return bool(_ORDER.search(question or ""))


def hedges(text: str) -> bool:
    """Whether an answer leaves room: alternatives, ranges, "about"."""
    return bool(_HEDGES.search(text))


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements that turn ``a`` into ``b``.

    Bit-parallel: a column of the table is one long integer, its bits say where the distance grows or falls by one from
    row to row (Myers 1999, in Hyyrö's form of 2003).
    """
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
