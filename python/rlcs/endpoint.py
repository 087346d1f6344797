"""JSON over HTTP: one request, and requests that are tried again. Standard library alone.

What comes back is JSON or a `Fault`, which says in one line what came instead, and whether it may pass: a server that
is busy, restarts or is cut off in the middle of a reply may answer the next time; one that refuses will refuse again.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
SHOWN = 300  # characters of an error's text
LONGEST_PAUSE_S = 30.0

T = TypeVar("T")


class Fault(Exception):
    """No useful reply. ``passes``: another try may do; ``lost``: nobody was there, or the line was cut."""

    def __init__(self, said: str, passes: bool = False, lost: bool = False) -> None:
        super().__init__(said)
        self.passes, self.lost = passes, lost


def request(url: str, body: Any = None, key: str = "", timeout_s: float = 60.0) -> Any:
    """The JSON that comes back for ``body`` by POST, or by GET without one; text of another kind as ``str``.

    Raises:
        Fault: no reply, not with status 2xx, or cut short.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout_s) as reply:
            text = reply.read().decode("utf-8", "replace")
            kind = reply.headers.get_content_type()
    except urllib.error.HTTPError as error:
        raise Fault(f"HTTP {error.code}{_said(error)}", passes=error.code in RETRIED) from None
    except (ValueError, http.client.InvalidURL) as error:
        raise Fault(f"a request to {url} cannot be made: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, str):  # of an address without a host
            raise Fault(f"a request to {url} cannot be made: {cause}") from None
        late = isinstance(cause, TimeoutError)
        said = f"nothing within {timeout_s:g} s" if late else f"{type(cause).__name__}: {cause}"
        raise Fault(said, passes=True, lost=not late) from None
    try:
        return json.loads(text)
    except ValueError:
        if kind == "application/json":
            raise Fault(f"JSON that is cut short or broken: {shown(text)}", passes=True) from None
        return text


def persist(
    once: Callable[[], T], goes_on: Callable[[int, float], bool], wait: Callable[[float], Any] | None = None
) -> T:
    """``once()``, again and again after growing pauses while its faults may pass and ``goes_on(tries, seconds)``."""
    start, tries = time.monotonic(), 0
    while True:
        try:
            return once()
        except Fault as fault:
            tries += 1
            if not fault.passes or not goes_on(tries, time.monotonic() - start):
                raise
        (wait or time.sleep)(pause(tries))


def pause(tries: int) -> float:
    """Seconds to wait after so many tries: twice as long each time, and not in step with others."""
    return min(LONGEST_PAUSE_S, 0.5 * 2 ** min(tries, 10)) * random.uniform(0.75, 1.25)


def shown(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else line[:SHOWN] + "…")


def _said(error: urllib.error.HTTPError) -> str:
    """What a server tells beside its status."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    return f": {shown(text)}" if text.strip() else ""
