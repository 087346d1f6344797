"""Dates with the month by its name: ``March 3, 2015`` and ``3rd of March 2015`` are one day, ``Jan`` is January. Times
of the day: ``5:00 p.m.``, ``5 PM``, ``17:00`` and ``下午5:00`` are one."""

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
_NOON, _MIDNIGHT = re.compile(r"(?:12(?::00)? )?noon"), re.compile(r"(?:12(?::00)? )?midnight")
_TIME = re.compile(
    r"(?P<half>上午|早上|下午|晚上)?(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?"
    r"|[点时](?:(?P<past>[0-5]?\d)分)?)?(?: ?(?P<m>[ap])\.? ?m\b\.?)?"
)
_HALF = re.compile(r"[ap]\.? ?m\b|noon|midnight|[上下]午|早上|晚上", re.IGNORECASE)
_HALVES = {"上午": "a", "早上": "a", "下午": "p", "晚上": "p"}
_TO = re.compile(r" ?(?:-|[‐-―~～至到]|\b(?:to|until|till)\b) ?")


def whole_names(text: str) -> str:
    """A text in small letters with its months and days of the week written out."""
    return _SHORT.sub(lambda found: _WHOLE[found[0]], text)


def same_moment(answer: str, truth: str) -> bool:
    """Whether both are dates with their months' names and of one day, or the same times of the day."""
    if (day := read_date(truth)) is not None:
        return read_date(answer) == day
    given, due = read_times(answer), read_times(truth)
    said = any(_HALF.search(text) for text in (answer, truth))  # 17:00 and 17:00:00 may be of a film
    return said and given is not None and given == due


def read_times(text: str) -> list[tuple[int, int, int]] | None:
    """(hour, minute, second) of a time of the day, or of the two from and to which something lasts; None if the text is
    anything else, and of 5:30, which may be in the morning, in the evening or of a film."""
    if len(text) > 80:
        return None
    text = re.sub(r"\\[,;: ]|[${}]|\s+", " ", re.sub(r"\\(?:text|mathrm)\s*\{", " ", text.casefold()))
    parts = _TO.split(re.sub(" +", " ", text).strip(" .。"))
    if len(parts) > 2:
        return None
    found = [_TIME.fullmatch(part) for part in parts]
    # An hour after noon or with a zero in front says that all are of 24 hours.
    halves = any(time and (time["half"] or time["m"]) for time in found)
    whole = not halves and any(time and (time["hour"][0] == "0" or int(time["hour"]) > 12) for time in found)
    times = [_time(part, time, whole) for part, time in zip(parts, found, strict=True)]
    return None if None in times else [time for time in times if time]


def _time(text: str, found: re.Match[str] | None, whole: bool) -> tuple[int, int, int] | None:
    if _NOON.fullmatch(text) or _MIDNIGHT.fullmatch(text):
        return (12, 0, 0) if text.endswith("noon") else (0, 0, 0)
    if found is None or (found["half"] and found["m"]):
        return None
    hour, minute, second = int(found["hour"]), int(found["minute"] or found["past"] or 0), int(found["second"] or 0)
    if half := _HALVES.get(found["half"] or "", found["m"]):
        # 12 at night is another day's 12, to some
        known = 1 <= hour <= 12 and not (found["half"] and hour == 12)
        return (hour % 12 + 12 * (half == "p"), minute, second) if known else None
    said = found["minute"] or re.search("[点时]", text)  # 17 alone is a number
    return (hour, minute, second) if whole and said and hour < 24 else None


def read_date(text: str) -> tuple[int, int, int] | None:
    """(year, month, day), the year 0 if none is named; None if the text is anything else, a date in numbers alone too:
    1/2 may be in February."""
    found = _DATE.fullmatch(text.strip())
    if found is None or (found["day"] is None) == (found["last"] is None):
        return None
    name = found["month"].casefold()
    months = [i for i, month in enumerate(_MONTHS, 1) if name in (month, month[:3]) or (name == "sept" and i == 9)]
    return (int(found["year"] or 0), months[0], int(found["day"] or found["last"])) if months else None
