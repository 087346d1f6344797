"""What an op's products cost, for ``torch.utils.flop_counter.FlopCounterMode``, which knows no op of ours.

As torch has it for its own attention: matrix products alone, masks count as if there were none, and a backward counts
the scores that it computes again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def flops(name: str, formula: Callable[..., int]) -> None:
    """Registers ``formula(*arguments)`` of an op."""
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], name, formula)


def product(x: Tensor, weight: Tensor, *_: Any) -> int:
    """Of each row of x with the whole weight."""
    return 2 * x.numel() * weight.shape[0]


def lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Of sequences; where they are not known, in traces, as long as the longest may be."""
    return cu_seqlens.diff().tolist() if known(cu_seqlens) else [longest] * (cu_seqlens.shape[0] - 1)


def known(x: Tensor | None) -> bool:
    """Whether there are values."""
    return type(x) is Tensor and not x.is_meta


def _register(counter: ModuleType, name: str, formula: Callable[..., int]) -> None:
    op = getattr(torch.ops.glm4v_ext, name)
    counter.register_flop_formula(op, get_raw=True)(lambda *arguments, out_val, **_: formula(*arguments))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Torch's counter imports Triton, which takes longer than all of ours: it hears of us when somebody imports it."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _COUNTER:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for name, formula in _formulas.items():
                _register(module, name, formula)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _WhenImported())
