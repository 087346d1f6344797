"""What autograd says where an op has no gradient: one line in place of zeros that nobody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """No op has a forward-mode derivative; torch would drop the tangents of its inputs without a word."""
    if forward_ad._current_level < 0:  # what unpack_dual asks first
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments):
        raise RuntimeError(f"{name}: derivatives must be asked for by backward, got a tangent (forward mode)")


class _Library(torch.library.Library):
    """Whose kernels for autograd, ours and those that torch makes, refuse tangents."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            refuse_tangents(op_name, arguments)
            return fn(keyset, *arguments)

        super().impl(op_name, kernel, dispatch_key, **options)


_library = _Library("glm4v_ext", "IMPL")


def register_backward(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Gives an op its gradients."""
    torch.library.register_autograd(f"glm4v_ext::{name}", backward, setup_context=setup_context, lib=_library)


def refuse_grad(name: str, inputs: str, changed: str, instead: str) -> None:
    """Gives an op that changes tensors, and so is for inference, an autograd kernel that refuses gradients.

    Args:
        name: of the op.
        inputs: names of its leading arguments, which must not require grad.
        changed: names of those that it writes to; autograd learns of it.
        instead: the function that has gradients.
    """
    op = getattr(torch.ops.glm4v_ext, name).default
    names = inputs.split()
    written = [names.index(one) for one in changed.split()]

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        for argument, tensor in zip(names, arguments, strict=False):
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(f"{name}: {argument} must not require grad, got requires_grad=True; use {instead}")
        torch.autograd.graph.increment_version([arguments[i] for i in written if arguments[i] is not None])
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def refuse_second_grad(name: str) -> None:
    """Makes a derivative of ``<name>_backward`` an error, where torch would warn and take it for zero.

    It is raised when that derivative is computed: a gradient made with ``create_graph=True`` alone is a good one.
    """

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name}: gradients must be asked for once, got a gradient of its gradient")

    register_backward(f"{name}_backward", backward)
