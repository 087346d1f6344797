"""What torchrun tells a process that it has started, by the environment. No torch."""

from __future__ import annotations

import os


def started_as() -> tuple[int, int]:
    """Rank and size as torchrun has them; (0, 1) without it.

    Raises:
        ValueError: the environment has others than torchrun gives.
    """
    size = _whole("WORLD_SIZE", 1, 1)
    rank = _whole("RANK", 0, 0) if "WORLD_SIZE" in os.environ else 0
    if rank >= size:
        raise ValueError(f"parallel: RANK must be below WORLD_SIZE ({size}), got {rank}")
    return rank, size


def local_rank() -> int:
    """The process's number among those of its machine."""
    return _whole("LOCAL_RANK", 0, 0)


def _whole(name: str, default: int, least: int) -> int:
    found = os.environ.get(name, str(default))
    if not (found.isascii() and found.isdigit() and len(found) < 10 and int(found) >= least):
        raise ValueError(
            f"parallel: {name} must be a whole number of {least} or more, as torchrun sets it, got {found!r}"
        )
    return int(found)
