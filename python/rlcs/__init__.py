"""RLCS: reinforcement learning with curriculum sampling. So far its parts: rewards, curriculum, alarms, packing, loss.

Names load on first use, so that this import is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import rewards
    from .alarms import Alarms
    from .curriculum import Curriculum

__all__ = ["Alarms", "Curriculum", "rewards"]

_HOME = {"Alarms": "alarms", "Curriculum": "curriculum"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name == "rewards":
        return importlib.import_module(".rewards", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
