"""Log-probabilities of given tokens under a language model's head. Dims: T tokens, C width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast, lower
from .differentiable import differentiable
from .fake import fake
from .flops import flops, product
from .refuse import refuse_second_grad


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax(hidden @ weight.T / temperature)`` at the targets, without ever holding ``[T, V]``.

    Logits exist for a chunk of the vocabulary at a time: 16 MiB of them, 32 on a GPU, but 1024 columns at least. They
    are rounded to the dtype of ``hidden``, as those of a linear layer; softmax and entropy are fp32. The backward
    computes them again: forward and backward make four products of that size where plain PyTorch makes three, one less
    for ``hidden`` or ``weight`` that requires no grad. Besides the gradients it holds ``[T, C]`` in fp32.
    Deterministic.

    Args:
        hidden: ``[T, C]``, float32, bfloat16 or float16.
        weight: ``[V, C]``, dtype of ``hidden``: the head's, without bias.
        targets: ``[T]`` int32 or int64, each in ``[0, V)``. A GPU, which does not tell the host, gives NaN for others.
        temperature: divides the logits.
        return_entropy: also return the entropy of each softmax, in nats; it has a gradient, which costs nothing extra.

    Returns:
        ``[T]`` float32, or two of them with ``return_entropy``.

    Raises:
        RuntimeError: a shape, dtype, device or value does not fit; the text names the argument.

    Source: the online softmax of Milakov and Gimelshein 2018 (arXiv 1805.02867); cutting the vocabulary as in Wijmans
    et al. 2024 (arXiv 2411.09009).
    """
    logprob, entropy, _ = torch.ops.glm4v_ext.token_logprob(hidden, weight, targets, temperature, return_entropy)
    return (logprob, entropy) if return_entropy else logprob


@fake("token_logprob")
def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, return_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    logprob = hidden.new_empty(tokens, dtype=torch.float32)
    return logprob, logprob.new_empty(tokens if return_entropy else 0), logprob.new_empty((2, tokens))


@fake("token_logprob_backward")
def _fake_backward(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest
) -> tuple[Tensor, Tensor]:
    needs_dhidden, needs_dweight = rest[-2:]
    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty((tokens if needs_dhidden else 0, width)),
        weight.new_empty((vocabulary if needs_dweight else 0, width)),
    )


def _setup(ctx, inputs, output) -> None:
    hidden, weight, targets, ctx.temperature, _ = inputs
    _, entropy, statistics = output  # statistics [2, T]: maximum and sum of each softmax
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, statistics, entropy)


def _backward(ctx, dlogprob: Tensor | None, dentropy: Tensor | None, _: None):
    hidden, weight, targets, statistics, entropy = ctx.saved_tensors
    if dlogprob is None:
        dlogprob = torch.zeros_like(statistics[0])
    needs = ctx.needs_input_grad[:2]
    gradients = torch.ops.glm4v_ext.token_logprob_backward(
        dlogprob, dentropy if entropy.numel() else None, hidden, weight, targets, statistics, entropy,
        ctx.temperature, *needs,
    )  # fmt: skip
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None, None


def _flops_backward(dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, *rest) -> int:
    needs_dhidden, needs_dweight = rest[-2:]
    return product(hidden, weight) * (1 + needs_dhidden + needs_dweight)


differentiable("token_logprob", _setup, _backward)
autocast("token_logprob", lower)
flops("token_logprob", product)
flops("token_logprob_backward", _flops_backward)
refuse_second_grad("token_logprob")
