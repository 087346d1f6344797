"""A screen with buttons named by scans; press one. Level: buttons."""

from __future__ import annotations

from .canvas import Canvas, Made, per_mille


def make(canvas: Canvas, level: int) -> Made:
    rows, columns = ((1, 2), (2, 2), (2, 3), (3, 3), (3, 4))[level - 1]
    names = canvas.random.permutation(10)[: min(10, rows * columns)].tolist()
    cells: list[int | None] = [*names, *[None] * (rows * columns - len(names))]
    at = int(canvas.random.integers(len(names)))
    (x1, x2), (y1, y2) = per_mille(at % columns, at % columns, columns), per_mille(at // columns, at // columns, rows)
    picture = {"type": "image", "image": canvas.grid([cells[r * columns : (r + 1) * columns] for r in range(rows)])}
    truth = f'{{"action_type": "click", "box_2d": [[{x1},{y1},{x2},{y2}]]}}'
    return Made([picture], f"Press button {names[at]}.", truth, f"{names[at]} is button {at + 1}")
