"""Dates with the month by its name: ``March 3, 2015`` and ``3rd of March 2015`` are one day."""

from __future__ import annotations

import re

_NAMES = "january february march april may june july august september october november december"
_MONTHS = _NAMES.split()
_DATE = re.compile(
    r"(?:(?P<day>\d{1,2})(?:st|nd|rd|th)?\s+(?:of )?)?(?P<month>[a-z]{3,9})\.?"
    r"(?:\s+(?:the )?(?P<last>\d{1,2})(?:st|nd|rd|th)?)?,?\s+(?P<year>\d{4})\.?",
    re.IGNORECASE,
)


def read_date(text: str) -> tuple[int, int, int] | None:
    """(year, month, day); None if the text is anything else, a date in numbers alone too: 1/2 may be in February."""
    found = _DATE.fullmatch(text.strip())
    if found is None or (found["day"] is None) == (found["last"] is None):
        return None
    name = found["month"].casefold()
    months = [i for i, month in enumerate(_MONTHS, 1) if name in (month, month[:3]) or (name == "sept" and i == 9)]
    return (int(found["year"]), months[0], int(found["day"] or found["last"])) if months else None
