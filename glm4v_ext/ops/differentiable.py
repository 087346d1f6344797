"""Gives ops their gradients.

As ``torch.library.register_autograd``, which asks the schema for each argument anew in every call (0.1 ms for fifteen)
and lets forward-mode derivatives be zero without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_library = torch.library.Library("glm4v_ext", "IMPL")


def differentiable(
    name: str,
    setup: Callable[..., None] | None,
    backward: Callable[..., Any],
    on_gpu: Callable[..., Any] | None = None,
) -> None:
    """Registers ``setup(ctx, inputs, output)``, which keeps what ``backward(ctx, *douts)`` needs.

    ``inputs`` are all of the op's, and ``backward`` gives a gradient for each, None where there is none. ``on_gpu`` is
    the op in functions of torch's own where a GPU's tensors need gradients: theirs don't wait for Python.
    """
    op = getattr(torch.ops.glm4v_ext, name).default
    # The dispatcher leaves out trailing arguments that have their default values.
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def forward(ctx: Any, *inputs: Any) -> Any:
        with below():
            output = _recorded(op, inputs) if torch._C._are_functorch_transforms_active() else op(*inputs)
        if setup is not None:
            setup(ctx, (*inputs, *defaults[len(inputs) :]), output)
        return output

    def backward_of(ctx: Any, *douts: Any) -> Any:
        return backward(ctx, *douts)[: len(ctx.needs_input_grad)]

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward_of)}
    function: Any = type(f"glm4v_ext_{name}_", (torch.autograd.Function,), parts)  # what grad_fn is called by

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        refuse_tangents(name, inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if on_gpu is not None and inputs[0].is_cuda:
                return on_gpu(*inputs)
            if not torch._C._are_functorch_transforms_active():
                return function.apply(*inputs)
            # torch.func calls this kernel once for each of its levels, where a function must be of one level.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(*inputs)
        with below():
            return op.redispatch(keyset & after, *inputs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _recorded(op: Any, inputs: tuple[Any, ...]) -> Any:
    """Of several levels of torch.func the outer ones record what an inner one calls, and look for tangents there."""
    with torch.set_grad_enabled(True), forward_ad._set_fwd_grad_enabled(True):
        return op(*inputs)


def refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """No op has a forward-mode derivative; torch would drop the tangents of its inputs without a word."""
    if forward_ad._current_level < 0:  # what unpack_dual asks first
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments):
        raise RuntimeError(f"{name}: derivatives must be asked for by backward, got a tangent (forward mode)")
