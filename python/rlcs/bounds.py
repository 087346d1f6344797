"""Bounds of settings, which are held to them where they are made. No torch."""

from __future__ import annotations

from typing import Any

WHOLE = 2**63 - 1  # the largest whole number that torch and numpy take
MANY = 1 << 16  # answers of a group, ranks of adapters, whatever is held at once for each
PROCESSES = 1024  # and threads, beyond which a machine starts none
TOKENS = 1 << 40  # of a cache or an answer: the bytes of as many can still be counted
STEPS = 100  # of a run that nothing else ends
LONGEST_S = 1e7  # of a wait: four months; the clocks of some libraries end soon after


def expect_within(where: str, settings: Any, **bounds: tuple[float, float]) -> None:
    """An error that names the first setting below its least or above its most; None is neither, NaN is both."""
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        if value is None or least <= value <= most:
            continue
        due = f"at most {most}" if value > most else f"{least} or more"
        raise ValueError(f"{where}: {name} must be {due}, got {value}")


def expect_above_zero(where: str, settings: Any, **most: float) -> None:
    """An error that names the first setting that isn't above 0, or is above its most; None is none."""
    for name, limit in most.items():
        value = getattr(settings, name)
        if value is None or 0 < value <= limit:
            continue
        due = f"at most {limit:g}" if value > limit else "above 0"
        raise ValueError(f"{where}: {name} must be {due}, got {value}")
