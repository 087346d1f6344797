"""What autograd says to the in-place ops: they are for inference, so a tensor that requires grad is an error."""

from __future__ import annotations

from typing import Any

import torch

_library = torch.library.Library("glm4v_ext", "IMPL")


def refuse_grad(name: str) -> None:
    """Gives the op ``<name>_(q, k, ...)`` an autograd kernel that refuses gradients and notes that q and k changed."""
    op = getattr(torch.ops.glm4v_ext, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> None:
        changed = dict(zip("qk", arguments, strict=False))
        for argument, tensor in changed.items():
            if tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name}: {argument} must not require grad, got requires_grad=True; use {name.rstrip('_')}"
                )
        torch.autograd.graph.increment_version(tuple(changed.values()))
        op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
