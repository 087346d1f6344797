"""GLM-4.1V: files in, answers out, Hugging Face checkpoints both ways.

Names load on first use, so that this import is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import Generation
    from .batch import Batch
    from .cache import KVCache
    from .config import Config, TextConfig, VisionConfig
    from .errors import InputError
    from .generate import Piece
    from .model import Glm4v
    from .processor import Processor
    from .prompt_cache import PromptCache

_HOME = {
    "Batch": "batch",
    "Config": "config",
    "Generation": "answer",
    "Glm4v": "model",
    "InputError": "errors",
    "KVCache": "cache",
    "Piece": "generate",
    "Processor": "processor",
    "PromptCache": "prompt_cache",
    "TextConfig": "config",
    "VisionConfig": "config",
}

__all__ = [
    "Batch",
    "Config",
    "Generation",
    "Glm4v",
    "InputError",
    "KVCache",
    "Piece",
    "Processor",
    "PromptCache",
    "TextConfig",
    "VisionConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        said = f"glm4v: {error.name} must be installed: pip install 'glm4v-ext[model]'"
        raise ModuleNotFoundError(said, name=error.name) from error


def __dir__() -> list[str]:
    return sorted(__all__)
