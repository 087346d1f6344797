"""Where a model is."""

from __future__ import annotations

import torch

from .errors import InputError


def device_of(name: torch.device | str, values: bool = True) -> torch.device:
    """The device of that name.

    Raises:
        InputError: torch has none such here, or, where ``values`` are wanted, one without, as meta is.
    """
    try:
        device = torch.device(name)
        zero = torch.zeros((), device=device)
        if values:
            zero.item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device must be one that torch has here, got {name!r}: {reason}") from None
    return device
