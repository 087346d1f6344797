"""The language model: embedding, decoder layers with sandwich norms, 3D rotary positions, grouped-query attention.

Packed throughout: the tokens of all sequences stand in one row, ``cu_seqlens`` tells them apart. The decode step has
one token per sequence and keys in a cache. The two differ in how attention finds its keys, and share all else.
Dims: T tokens, N sequences, B cache rows, H query heads, K kv heads, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4v_ext import flash_attn_varlen_func, flash_attn_with_kvcache, rms_norm_add, rope_3d, rope_3d_

from .cache import KVCache
from .config import TextConfig
from .layers import Linear, Mlp, RMSNorm, products, run
from .positions import Keys

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q [T, H, D], k and v [T, K, D] -> [T, H, D]


class Attention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.config = config
        self.q_proj = Linear(c, config.num_attention_heads * d)
        self.k_proj = Linear(c, config.num_key_value_heads * d)
        self.v_proj = Linear(c, config.num_key_value_heads * d)
        self.o_proj = Linear(config.num_attention_heads * d, c, bias=False)

    @property
    def projections(self) -> tuple[Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, position_ids: Tensor, layer: int, attend: Attend) -> Tensor:
        config = self.config
        heads = (-1, config.head_dim)
        q, k, v = (part.unflatten(-1, heads) for part in products(self.projections, x))
        rotary = (config.mrope_section, config.rope_theta, config.rotary_dim)
        if torch.is_grad_enabled():
            q, k = rope_3d(q, k, position_ids, *rotary)
        else:
            rope_3d_(q, k, position_ids, *rotary)
        return self.o_proj(attend(layer, q, k, v).flatten(1))


class Layer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        c, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = Mlp(c, config.intermediate_size)
        self.input_layernorm = RMSNorm(c, eps)
        self.post_self_attn_layernorm = RMSNorm(c, eps)
        self.post_attention_layernorm = RMSNorm(c, eps)
        self.post_mlp_layernorm = RMSNorm(c, eps)

    def forward(self, x: Tensor, position_ids: Tensor, layer: int, attend: Attend) -> Tensor:
        after, eps = self.post_self_attn_layernorm, self.post_self_attn_layernorm.eps
        x = rms_norm_add(self.self_attn(self.input_layernorm(x), position_ids, layer, attend), x, after.weight, eps)
        after = self.post_mlp_layernorm
        return rms_norm_add(self.mlp(self.post_attention_layernorm(x)), x, after.weight, eps)


class LanguageModel(nn.Module):
    """Embedding, decoder layers and last norm; the head is `Glm4v`'s."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.recompute = False  # see Glm4v.recompute_activations
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,  # [T, C], dtype of the weights
        position_ids: Tensor,  # [3, T], integers
        cu_seqlens: Tensor,  # int32 [N + 1]
        max_seqlen: int,
        cache: KVCache | None = None,  # N rows, empty but for a single one
        keys: Keys | None = None,  # by default each sequence's own
    ) -> Tensor:
        """Hidden states ``[T, C]`` after the last norm. A cache receives the keys and values of every token."""
        ends, longest = cu_seqlens, max_seqlen  # of the keys
        past = cache if cache is not None and cache.used else None
        if cache is not None:
            rows, slots = cache.start(cu_seqlens, max_seqlen, x.shape[0])
        if past is not None:
            ends, longest = F.pad(past.seqlens, (1, 0)), past.used
        if keys is not None:
            ends, longest = keys.cu_seqlens, keys.longest

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                cache.write(layer, k, v, rows, slots)
            if past is not None:
                k, v = (kept[layer][0, :longest].to(q.dtype) for kept in (past.k, past.v))
            if keys is not None:  # a prefix's keys and values are copied to each sequence: cheap, beside its layers
                k, v = k.index_select(0, keys.rows), v.index_select(0, keys.rows)
            return flash_attn_varlen_func(q, k, v, cu_seqlens, ends, max_seqlen, longest, causal=True)

        return self._run(x, position_ids, attend)

    def decode(self, x: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """One more token per cache row: ``x [B, C]``, ``position_ids [3, B]`` to hidden states ``[B, C]``.

        The caller has reserved its room: nothing here has an effect on the host.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_attn_with_kvcache(
                q[:, None],
                cache.k[layer],
                cache.v[layer],
                k[:, None],
                v[:, None],
                cache_seqlens=cache.seqlens,
                block_table=cache.block_table,
                causal=True,
            )
            return out[:, 0]

        hidden = self._run(x, position_ids, attend)
        cache.seqlens += 1
        return hidden

    def _run(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = run(layer, self.recompute, x, position_ids, i, attend)
        return self.norm(x)
