"""Hooks into other codebases. Each module is imported when asked for, the other codebase even later."""

import importlib
from types import ModuleType

__all__ = ["rotary", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
