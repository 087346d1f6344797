"""What ``torch.autocast`` does to the ops, by torch's own rules.

Matrix products and attention run in autocast's dtype, as `F.linear` and sdpa do. The others run in the widest dtype
among their inputs, as sums do: bf16 activations and an fp32 weight make an fp32 norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("glm4v_ext", "IMPL")


def lower(device: str, tensors: list[Tensor]) -> torch.dtype:
    """Autocast's own dtype."""
    return torch.get_autocast_dtype(device)


def widen(device: str, tensors: list[Tensor]) -> torch.dtype:
    """The widest dtype given."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def autocast(name: str, choose: Callable[[str, list[Tensor]], torch.dtype]) -> None:
    """Casts the op's floating inputs, where autocast is on, to the dtype that ``choose(device, inputs)`` names.

    Those that it writes to stay: a copy would be written instead.
    """
    op = getattr(torch.ops.glm4v_ext, name).default
    aliases = [argument.alias_info for argument in op._schema.arguments]
    written = [alias is not None and alias.is_write for alias in aliases]

    def kernel_of(device: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            floats = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]
            dtype = choose(device, floats)
            cast = [
                x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and not stays else x
                for x, stays in zip(arguments, written, strict=False)
            ]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*cast)

        return kernel

    for device, key in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
        _library.impl(name, kernel_of(device, key), key.name)
