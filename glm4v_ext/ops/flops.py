"""What an op's products cost, for ``torch.utils.flop_counter.FlopCounterMode``, which knows no op of ours.

As torch has it for its own attention: matrix products alone, masks count as if there were none, and a backward counts
the scores that it computes again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .when_imported import when_imported


def flops(name: str, formula: Callable[..., int]) -> None:
    """Registers ``formula(*arguments)`` of an op."""

    def register(counter: Any) -> None:
        op = getattr(torch.ops.glm4v_ext, name)
        counter.register_flop_formula(op, get_raw=True)(lambda *arguments, out_val, **_: formula(*arguments))

    when_imported("torch.utils.flop_counter", register)


def product(x: Tensor, weight: Tensor, *_: Any) -> int:
    """Of each row of x with the whole weight."""
    return 2 * x.numel() * weight.shape[0]


def lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Of sequences; where they are not known, in traces, as long as the longest may be."""
    return cu_seqlens.diff().tolist() if known(cu_seqlens) else [longest] * (cu_seqlens.shape[0] - 1)


def known(x: Tensor | None) -> bool:
    """Whether there are values."""
    return type(x) is Tensor and not x.is_meta
