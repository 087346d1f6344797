"""RLCS: reinforcement learning with curriculum sampling. The command is ``rlcs``.

Rewards, curriculum, alarms and packing need no torch and serve other trainers; ``train`` with a ``TrainConfig`` and
``sft`` with an ``SftConfig`` are what the command runs.

Names load on first use, so that this import is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import rewards
    from .alarms import Alarms
    from .config import SftConfig, TrainConfig
    from .curriculum import Curriculum
    from .supervised import sft
    from .trainer import Trainer, train

__all__ = ["Alarms", "Curriculum", "SftConfig", "TrainConfig", "Trainer", "rewards", "sft", "train"]

_HOME = {
    "Alarms": "alarms",
    "Curriculum": "curriculum",
    "SftConfig": "config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "sft": "supervised",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name == "rewards":
        return importlib.import_module(".rewards", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
