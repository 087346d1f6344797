"""Work that goes on beside the trainer, in a thread: the next wave's answers while this wave is learned from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from .evaluate import Progress

T = TypeVar("T")


class Dropped(Exception):
    """Nobody waits for it any more."""


class Ahead(Generic[T]):
    """``work(progress)`` in a thread of its own. What it raises, `result` raises.

    Args:
        work: reports its progress, and ends there when it is dropped.
        progress: what is told of it.
    """

    def __init__(self, work: Callable[[Progress], T], progress: Progress) -> None:
        self._work, self._progress = work, progress
        self._dropped = threading.Event()
        self._found: T | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0
        # A daemon: a process that is told to end doesn't wait for it.
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            self._found = self._work(self._report)
        except BaseException as error:
            self._error = error
        self._seconds = time.perf_counter() - start

    def _report(self, done: int, total: int) -> None:
        if self._dropped.is_set():
            raise Dropped
        self._progress(done, total)

    def result(self) -> tuple[T, float]:
        """What came of it, and the seconds that it took."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found, self._seconds  # type: ignore[return-value]

    def drop(self, wait_s: float = 10.0) -> None:
        """Its result is not wanted. It ends when it next reports, which is waited for so long at most."""
        self._dropped.set()
        self._thread.join(wait_s)
