"""A bar chart whose bars are named by scans; read a bar, or the year of the highest one. Level: bars and question."""

from __future__ import annotations

import numpy as np

from .canvas import CELL, PAPER, Canvas, Made, colour

TOP = 50  # the value of a bar that fills its two cells; a step of 5 is 5.6 pixels
FIRST_YEAR = 2020


def make(canvas: Canvas, level: int) -> Made:
    count = min(2 + level // 2, 4)
    names = canvas.random.permutation(10)[:count].tolist()
    values = (5 * canvas.random.permutation(np.arange(1, TOP // 5 + 1))[:count]).tolist()
    picture = np.full((3 * CELL, count * CELL), PAPER, dtype=np.uint8)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        picture[2 * CELL :, i * CELL : (i + 1) * CELL] = canvas.scan(name)
        height = round(2 * CELL * value / TOP)
        picture[2 * CELL - height : 2 * CELL, i * CELL + 6 : (i + 1) * CELL - 6] = 60
    shown = {"type": "image", "image": colour(picture)}
    if level % 2:
        at = int(canvas.random.integers(count))
        thinking = f"{''.join(map(str, names))}: bar {at + 1} is {values[at]}"
        return Made([shown], f"Full height is {TOP}. Value of bar {names[at]}?", str(values[at]), thinking)
    at = int(np.argmax(values))
    thinking = f"{' '.join(map(str, values))}: bar {at + 1} is highest"
    question = f"Bars are years from {FIRST_YEAR}. Year of the highest?"
    return Made([shown], question, str(FIRST_YEAR + at), thinking)
