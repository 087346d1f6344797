"""Keys and values of the tokens seen so far, written in place.

`KVCache` has one row per sequence; rows have different lengths and share one capacity, given up front. `PagedCache` has
pages, of which sequences own some and share others. The decode step appends inside the attention op, so that nothing is
copied while tokens come.
Dims: B rows, S capacity, K kv heads, D head dim, T prompt tokens, M pages of the longest sequence.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from glm4v_ext import Replayed

from .config import TextConfig
from .positions import sequence_ids


class KVCache:
    """``k[layer]`` and ``v[layer]`` are ``[B, S, K, D]``; ``seqlens [B]`` int32 counts the tokens that each row holds.

    ``used`` bounds the longest row from the host, so that a full cache is noticed without asking the device.
    """

    block_table: Tensor | None = None  # rows are not made of pages

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
        self._replayed: Replayed | None = None

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
        """Takes in N = B prompts of T tokens together: row and slot of each token, ``[T]`` each. A single row may hold
        tokens already, which come before."""
        sequences, past = cu_seqlens.shape[0] - 1, self.used
        if (past and self.batch_size > 1) or sequences != self.batch_size:
            expectation, found = f"empty and of {sequences} rows", f"{past} tokens in {self.batch_size} rows"
            raise ValueError(f"cache: the cache of a prefill must be {expectation}, got {found}")
        self.reserve(max_seqlen)
        self.seqlens.copy_(cu_seqlens.diff() + past)
        rows, slots = token_slots(cu_seqlens, tokens)
        return rows, slots + past

    def write(self, layer: int, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Stores packed ``k, v [T, K, D]`` at ``(rows, slots)``, each ``[T]``. Autocast's dtype may be another."""
        self.k[layer][rows, slots] = k.to(self.k[layer].dtype)
        self.v[layer][rows, slots] = v.to(self.v[layer].dtype)

    def rewind(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` of each row."""
        self.used = tokens
        self.seqlens.fill_(tokens)

    def grow(self, capacity: int) -> None:
        """Makes room for ``capacity`` tokens a row; what is held is copied, one layer at a time."""
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                new = old.new_empty(old.shape[0], capacity, *old.shape[2:])
                new[:, : self.used] = old[:, : self.used]
                tensors[layer] = new
        self.capacity = capacity
        self._replayed = None  # its addresses are no more

    def replayed(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The decode step on this cache, the same at every call, as a GPU may replay it; it must not keep the cache."""
        if self._replayed is None:
            self._replayed = Replayed(step)
        return self._replayed

    def select(self, rows: Tensor, used: int | None = None) -> None:
        """Keeps ``rows`` (indices ``[B']``, repeats allowed), in that order.

        Drops finished sequences, reorders, or shares one prompt's prefill among several continuations. One layer is
        copied at a time. ``used`` keeps its value, which stays a bound, unless the caller knows a lower one.
        """
        self.used = self.used if used is None else used
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(len(rows), *old.shape[1:])
                tensors[layer][:, : self.used] = old[:, : self.used][rows]  # memory beyond stays untouched
        self.seqlens = self.seqlens.index_select(0, rows)
        self._replayed = None  # its addresses are no more


class PagedCache(KVCache):
    """``k[layer]`` and ``v[layer]`` are ``[pages, page_size, K, D]``; whoever owns it deals out the pages.

    Before each prefill or decode step the owner tells, by `hold`, which sequences take part. Sequences may share pages
    and go on in pages of their own: only the page that holds the next token is written.

    Args:
        page_size: tokens of a page, a multiple of 16.
    """

    def __init__(
        self,
        config: TextConfig,
        pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, pages, page_size, dtype, device)
        self.page_size = page_size
        self._recordings: dict[int, Replayed] = {}  # by number of sequences

    def hold(self, block_table: Tensor, seqlens: Tensor) -> None:
        """Sequences of the next step: the pages of each in order ``[B, M]``, and the tokens that it holds ``[B]``."""
        self.block_table, self.seqlens = block_table, seqlens

    def reserve(self, tokens: int) -> None:
        """Nothing: the op itself tells of a sequence without a page for its next token."""

    def start(self, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Takes in the N = B prompts that `hold` announced: page and slot of each token, ``[T]`` each."""
        assert self.block_table is not None
        rows, slots = token_slots(cu_seqlens, tokens)
        return self.block_table[rows, slots // self.page_size], slots % self.page_size

    def replayed(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """As of any cache; what `hold` has told goes in with the tokens, and each number of sequences is recorded."""
        kept = weakref.ref(self)  # which holds the recordings

        def held(input_ids: Tensor, position_ids: Tensor, block_table: Tensor, seqlens: Tensor) -> Tensor:
            cache = kept()
            assert cache is not None
            cache.hold(block_table, seqlens.clone())  # the step adds its token to them
            return step(input_ids, position_ids)

        def run(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            block_table, seqlens = self.block_table, self.seqlens
            assert block_table is not None
            recording = self._recordings.setdefault(len(seqlens), Replayed(held))
            out = recording(input_ids, position_ids, block_table, seqlens)
            self.hold(block_table, seqlens + 1)
            return out

        return run

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Whole pages onto others; both ``[n]``."""
        for tensor in (*self.k, *self.v):
            tensor[target] = tensor[source]

    def select(self, rows: Tensor, used: int | None = None) -> None:
        """Refused: rows of this cache are pages, and `hold` says which sequences take part."""
        raise TypeError("cache: select must be asked of a cache with a row for each sequence, got one of pages")


def token_slots(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequence of each of T packed tokens, and its place in it."""
    rows = sequence_ids(cu_seqlens, tokens)
    return rows, torch.arange(tokens, device=rows.device) - cu_seqlens[rows]
