"""Gives ops their gradients.

As ``torch.library.register_autograd``, which asks the schema for each argument anew in every call: 0.1 ms for fifteen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("glm4v_ext", "IMPL")


def differentiable(name: str, setup: Callable[..., None] | None, backward: Callable[..., Any]) -> None:
    """Registers ``setup(ctx, inputs, output)``, which keeps what ``backward(ctx, *douts)`` needs.

    ``inputs`` are all of the op's, and ``backward`` gives a gradient for each, None where there is none.
    """
    op = getattr(torch.ops.glm4v_ext, name).default
    # The dispatcher leaves out trailing arguments that have their default values.
    defaults = tuple(argument.default_value for argument in op._schema.arguments)
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset

    def forward(ctx: Any, *arguments: Any) -> Any:
        *inputs, keyset = arguments
        with below():
            output = op.redispatch(keyset & after, *inputs)
        if setup is not None:
            setup(ctx, (*inputs, *defaults[len(inputs) :]), output)
        return output

    def backward_of(ctx: Any, *douts: Any) -> Any:
        given = len(ctx.needs_input_grad)  # the keyset is the last one
        return *backward(ctx, *douts)[: given - 1], None

    function: Any = type(
        f"{name}_with_gradients",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward_of)},
    )

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs, keyset)
        with below():
            return op.redispatch(keyset & after, *inputs)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
