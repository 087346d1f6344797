"""Text read from an image: 1 - edit distance / length of the longer text, after NFC and runs of space made one."""

from __future__ import annotations

from dataclasses import dataclass

from .text import edit_distance, tidy
from .verdict import Verdict, graded


@dataclass(frozen=True)
class Ocr:
    ignore_case: bool = False

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        a, b = tidy(answer), tidy(truth)
        if self.ignore_case:
            a, b = a.casefold(), b.casefold()
        longest = max(len(a), len(b))
        if longest == 0:
            return graded(1.0, "both empty")
        distance = edit_distance(a, b)
        return graded(1 - distance / longest, f"{distance} edits of {longest}")
