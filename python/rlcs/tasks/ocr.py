"""A row of handwritten digits, to be read. Level: how many."""

from __future__ import annotations

from .canvas import Canvas, Made


def make(canvas: Canvas, level: int) -> Made:
    digits = canvas.digits(level)
    text = "".join(map(str, digits))
    picture = {"type": "image", "image": canvas.row([*digits])}
    return Made([picture], "Read the digits.", text, text)
