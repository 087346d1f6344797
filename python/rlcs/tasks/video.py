"""Digits that appear one after the other: in which order, or at which second? Level: frames and question."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Made

FPS = 2.0  # what the model samples; a shown second is two frames of one digit, one step of the encoder


def make(canvas: Canvas, level: int) -> Made:
    count = 2 + (level + 1) // 2
    digits = canvas.random.permutation(10)[:count].tolist()
    scans = [canvas.row([digit]) for digit in digits]
    frames = np.stack([scan for scan in scans for _ in range(2)])  # [2 count, 28, 28, 3]
    shown = {"type": "video", "video": frames, "fps": FPS}
    seen = "".join(map(str, digits))
    if level % 2:
        return Made([shown], "Digits in order?", ",".join(map(str, digits)), seen)
    at = int(canvas.random.integers(count))
    return Made([shown], f"At which second is {digits[at]}?", str(at), f"{seen}: second {at}")
