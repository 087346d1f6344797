"""Two numbers of scans, to be added or subtracted. Level: digits, and which."""

from __future__ import annotations

from .canvas import Canvas, Made


def make(canvas: Canvas, level: int) -> Made:
    tens = (level - 1) // 2  # of the two numbers, how many have tens: 0, 0, 1, 1, 2
    a = int(canvas.random.integers(10, 100) if tens > 0 else canvas.random.integers(10))
    b = int(canvas.random.integers(10, 100) if tens > 1 else canvas.random.integers(10))
    minus = level % 2 == 0
    value = a - b if minus else a + b
    cells: list[int | None] = [*map(int, str(a)), None, *map(int, str(b))]
    sign = "-" if minus else "+"
    question = "Left minus right?" if minus else "Left plus right?"
    picture = {"type": "image", "image": canvas.row(cells)}
    return Made([picture], question, str(value), f"{a}{sign}{b}={value}")
