"""Samples made ahead in worker processes, in the order in which they are asked for.

The trainer's process reads rows; a worker decodes pictures and cuts them into patches. At most ``ahead`` samples for
each worker are on their way, so memory is bounded, and their order is that of one process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

OBEYED = (signal.SIGINT, signal.SIGTERM)  # by the trainer, which ends its step first; they come to the whole group
T = TypeVar("T")
M = TypeVar("M")
K = TypeVar("K")


class WorkerDied(RuntimeError):
    """A worker ended on its own: killed, mostly for its memory."""


class Feed(Generic[T, M]):
    """``feed(items)`` gives ``(item, made, key)`` for each ``(item, key)``: ``made`` is ``make(item)``, or the
    ValueError that it raised.

    Args:
        make: runs in the workers, which get a copy of it by pickle; without workers here.
        workers: processes; 0 makes each sample here when it is asked for.
        ahead: samples that each worker may be ahead.
    """

    def __init__(self, make: Callable[[T], M], workers: int = 0, ahead: int = 2) -> None:
        self._make, self._most = make, workers * ahead
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads that run here
            self._pool = ProcessPoolExecutor(workers, context, _start, (pickle.dumps(make),))

    def __call__(self, items: Iterable[tuple[T, K]]) -> Iterator[tuple[T, M | ValueError, K]]:
        """In order; a few more items than are taken are drawn ahead.

        Raises:
            WorkerDied: while iterating.
        """
        if self._pool is None:
            for item, key in items:
                yield item, _made(self._make, item), key
            return
        rest, waiting = iter(items), deque[tuple[T, K, Future[bytes]]]()
        try:
            while True:
                for item, key in islice(rest, self._most - len(waiting)):
                    with _unheard():  # this may start a worker
                        waiting.append((item, key, self._pool.submit(_make_here, item)))
                if not waiting:
                    return
                item, key, future = waiting.popleft()
                yield item, pickle.loads(future.result()), key
        except BrokenProcessPool:
            raise WorkerDied("data: a worker must live as long as the run, got one that was killed") from None

    def close(self) -> None:
        """Ends the workers, once they have made what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def _unheard() -> Iterator[None]:
    """A process that is started in here is deaf from its first moment, long before `_start` runs there; what comes
    here meanwhile is heard behind it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OBEYED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _made(make: Callable[[T], M], item: T) -> M | ValueError:
    try:
        return make(item)
    except ValueError as error:
        return ValueError(str(error))  # a subclass may not survive pickling


# --- in a worker ---

_make: Callable[[Any], Any]


def _start(make: bytes) -> None:
    global _make
    for number in OBEYED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()
    torch.set_num_threads(1)
    _make = pickle.loads(make)


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _make_here(item: Any) -> bytes:
    """As bytes: through a pipe, where tensors would take shared memory and file descriptors."""
    return pickle.dumps(_made(_make, item), pickle.HIGHEST_PROTOCOL)
