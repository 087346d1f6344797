"""What autograd says where an op has no gradient: one line in place of zeros that nobody asked for."""

from __future__ import annotations

from typing import Any

import torch

from .differentiable import differentiable, refuse_tangents

_library = torch.library.Library("glm4v_ext", "IMPL")


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
        refuse_tangents(name, arguments)
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

    differentiable(f"{name}_backward", None, backward)
