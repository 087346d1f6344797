"""Grounding: the share of boxes that are found, by IoU; a box too many counts in the total as one too few does."""

from __future__ import annotations

from dataclasses import dataclass

from .boxes import iou, most_pairs, read_boxes
from .text import same_words
from .verdict import Verdict, graded, wrong


@dataclass(frozen=True)
class Grounding:
    """score = pairs with IoU > ``threshold`` / max(boxes asked for, boxes given); labels of the truth must fit."""

    threshold: float = 0.5

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        expected = read_boxes(truth)
        if expected is None:
            raise ValueError(f"grounding: truth must be boxes [x1, y1, x2, y2] in per mille, got {truth[:80]!r}")
        given = read_boxes(answer)
        if given is None:
            return wrong("no boxes [x1, y1, x2, y2]")
        fits = [
            [iou(a, b) > self.threshold and (not name or same_words(label, name)) for b, name in expected]
            for a, label in given
        ]
        total = max(len(expected), len(given))
        pairs = most_pairs(fits)
        return graded(pairs / total, f"{pairs} of {total} boxes")
