"""Samples made ahead in worker processes, in the order in which they are asked for.

The trainer's process reads rows; a worker decodes pictures and cuts them into patches. At most ``ahead`` samples for
each worker are on their way, so memory is bounded, and their order is that of one process.
"""

from __future__ import annotations

import pickle
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from .stream import Position

T = TypeVar("T")
M = TypeVar("M")


class WorkerDied(RuntimeError):
    """A worker ended on its own: killed, mostly for its memory."""


class Feed(Generic[T, M]):
    """Iterates over ``(item, made, position)``: ``made`` is ``make(item)``, or the ValueError that it raised.

    Args:
        items: with the position behind each; a few more than are taken are drawn ahead.
        make: runs in the workers, which get a copy of it by pickle; without workers here.
        workers: processes; 0 makes each sample here when it is asked for.
        ahead: samples that each worker may be ahead.
    """

    def __init__(
        self, items: Iterator[tuple[T, Position]], make: Callable[[T], M], workers: int = 0, ahead: int = 2
    ) -> None:
        self._items, self._drawn = items, deque[tuple[T, Position]]()
        self._made: Iterator[Any]
        if not workers:
            self._made = map(_Made(make), self._draw())
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # how many is the person's to say
            loader = DataLoader(
                _Packed(make),
                batch_size=None,
                sampler=_Once(self._draw()),  # type: ignore[arg-type]
                num_workers=workers,
                prefetch_factor=ahead,
                collate_fn=_as_it_is,
                worker_init_fn=_start,
                multiprocessing_context="spawn",  # a fork would copy locks of threads that run here
            )
            self._made = iter(loader)

    def _draw(self) -> Iterator[T]:
        for item, position in self._items:
            self._drawn.append((item, position))
            yield item

    @property
    def waiting(self) -> int:
        """Items that are drawn and not yet taken."""
        return len(self._drawn)

    def __iter__(self) -> Iterator[tuple[T, M | ValueError, Position]]:
        return self

    def __next__(self) -> tuple[T, M | ValueError, Position]:
        try:
            made = next(self._made)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise WorkerDied(f"data: {str(error).splitlines()[0]}") from None
            raise
        item, position = self._drawn.popleft()
        return item, pickle.loads(made) if isinstance(made, bytes) else made, position

    def close(self) -> None:
        """Ends the workers."""
        self._made = iter(())


class _Made(Generic[T, M]):
    def __init__(self, make: Callable[[T], M]) -> None:
        self.make = make

    def __call__(self, item: T) -> M | ValueError:
        try:
            return self.make(item)
        except ValueError as error:
            return ValueError(str(error))  # a subclass may not survive pickling


class _Packed(Dataset[bytes]):
    """What a worker makes, as bytes: through a pipe, where tensors would take shared memory and file descriptors."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = _Made(make)

    def __getitem__(self, item: Any) -> bytes:
        return pickle.dumps(self.make(item), pickle.HIGHEST_PROTOCOL)


class _Once:
    """A sampler of items in place of indices."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items


def _as_it_is(made: Any) -> Any:
    return made


def _start(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # of the whole group: the trainer obeys, and ends its step first
        signal.signal(number, signal.SIG_IGN)
