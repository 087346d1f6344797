"""How often does a digit stand in a row? Level: its length."""

from __future__ import annotations

from .canvas import Canvas, Made


def make(canvas: Canvas, level: int) -> Made:
    length = level + 1
    wanted = int(canvas.random.integers(10))
    digits = [wanted if canvas.random.random() < 0.4 else d for d in canvas.digits(length)]
    count = digits.count(wanted)
    marks = "".join(f"{d}{'*' if d == wanted else ''}" for d in digits)
    picture = {"type": "image", "image": canvas.row([*digits])}
    return Made([picture], f"How many {wanted}?", str(count), f"{marks} so {count}")
