"""Scans and what is drawn with them. A cell of 28 x 28 pixels is one token of the merged image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

CELL, HELD_OUT = 28, 400
PAPER = 255


@dataclass(frozen=True)
class Made:
    """One task before it has a name. ``pictures`` are parts of a message."""

    pictures: list[dict[str, Any]]
    question: str
    truth: str
    thinking: str


@lru_cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """``([N, 28, 28] uint8, [N] labels)`` of handwritten digits: 1397 to train, the last 400 held out."""
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise ValueError(f"scans: split must be train or test, got {split!r}")
    digits = load_digits()
    small = PAPER - (digits.images * (PAPER / 16)).round().astype(np.uint8)  # [N, 8, 8]
    large = np.kron(small, np.ones((3, 3), dtype=np.uint8))  # [N, 24, 24]
    margin = (CELL - large.shape[1]) // 2
    framed = np.pad(large, ((0, 0), (margin, margin), (margin, margin)), constant_values=PAPER)
    part = slice(-HELD_OUT, None) if split == "test" else slice(None, -HELD_OUT)
    return framed[part], digits.target[part]


@dataclass(frozen=True)
class Canvas:
    """Draws from the scans of one split, by one random stream."""

    pictures: np.ndarray
    labels: np.ndarray
    random: np.random.Generator

    def digits(self, count: int) -> list[int]:
        return self.random.integers(10, size=count).tolist()

    def scan(self, digit: int) -> np.ndarray:
        """[28, 28] some scan of the digit."""
        return self.pictures[self.random.choice(np.flatnonzero(self.labels == digit))]

    def row(self, digits: list[int | None]) -> np.ndarray:
        """[28, 28 n, 3] scans side by side; None is a blank cell."""
        return self.grid([digits])

    def grid(self, rows: list[list[int | None]]) -> np.ndarray:
        """[28 m, 28 n, 3]"""
        blank = np.full((CELL, CELL), PAPER, dtype=np.uint8)
        cells = [[blank if digit is None else self.scan(digit) for digit in row] for row in rows]
        return colour(np.block(cells))


def colour(grey: np.ndarray) -> np.ndarray:
    """[H, W] -> [H, W, 3]"""
    return np.repeat(grey[..., None], 3, axis=2)


def per_mille(first: int, last: int, count: int) -> tuple[int, int]:
    """Cells ``first`` to ``last`` of ``count`` as a stretch of 0 to 1000."""
    return round(1000 * first / count), round(1000 * (last + 1) / count)
