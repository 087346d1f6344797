"""Attention for transformers' `AttentionInterface`, and the mask that goes with it.

A batch of sequences, padded or packed, is one row of tokens with `cu_seqlens`. So no mask of all pairs is made, and
nothing is gathered or scattered: padding is a sequence whose queries see no key, which gives zeros as in sdpa, and one
whose keys no query sees. What only a mask of all pairs can say (a 4D mask of the caller's, windows, static caches,
padding between tokens, queries of padding that see the tokens before it) is left to transformers' sdpa, and so is
dropout. In training, what padding behind the tokens would see is of no use, and it sees nothing.
Dims: B batch, S tokens each, H query heads, K kv heads, D head dim, N sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..ops.flash_attn_varlen import flash_attn_func, flash_attn_varlen_func
from ..ops.flash_attn_with_kvcache import flash_attn_with_kvcache


class Packed(NamedTuple):
    """The tokens of a batch, row after row, are sequences that do not see each other."""

    cu_seqlens_q: Tensor  # int32 [N + 1]
    cu_seqlens_k: Tensor
    max_seqlen: int


class LeftPadded(NamedTuple):
    """Each row's cached keys count from here on."""

    leftpad: Tensor  # int32 [B]


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Sq, D]
    key: Tensor,  # [B, K, Sk, D]
    value: Tensor,  # [B, K, Sk, D], of MLA another D
    attention_mask: Tensor | Packed | LeftPadded | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    cache: Any = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: out ``[B, Sq, H, D]``, and no weights.

    With ``cache``, the one of continuous batching (`generate_batch`), lengths of keys are by kind of layer.
    """
    for name in ("s_aux", "position_bias"):  # what other models add to the scores; without it numbers would be others
        if kwargs.get(name) is not None:
            raise RuntimeError(f"attention: {name} must be None, got that of {type(module).__name__}")
    if kwargs.get("output_attentions"):
        warnings.warn("glm4v_ext's attention has no weights for output_attentions: eager has", stacklevel=2)
    if cache is not None:
        lengths_k = {**kwargs, "cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=lengths_k)
        cu_seq_lens_k, max_length_k = lengths_k["cu_seq_lens_k"], lengths_k["max_length_k"]
    if isinstance(attention_mask, Tensor) or (dropout and attention_mask is None and cu_seq_lens_q is None):
        if softcap:
            left = "beside a mask of all pairs or dropout, which attn_implementation 'glm4v_ext' leaves to sdpa"
            found = f"{softcap} of {type(module).__name__}: 'eager' takes both"
            raise RuntimeError(f"attention: softcap must be None {left}, got {found}")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if dropout:
        raise RuntimeError(f"attention: dropout must be 0 in padded and packed batches, got {dropout}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    missing, value_dim = query.shape[-1] - value.shape[-1], value.shape[-1]
    if missing > 0:  # the ops have one D: zeros fill up the other, add nothing to scores, and leave the output again
        value = nn.functional.pad(value, (0, missing))
    elif missing < 0:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key = (nn.functional.pad(x, (0, -missing)) for x in (query, key))
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "softcap": softcap or 0.0}
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and max_length_q is not None:
        lengths = (cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k or max_length_q))
        out = _rows(q, k, v, *lengths, **options)
    elif isinstance(attention_mask, Packed):
        starts_q, starts_k, longest = attention_mask
        out = _rows(q, k, v, starts_q, starts_k, longest, longest, **options)
    elif q.shape[1] == k.shape[1] or torch.is_grad_enabled():
        out = flash_attn_func(q, k, v, **options)
    else:
        leftpad = None if attention_mask is None else attention_mask.leftpad
        out = flash_attn_with_kvcache(q, k, v, cache_leftpad=leftpad, **options)
    return (out[..., :value_dim].contiguous() if missing > 0 else out), None


def _rows(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
    """A batch ``[B, S, H, D]`` as one row of tokens."""
    out = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *lengths, **options)
    return out.unflatten(0, q.shape[:2])


def attention_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,  # [B, kv_length], True where a token counts
    cache_position: Tensor | None = None,  # older versions' in place of q_length and q_offset
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | Packed | LeftPadded | None:
    """A mask function of transformers, for :func:`attention`: None where plain causal attention is meant."""
    if cache_position is None:
        where: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    else:
        where = {"cache_position": cache_position}
        q_length, q_offset = len(cache_position), int(cache_position[0])

    def all_pairs() -> Tensor | None:
        arguments = {**kwargs, **where, "kv_offset": kv_offset, "use_vmap": use_vmap, "allow_is_causal_skip": False}
        return sdpa_mask(
            batch_size, kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, **arguments
        )

    if use_vmap or kv_offset or kwargs.get("local_size") is not None or isinstance(q_offset, Tensor):
        return all_pairs()
    if q_offset + q_length != kv_length or (attention_mask is not None and attention_mask.shape[-1] != kv_length):
        return all_pairs()
    tracing = torch.compiler.is_compiling()
    if attention_mask is not None and not tracing and bool(attention_mask.all()):
        attention_mask = None
    if attention_mask is None and mask_function is causal_mask_function:
        return None
    if q_length == kv_length:
        device = kwargs.get("device") if attention_mask is None else attention_mask.device
        starts = _starts(batch_size, kv_length, mask_function, device)
        if starts is None or (attention_mask is not None and not _in_one_piece(starts, attention_mask)):
            return all_pairs()
        if attention_mask is not None:
            starts[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
        return Packed(*_cu_seqlens(starts, attention_mask), kv_length)
    if mask_function is not causal_mask_function or attention_mask is None or torch.is_grad_enabled() or tracing:
        return all_pairs()
    leftpad = attention_mask.int().argmax(1)
    if not bool((attention_mask.sum(1) + leftpad == kv_length).all()):
        return all_pairs()  # holes
    return LeftPadded(leftpad.int())


def _starts(batch: int, length: int, mask_function: Callable[..., Any], device: Any) -> Tensor | None:
    """bool ``[B, S]``: where a sequence starts, padding aside; None if the mask function is not that of packed
    sequences."""
    starts = torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask_function is causal_mask_function:
        starts[:, 1:] = False
    else:
        rows = torch.arange(batch, device=device)[:, None]
        one, next_one = torch.arange(length - 1, device=device), torch.arange(1, length, device=device)
        head = torch.zeros((), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling() and bool(mask_function(rows, head, one, next_one).any()):
            return None  # it looks ahead
        starts[:, 1:] = ~mask_function(rows, head, next_one, one)
    return starts


def _in_one_piece(starts: Tensor, counts: Tensor) -> bool:
    """Whether the tokens of each sequence that count follow each other; without gradients, also whether none comes
    before padding, whose queries would see it. Traced, a sequence in pieces is an error of the run."""
    before = counts.int().cumsum(1) - counts.int()  # tokens that count, in the row
    in_sequence = before - before.where(starts, 0).cummax(1).values
    behind = ~counts & (in_sequence > 0)  # padding behind tokens
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        again = counts[:, 1:] & ~counts[:, :-1] & ~starts[:, 1:] & (in_sequence[:, 1:] > 0)
    else:
        again = behind
    if torch.compiler.is_compiling():
        said = "attention: attention_mask must have no padding between tokens under torch.compile, got some"
        torch._assert_async(~again.any(), said)
        return True
    return not bool(again.any())


def _cu_seqlens(starts: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two int32 ``[N + 1]``, of queries and of keys. Traced, N comes from the number of tokens; most are empty."""
    flat = starts.flatten()
    if torch.compiler.is_compiling():
        index = torch.arange(len(flat), device=flat.device)
        first = index.where(flat, len(flat)).sort().values
    else:
        first = flat.nonzero().squeeze(1)
    cu_seqlens = nn.functional.pad(first, (0, 1), value=len(flat))
    if counts is None:
        return (cu_seqlens.int(),) * 2
    # Each run of tokens becomes two sequences: one with its queries, and its keys if they count; one with the others.
    first, last = cu_seqlens[:-1], cu_seqlens[1:]
    real = nn.functional.pad(counts.flatten(), (0, 1))[first]
    ends = torch.stack((last, last), 1), torch.stack((last.where(real, first), last), 1)
    queries, keys = (nn.functional.pad(x.flatten(), (1, 0)).int() for x in ends)
    return queries, keys
