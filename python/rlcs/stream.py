"""Data in a shuffled order, without end: all of it from memory, or a block of rows at a time. No torch.

The order hangs on the data and the seed alone. What comes with each item is where to go on behind it, so a run resumes
at the very next one however many were made ahead, and R ranks take each R-th: together they see what one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .shards import BadRows, Row, Unreadable, rows_of

SHARDS = 1  # a random stream's last word: the order of files; that of rows has the seed, the pass and the block
Position = Mapping[str, int]
T = TypeVar("T")


def from_memory(items: Sequence[T], seed: int, position: Position) -> Iterator[tuple[T, Position]]:
    """A fresh permutation for every pass, from the position on."""
    done = position.get("position", 0)
    while True:
        epoch, at = divmod(done, len(items))
        for i in np.random.default_rng([seed, epoch]).permutation(len(items))[at:].tolist():
            done += 1
            yield items[i], {"position": done, "epoch": done // len(items)}


class Stream:
    """Items of the rows of ``files``: in every pass the files are shuffled, then each block of ``buffer`` rows.

    Args:
        files: as `files_of` gives them.
        items_of: what a row gives: none, one or several. A ValueError makes it a bad row.
        buffer: rows of a block, which is all that is held.
        seed: of the order.
        bad: what becomes of bad rows.
    """

    def __init__(
        self, files: Sequence[Path], items_of: Callable[[Row], list[T]], buffer: int, seed: int, bad: BadRows
    ) -> None:
        self.files, self.items_of, self.buffer, self.seed, self.bad = files, items_of, buffer, seed, bad

    def behind(self, position: Position) -> Iterator[tuple[Any, Position]]:
        """Items from a position on: ``file`` and ``row`` say where its block begins, ``taken`` how much of it is done.

        Raises:
            ValueError: a whole pass gave nothing.
        """
        epoch, block, file, row, taken, done = (
            position.get(name, 0) for name in ("epoch", "block", "file", "row", "taken", "position")
        )
        empty = block == 0
        while True:
            order = np.random.default_rng([self.seed, epoch, SHARDS]).permutation(len(self.files)).tolist()
            items, behind = self._block(order, file, row)
            mixed = np.random.default_rng([self.seed, epoch, block]).permutation(len(items))
            for i in mixed[taken:].tolist():
                taken, done, empty = taken + 1, done + 1, False
                at = {"epoch": epoch, "block": block, "file": file, "row": row, "taken": taken, "position": done}
                yield items[i], at
            items, taken, block, (file, row) = [], 0, block + 1, behind  # this block goes before the next one comes
            if file == len(order):
                if empty:
                    raise ValueError("data: a pass over the files must hold a good row, got none")
                epoch, block, file, row, empty = epoch + 1, 0, 0, 0, True

    def _block(self, order: Sequence[int], file: int, start: int) -> tuple[list[Any], tuple[int, int]]:
        """The items of the next ``buffer`` rows, and where the block behind them begins."""
        items, rows = list[Any](), 0
        while file < len(order):
            place = self.files[order[file]]
            try:
                for row in rows_of(place, start):
                    try:
                        items += self.items_of(row)
                    except (ValueError, RecursionError) as error:
                        self.bad(row.place, error)
                    rows, start = rows + 1, row.number
                    if rows == self.buffer:
                        return items, (file, start)
            except Unreadable as error:
                self.bad(str(place), error)
            file, start = file + 1, 0
        return items, (file, 0)


def shared(items: Iterator[tuple[T, Position]], rank: int, world: int) -> Iterator[tuple[T, Position]]:
    """What one of ``world`` ranks takes: each ``world``-th item, with the position behind the whole round."""
    while turn := list(islice(items, world)):
        if len(turn) == world:
            yield turn[rank][0], turn[-1][1]
