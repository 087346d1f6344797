"""RLCS: reinforcement learning with curriculum sampling. The command is ``rlcs``.

Rewards, curriculum, alarms and packing need no torch and serve other trainers; ``rlcs.trainer``, ``rlcs.sft`` and
``rlcs.config`` are what the command runs.

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
