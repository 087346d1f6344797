"""Tells parts of torch about the ops when somebody loads them: each of them takes longer to load than all of ours."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

_waiting: dict[str, list[Callable[[Any], None]]] = defaultdict(list)


def when_imported(name: str, action: Callable[[Any], None]) -> None:
    """Calls ``action(module)`` once the module of that name is there."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        _waiting[name].append(action)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name not in _waiting:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for action in _waiting.pop(name, []):
                action(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
