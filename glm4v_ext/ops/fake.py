"""Shapes without values, for meta tensors and for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers what makes the outputs of an op from the shapes of its inputs, which must be on one device.

    It is also what runs where one input is a meta tensor and another is not, so contracts don't see those.
    """

    def register(function: Callable[..., Any]) -> None:
        @wraps(function)
        def checked(*arguments: Any) -> Any:
            devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: tensors must be on one device, got {' and '.join(sorted(devices))}")
            return function(*arguments)

        torch.library.register_fake(f"glm4v_ext::{name}", checked)

    return register
