"""Keys and values of the tokens seen so far, written in place.

One row per sequence; rows have different lengths and share one capacity, given up front. The decode step appends inside
the attention op, so that the cache is never copied while tokens come.
Dims: B rows, S capacity, K kv heads, D head dim, T prompt tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig
from .positions import sequence_ids


class KVCache:
    """``k[layer]`` and ``v[layer]`` are ``[B, S, K, D]``; ``seqlens [B]`` int32 counts the tokens that each row holds.

    ``used`` bounds the longest row from the host, so that a full cache is noticed without asking the device.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.capacity = capacity
        self.used = 0

    @property
    def batch_size(self) -> int:
        return self.seqlens.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))

    def reserve(self, tokens: int) -> None:
        """Claims room for ``tokens`` more in the longest row; an error names what is missing."""
        if self.used + tokens > self.capacity:
            raise ValueError(f"cache: capacity must be at least {self.used + tokens}, got {self.capacity}")
        self.used += tokens

    def start(self, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Takes in N = B prompts of T tokens together: row and slot of each token, ``[T]`` each."""
        if self.used or cu_seqlens.shape[0] != self.batch_size + 1:
            sequences = cu_seqlens.shape[0] - 1
            expectation, found = f"empty and of {sequences} rows", f"{self.used} tokens in {self.batch_size} rows"
            raise ValueError(f"cache: the cache of a prefill must be {expectation}, got {found}")
        self.reserve(max_seqlen)
        self.seqlens.copy_(cu_seqlens.diff())
        rows = sequence_ids(cu_seqlens, tokens)
        return rows, torch.arange(tokens, device=rows.device) - cu_seqlens[rows]

    def write(self, layer: int, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Stores packed ``k, v [T, K, D]`` at ``(rows, slots)``, each ``[T]``. Autocast's dtype may be another."""
        self.k[layer][rows, slots] = k.to(self.k[layer].dtype)
        self.v[layer][rows, slots] = v.to(self.v[layer].dtype)

    def select(self, rows: Tensor) -> None:
        """Keeps ``rows`` (indices ``[B']``, repeats allowed), in that order.

        Drops finished sequences, reorders, or shares one prompt's prefill among several continuations. One layer is
        copied at a time. ``used`` keeps its value: it stays a bound.
        """
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(len(rows), *old.shape[1:])
                tensors[layer][:, : self.used] = old[:, : self.used][rows]  # memory beyond stays untouched
        self.seqlens = self.seqlens.index_select(0, rows)
