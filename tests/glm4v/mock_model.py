"""A model without weights and a tokenizer of single bytes: what generation needs, and nothing else.

After nanochat's tests of its engine. The mock checks the engine's side of the bargain: positions, cache rows, lengths.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|end|>", "<|image|>", "<|video|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>"]


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


class MockCache:
    def __init__(self, batch_size: int, capacity: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.capacity = capacity
        self.batch_sizes: list[int] = []  # of each decode step

    def select(self, rows: torch.Tensor, used: int) -> None:
        self.rows = [list(self.rows[row]) for row in rows.tolist()]
        assert max(map(len, self.rows)) == used


class MockProcessor:
    """Texts to a packed batch; the last position of each is moved on by ``position_gap``, as pictures do."""

    def __init__(self, position_gap: int) -> None:
        self.tokenizer = byte_tokenizer()
        self.position_gap = position_gap

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        ids = [self.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        ends = torch.tensor([len(one) for one in ids]).cumsum(0)
        positions = torch.cat([torch.arange(len(one)) for one in ids]).repeat(3, 1)
        positions[1:, ends - 1] += self.position_gap
        return {
            "input_ids": torch.tensor([token for one in ids for token in one]),
            "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)).int(),
            "position_ids": positions,
        }


class MockModel:
    """Logits are a function of the tokens so far: those of ``say``, or else noise that depends on the tokens.

    Args:
        say: by prompt, the text that is likeliest to follow.
        max_positions: the context.
        position_gap: see `MockProcessor`.
    """

    def __init__(self, say: dict[str, str] | None = None, max_positions: int = 4096, position_gap: int = 0) -> None:
        self.processor = MockProcessor(position_gap)
        self.tokenizer = self.processor.tokenizer
        self.vocab = self.tokenizer.get_vocab_size() + 5  # padded, as the released one
        self.say = {tuple(self.encode(prompt)): self.encode(text) for prompt, text in (say or {}).items()}
        self.config = SimpleNamespace(
            vision_token_ids=tuple(map(self.tokenizer.token_to_id, SPECIAL[1:])),
            text_config=SimpleNamespace(max_position_embeddings=max_positions),
        )
        self.generation_config: dict = {"eos_token_id": [self.id("<|end|>"), self.id("</answer>")]}
        self.position_gap = position_gap

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def id(self, token: str) -> int:
        return self.tokenizer.token_to_id(token)

    def new_cache(self, batch_size: int, capacity: int) -> MockCache:
        self.cache = MockCache(batch_size, capacity)
        return self.cache

    def prefill(self, batch, cache: MockCache) -> torch.Tensor:
        starts = batch["cu_seqlens"].tolist()
        cache.rows = [batch["input_ids"][a:b].tolist() for a, b in pairwise(starts)]
        return self.logits(cache)

    def decode(self, input_ids, position_ids, cache: MockCache) -> torch.Tensor:
        assert len(input_ids) == len(cache.rows) == position_ids.shape[1]
        cache.batch_sizes.append(len(input_ids))
        expected = [len(row) + self.position_gap for row in cache.rows]
        assert position_ids.tolist() == [expected] * 3
        for row, token in zip(cache.rows, input_ids.tolist(), strict=True):
            row.append(token)
            assert len(row) <= cache.capacity
        return self.logits(cache)

    def logits(self, cache: MockCache) -> torch.Tensor:
        return torch.stack([self.row_logits(row) for row in cache.rows])

    def row_logits(self, row: list[int]) -> torch.Tensor:
        for prompt, text in self.say.items():
            if tuple(row[: len(prompt)]) == prompt:
                said = row[len(prompt) :]
                following = [*text, self.id("<|end|>")]
                likeliest = following[min(len(said), len(following) - 1)]
                return torch.nn.functional.one_hot(torch.tensor(likeliest), self.vocab) * 30.0
        generator = torch.Generator().manual_seed(hash(tuple(row)) % 2**31)
        return 2 * torch.randn(self.vocab, generator=generator)
