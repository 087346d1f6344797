"""Shapes without values, for meta tensors and for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .when_imported import when_imported


def fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers what makes the outputs of an op from the shapes of its inputs, which must be on one device.

    It is also what runs where one input is a meta tensor and another is not, so contracts don't see those.
    """

    def register(function: Callable[..., Any]) -> None:
        @wraps(function)
        def checked(*arguments: Any) -> Any:
            devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: tensors must be on one device, got {' and '.join(sorted(devices))}")
            return function(*arguments)

        torch.library.register_fake(f"glm4v_ext::{name}", checked)

    return register


def _keep_offsets(lowering: Any) -> None:
    """Inductor takes 0 for where a view begins if that depends on dynamic sizes and an op may write to it, so that
    caches in one tensor were read and written at its start: https://github.com/pytorch/pytorch/issues/198068."""
    op = torch.ops.aten.sym_storage_offset.default
    if not all(hasattr(lowering, name) for name in ("lowerings", "fallbacks", "register_lowering", "V")):
        return  # none of it is public: another version of torch has to keep working
    if op in lowering.lowerings and op not in lowering.fallbacks:  # as later versions may have it
        return

    @lowering.register_lowering(op, type_promotion_kind=None)
    def sym_storage_offset(x: Any) -> Any:
        offset = lowering.V.graph.current_node.meta["val"]
        return offset.node.expr if isinstance(offset, torch.SymInt) else offset


when_imported("torch._inductor.lowering", _keep_offsets)
