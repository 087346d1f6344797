"""Several images: which one shows the largest number? Level: images and digits."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Made

LETTERS = "ABCD"


def make(canvas: Canvas, level: int) -> Made:
    count, length = 2 + level // 2, 1 + level // 3
    values = canvas.random.permutation(np.arange(10 ** (length - 1) if length > 1 else 0, 10**length))[:count].tolist()
    pictures = [{"type": "image", "image": canvas.row([*map(int, str(v))])} for v in values]
    letter = LETTERS[int(np.argmax(values))]
    thinking = " ".join(f"{name} {value}" for name, value in zip(LETTERS, values, strict=False))
    names = ", ".join(LETTERS[:count])
    return Made(pictures, f"Images {names}: which is largest?", letter, thinking)
