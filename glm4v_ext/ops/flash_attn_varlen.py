"""Attention over packed sequences, flash-attention 2's functions.

Dims: Tq, Tk tokens, N sequences, B batch, S tokens per sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .autocast import autocast, lower
from .differentiable import differentiable
from .fake import fake
from .flops import flops, lengths
from .refuse import refuse_second_grad

# Looked up once, as in rms_norm_add.
_flash_attn_varlen = torch.ops.glm4v_ext.flash_attn_varlen.default
WHOLE = (int, Integral, torch.SymInt)  # traced with dynamic sizes, a number is the last


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """``softmax(softmax_scale * q k^T) v`` within each sequence, never across; memory grows with the tokens.

    Query row i of a sequence with Sq queries and Sk keys sees key j when
    ``i + Sk - Sq - left <= j <= i + Sk - Sq + right`` (the mask is aligned to the bottom right corner). A row that sees
    no key gives 0, with lse -inf and zero gradients. On x86 CPUs values below 2^-126 become 0 inside; where they have
    AMX, the products of long sequences in float32 are made as in ``linear``.

    Args:
        q: ``[Tq, H, D]``, float32, bfloat16 or float16, D from 1 to 256. Slices of a packed qkv are read in place.
        k, v: ``[Tk, K, D]``; K divides H, query head h reads kv head ``h // (H // K)``. With ``block_table``
            ``[pages, page_size, K, D]``, page_size a multiple of 16.
        cu_seqlens_q, cu_seqlens_k: ``[N + 1]``, int32 or int64, ascending from 0; sequences may be empty. Tokens beyond
            the last value belong to no sequence: their rows of the output and of the gradients are 0.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        dropout_p: only 0.
        softmax_scale: positive; None takes ``D ** -0.5``.
        causal: the same as a right window of 0.
        window_size: (left, right); -1 is unbounded.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        alibi_slopes: only None.
        deterministic: accepted; forward and backward always are.
        return_attn_probs: also return the logarithm of the softmax's denominator.
        block_table: ``[N, pages per sequence]``, int32 or int64: where the pages of each sequence are. No gradients.

    Returns:
        ``out [Tq, H, D]``, or ``(out, lse [H, Tq] float32, None)`` with ``return_attn_probs``. No gradient
        flows through lse.

    Raises:
        RuntimeError: an argument does not fit or is not supported; the text names it.

    Source: names, order and semantics of flash-attention 2 (Dao 2023, arXiv 2307.08691).
    """
    out, lse, _ = _flash_attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        *pair("flash_attn_varlen_func", window_size), softcap, alibi_slopes, block_table,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """:func:`flash_attn_varlen_func` for sequences of one length; arguments that are not named here are that one's.

    Args:
        q: ``[B, Sq, H, D]``.
        k, v: ``[B, Sk, K, D]``.

    Returns:
        ``out [B, Sq, H, D]``, or ``(out, lse [B, H, Sq] float32, None)`` with ``return_attn_probs``.

    Raises:
        RuntimeError: as in :func:`flash_attn_varlen_func`.

    Source: flash-attention 2's function.
    """
    # The op sees packed tokens: only here is it known whose they are.
    for name, x, letters in (("q", q, "[B, Sq, H, D]"), ("k", k, "[B, Sk, K, D]"), ("v", v, "[B, Sk, K, D]")):
        if not isinstance(x, Tensor) or x.dim() != 4:
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(f"flash_attn_func: {name} must be {letters}, got {found}")
    batch, rows, heads, dim = q.shape
    _, keys, kv_heads, _ = k.shape
    if not 1 <= dim <= 256:
        raise RuntimeError(f"flash_attn_func: q must be [B, Sq, H, D] with D from 1 to 256, got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (batch, keys, kv_heads, dim):
            expected = [batch, keys, kv_heads, dim]
            raise RuntimeError(f"flash_attn_func: {name} must be [B, Sk, K, D] = {expected}, got {list(x.shape)}")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        divisor = f"K a divisor of the {heads} heads of q"
        raise RuntimeError(f"flash_attn_func: k must be [B, Sk, K, D] with {divisor}, got {list(k.shape)}")
    count = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    cu_seqlens_q = count * rows
    cu_seqlens_k = cu_seqlens_q if keys == rows else count * keys
    out, lse, _ = _flash_attn_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q, cu_seqlens_k, rows, keys, dropout_p,
        softmax_scale, causal, *pair("flash_attn_func", window_size), softcap, alibi_slopes, None,
    )  # fmt: skip
    out = out.unflatten(0, (batch, rows))
    return (out, lse.unflatten(1, (batch, rows)).transpose(0, 1), None) if return_attn_probs else out


def pair(name: str, window_size: tuple[int, int]) -> tuple[int, int]:
    """``window_size``, of which the op sees two numbers: only here is it known whether there were two."""
    sides = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(sides) != 2 or not (isinstance(sides[0], WHOLE) and isinstance(sides[1], WHOLE)):
        raise RuntimeError(f"{name}: window_size must be (left, right), two whole numbers, got {window_size!r}")
    return window_size[0], window_size[1]


@fake("flash_attn_varlen")
def _fake(q, k, v, cu_seqlens_q, *options) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse, lse.new_empty((2, *lse.shape))


@fake("flash_attn_varlen_backward")
def _fake_backward(dout, q, k, v, *options) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, _dropout_p, scale, causal, left, right, softcap, _alibi, block_table = inputs
    out, lse, statistics = output  # [2, H, Tq]: maximum and sum of each softmax
    ctx.mark_non_differentiable(lse, statistics)
    ctx.set_materialize_grads(False)  # zeros for those two
    ctx.save_for_backward(q, k, v, out, statistics, cu_q, cu_k, block_table)
    ctx.options = (max_q, max_k, scale, causal, left, right, softcap)


def _backward(ctx, dout: Tensor, *_ignored: Tensor):
    *tensors, block_table = ctx.saved_tensors
    dq, dk, dv = torch.ops.glm4v_ext.flash_attn_varlen_backward(dout, *tensors, *ctx.options, block_table)
    return dq, dk, dv, *(None,) * 12


def _flops(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, products: int = 2) -> int:
    pairs = zip(lengths(cu_seqlens_q, max_seqlen_q), lengths(cu_seqlens_k, max_seqlen_k), strict=True)
    return products * 2 * q.shape[1] * q.shape[2] * sum(rows * keys for rows, keys in pairs)


def _flops_backward(dout, q, k, v, out, statistics, *rest) -> int:
    return _flops(q, k, v, *rest, products=5)


differentiable("flash_attn_varlen", _setup, _backward)
autocast("flash_attn_varlen", lower)
flops("flash_attn_varlen", _flops)
flops("flash_attn_varlen_backward", _flops_backward)
refuse_second_grad("flash_attn_varlen")
