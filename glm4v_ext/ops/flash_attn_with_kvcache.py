"""Attention against a key/value cache, with the append. Dims: B sequences, Sq queries each, Sn new keys each, H query
heads, K kv heads, D head dim, Bc cache rows of capacity S each."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import autocast
from .fake import fake
from .flash_attn_varlen import WHOLE, pair
from .flops import flops, known
from .refuse import refuse_grad

# Looked up once, as in rms_norm_add.
_flash_attn_with_kvcache = torch.ops.glm4v_ext.flash_attn_with_kvcache.default


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
):
    """``softmax(softmax_scale * q k^T) v`` against the cached keys of each sequence, for decoding. Forward only.

    Sequence ``b`` sees its keys from ``cache_leftpad[b]`` to before ``cache_seqlens[b] + Sn``. With ``causal``, query
    ``i`` sees those up to and with ``cache_seqlens[b] + Sn - Sq + i`` (bottom-right aligned). ``k`` and ``v`` are
    first written into the caches, in place, behind the ``cache_seqlens[b]`` keys that are there. A query that sees no
    key gives zeros. On x86 CPUs values below 2^-126 become 0 inside.

    Args:
        q: ``[B, Sq, H, D]``, float32, bfloat16 or float16; D up to 256; H a multiple of K.
        k_cache: ``[Bc, S, K, D]``, or ``[pages, page_size, K, D]`` with ``block_table``; contiguous in D, else of any
            strides. ``page_size`` is a multiple of 16.
        v_cache: shaped like ``k_cache``, in memory of its own where ``k`` is given; it may lie between that of keys.
        k: ``[B, Sn, K, D]``, appended; ``v`` alike. ``cache_seqlens`` is then required, and ``q``, ``k`` and ``v`` lie
            outside the caches.
        cache_seqlens: keys that each sequence has, int or int32/int64 ``[B]``; None takes the whole capacity.
        cache_batch_idx: int32/int64 ``[B]``, the cache row of each sequence; distinct where ``k`` is given.
        cache_leftpad: int32/int64 ``[B]``, the first key that counts; it may be one of the new ones, as in prompts that
            are padded on the left.
        block_table: int32/int64 ``[B, max_pages]``, the pages of each sequence in order.
        softmax_scale: positive; None takes ``D ** -0.5``.
        window_size: ``(left, right)`` keys seen around the diagonal; -1 is unbounded.
        softcap: a positive value turns a score s into ``softcap * tanh(s / softcap)``.
        num_splits: parts that a sequence's keys are cut into; 0 chooses by their number and that of the queries. The
            result depends on it bitwise, but neither on the other sequences nor on the number of threads.
        return_softmax_lse: also return the log-sum-exp of the scores.
        rotary_cos, rotary_sin, alibi_slopes: must be None; ``rotary_interleaved`` then has no meaning.

    Returns:
        ``[B, Sq, H, D]``, or with ``return_softmax_lse`` also fp32 ``[B, H, Sq]`` (-inf where no key is seen).

    Raises:
        RuntimeError: an argument does not fit or is not supported, or the appended keys exceed the capacity; nothing
            has been written then.

    Source: names, order and meaning of flash-attention 2's function.
    """
    if isinstance(cache_seqlens, WHOLE):  # int64: what no cache holds is then for the op to refuse
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int64, device=q.device)
    out, lse = _flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale,
        causal,
        *pair("flash_attn_with_kvcache", window_size),
        softcap,
        alibi_slopes,
        num_splits,
    )
    return (out, lse) if return_softmax_lse else out


@fake("flash_attn_with_kvcache")
def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _flops(q, k_cache, v_cache, k, v, cos, sin, cache_seqlens, batch_idx, cache_leftpad, block_table, *options) -> int:
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    new = 0 if k is None else k.shape[1]
    keys = [n + new for n in cache_seqlens.tolist()] if known(cache_seqlens) else [capacity] * q.shape[0]
    before = cache_leftpad.tolist() if known(cache_leftpad) else []
    return 4 * q.shape[1:].numel() * (sum(keys) - sum(before))


flops("flash_attn_with_kvcache", _flops)
refuse_grad(
    "flash_attn_with_kvcache",
    inputs="q k_cache v_cache k v",
    changed="k_cache v_cache",
    instead="flash_attn_varlen_func",
)
autocast("flash_attn_with_kvcache", lambda device, tensors: tensors[1].dtype)  # the cache stays as it is
