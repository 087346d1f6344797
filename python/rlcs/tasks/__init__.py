"""Tasks to see and answer, made from real scans of handwritten digits: what the demo trains on.

Each domain is a maker ``make(canvas, level) -> Made``: pictures, a question, the truth, and the thinking that a cold
start learns from. Levels 1 to 5 grade the difficulty, so that tiers matter. Scans are scikit-learn's bundled set; the
held-out ones never meet training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..curriculum import TIERS
from ..rewards.answer import BOX_BEGIN, BOX_END
from ..types import Task
from . import arithmetic, chart, counting, grounding, gui, images, ocr, video
from .canvas import Canvas, Made, scans

Maker = Callable[[Canvas, int], Made]

MAKERS: dict[str, Maker] = {
    "ocr": ocr.make,
    "counting": counting.make,
    "arithmetic": arithmetic.make,
    "chart": chart.make,
    "grounding": grounding.make,
    "video": video.make,
}
FULL: dict[str, Maker] = {**MAKERS, "gui_android": gui.make, "images": images.make}
VERIFIERS = {"arithmetic": "math", "images": "choice"}  # where the domain of the rewards has another name
LEVELS = range(1, 6)


def verifier_of(domain: str) -> str:
    """The domain of :func:`rlcs.rewards.verify` that judges a domain of tasks."""
    return VERIFIERS.get(domain, domain)


def make_tasks(
    count: int,
    seed: int,
    split: str = "train",
    makers: Mapping[str, Maker] = MAKERS,
    levels: range = LEVELS,
    scan_count: int | None = None,
) -> Iterator[tuple[Task, str]]:
    """``count`` tasks, the domains in turn and levels at random, each with its full response (thinking and answer).

    Args:
        split: ``train`` or ``test``: which scans.
        scan_count: at most so many scans of the split, the first ones (a small cold start).
    """
    if count < 1:
        raise ValueError(f"make_tasks: count must be at least 1, got {count}")
    pictures, labels = scans(split)
    pictures, labels = pictures[:scan_count], labels[:scan_count]
    names = list(makers)
    for i in range(count):
        canvas = Canvas(pictures, labels, np.random.default_rng([seed, i, split == "test"]))
        domain, level = names[i % len(names)], int(canvas.random.choice(levels))
        made = makers[domain](canvas, level)
        task = Task(
            id=f"{split}-{seed}-{i}",
            domain=verifier_of(domain),
            messages=[{"role": "user", "content": [*made.pictures, {"type": "text", "text": made.question}]}],
            truth=made.truth,
            category=f"{domain} {level}",
            tier=TIERS[level - 1],
            question=made.question,
        )
        yield task, response_of(made)


def response_of(made: Made) -> str:
    """What a cold start teaches: the thinking, then the answer in its box."""
    return f"<think>{made.thinking}</think><answer>{BOX_BEGIN}{made.truth}{BOX_END}</answer>"
