"""Where in a strip or a small grid does a digit stand? Boxes in per mille. Level: cells, and how often it does."""

from __future__ import annotations

from .canvas import Canvas, Made, per_mille


def make(canvas: Canvas, level: int) -> Made:
    rows, columns, copies = ((1, 2, 1), (1, 3, 1), (1, 4, 1), (2, 2, 1), (1, 4, 2))[level - 1]
    order = canvas.random.permutation(10).tolist()
    wanted, others = order[0], order[1:]
    cells = [wanted] * copies + others[: rows * columns - copies]
    placed = [cells[i] for i in canvas.random.permutation(len(cells))]
    boxes = []
    for i, digit in enumerate(placed):
        if digit == wanted:
            (x1, x2), (y1, y2) = (
                per_mille(i % columns, i % columns, columns),
                per_mille(i // columns, i // columns, rows),
            )
            boxes.append(f"[{x1},{y1},{x2},{y2}]")
    picture = {"type": "image", "image": canvas.grid([[*placed[r * columns : (r + 1) * columns]] for r in range(rows)])}
    seen = "".join(map(str, placed))
    places = " ".join(str(i + 1) for i, digit in enumerate(placed) if digit == wanted)
    return Made([picture], f"Box of every {wanted}?", f"[{','.join(boxes)}]", f"{seen}: place {places}")
