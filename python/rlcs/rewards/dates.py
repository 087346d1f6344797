"""Dates with the month by its name: ``March 3, 2015`` and ``3rd of March 2015`` are one day, ``Jan`` is January."""

from __future__ import annotations

import re

_NAMES = "january february march april may june july august september october november december"
_MONTHS = _NAMES.split()
_DATE = re.compile(
    r"(?:(?P<day>\d{1,2})(?:st|nd|rd|th)?\s+(?:of )?)?(?P<month>[a-z]{3,9})\.?"
    r"(?:\s+(?:the )?(?P<last>\d{1,2})(?:st|nd|rd|th)?)?(?:,?\s+(?P<year>\d{4}))?\.?",
    re.IGNORECASE,
)
_DAYS = "monday tuesday wednesday thursday friday saturday sunday"
_WHOLE = {name[:3]: name for name in (*_MONTHS, *_DAYS.split())} | {"sept": "september", "tues": "tuesday",
          "thur": "thursday", "thurs": "thursday"}  # fmt: skip
_SHORT = re.compile(rf"\b(?:{'|'.join(_WHOLE)})\b")


def whole_names(text: str) -> str:
    """A text in small letters with its months and days of the week written out."""
    return _SHORT.sub(lambda found: _WHOLE[found[0]], text)


def same_day(answer: str, truth: str) -> bool:
    """Whether both are dates with their months' names, and of one day."""
    return (day := read_date(truth)) is not None and read_date(answer) == day


def read_date(text: str) -> tuple[int, int, int] | None:
    """(year, month, day), the year 0 if none is named; None if the text is anything else, a date in numbers alone too:
    1/2 may be in February."""
    found = _DATE.fullmatch(text.strip())
    if found is None or (found["day"] is None) == (found["last"] is None):
        return None
    name = found["month"].casefold()
    months = [i for i, month in enumerate(_MONTHS, 1) if name in (month, month[:3]) or (name == "sept" and i == 9)]
    return (int(found["year"] or 0), months[0], int(found["day"] or found["last"])) if months else None
