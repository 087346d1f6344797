"""From logits to one token per row: penalty, bans, temperature, the three cuts, and each request's own random stream.

Semantics and order are transformers': repetition penalty, bans, temperature, top-k, top-p, min-p. A row's token depends
on that row and on its own stream alone. It is drawn by inverting the distribution function in float64, in the order of
the ids: logits that differ in the last bits, as they do between batch sizes, then move the borders between tokens by
as little, whereas an order by probability would swap neighbours.
Dims: B rows, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .kinds import is_list, is_number, is_whole

Seed = int | Sequence[int]  # what numpy's default_rng takes
LEAST, MOST = 1e-6, 1e6  # of what divides logits: far beyond, float32 knows only zero and infinity


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults choose the likeliest token.

    Args:
        temperature: divides the logits, 1e-6 to 1e6; 0 takes the likeliest token, whatever the cuts say.
        top_p: keeps the likeliest tokens that reach this probability together; 1 keeps all.
        top_k: keeps that many of the likeliest tokens; 0 keeps all.
        min_p: keeps tokens with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: for tokens in prompt and answer, divides positive logits, multiplies negative ones; 1e-6 to
            1e6.

    Raises:
        InputError: a value is of another kind or out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "top_k":
                expect(is_whole(value), f.name, "a whole number", value)
            else:
                expect(is_number(value), f.name, "a number", value)
        usual = LEAST <= self.temperature <= MOST
        expect(usual or self.temperature == 0, "temperature", "0 or from 1e-6 to 1e6", self.temperature)
        expect(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        expect(self.top_k >= 0, "top_k", "0 or more", self.top_k)
        expect(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        usual = LEAST <= self.repetition_penalty <= MOST
        expect(usual, "repetition_penalty", "from 1e-6 to 1e6", self.repetition_penalty)

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, Any], **given: float | None) -> Sampling:
        """What is given, and for the rest what a checkpoint's ``generation_config.json`` says.

        One that samples means transformers' temperature 1 and top_k 50 where it names none.
        """
        known = {f.name: defaults[f.name] for f in fields(cls) if defaults.get(f.name) is not None}
        sample = defaults.get("do_sample") or False
        expect(isinstance(sample, bool), "the checkpoint's do_sample", "true or false", repr(sample))
        if not sample:
            known["temperature"] = 0.0
        else:  # what such a file leaves out is what transformers takes then, and leaves out when it writes one
            known = {"temperature": 1.0, "top_k": 50, **known}
        wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        cls(**wanted)  # what is wrong with these is the caller's fault, what is wrong beside them the file's
        try:
            return cls(**{**known, **wanted})
        except InputError as error:
            raise InputError(f"{error} (the checkpoint's generation_config.json)") from None


def streams(seed: int | Sequence[Seed] | None, requests: int) -> list[np.random.Generator]:
    """One random stream per request: of ``(seed, i)``, or of ``seed[i]``, or fresh ones where the seed is None."""
    if seed is None:
        return [np.random.default_rng() for _ in range(requests)]
    if is_whole(seed):
        expect(seed >= 0, "seed", "0 or more", seed)
        return [np.random.default_rng((int(seed), i)) for i in range(requests)]
    given = list(seed) if is_list(seed) else [seed]
    parts = [part for one in given for part in (one if is_list(one) and len(one) else [one])]
    expect(all(is_whole(part) and part >= 0 for part in parts), "seed", "whole numbers of 0 or more", repr(seed))
    expect(len(given) == requests, "seed", f"an int or one per request ({requests})", f"{len(given)} of them")
    return [np.random.default_rng(one) for one in given]


class Sampler:
    """Chooses the next token of every row.

    Args:
        sampling: how.
        streams: of the B rows.
        banned: ids that are never chosen.
        prompts: token ids of each row's prompt, which the repetition penalty counts.
    """

    def __init__(
        self,
        sampling: Sampling,
        streams: Sequence[np.random.Generator],
        banned: Sequence[int],
        prompts: Sequence[Tensor],
    ) -> None:
        self.sampling = sampling
        self.streams = list(streams)
        self.banned = torch.tensor(list(banned), dtype=torch.long, device="cpu")
        self.prompts = list(prompts)
        self.seen: Tensor | None = None  # bool [B, V], made when the first logits tell V

    def choose(self, logits: Tensor, forced: Sequence[int | None]) -> Tensor:
        """Token ids ``[B]`` for ``logits [B, V]``; a row with a forced token takes that, and draws nothing."""
        scores = logits.float()
        if self.sampling.repetition_penalty != 1:
            scores = penalized(scores, self._seen(scores), self.sampling.repetition_penalty)
        scores = scores.index_fill(1, self.banned.to(scores.device), -math.inf)
        if self.sampling.temperature == 0:
            tokens = scores.argmax(-1)
        else:
            draws = [s.random() if f is None else 0.0 for s, f in zip(self.streams, forced, strict=True)]
            uniform = torch.tensor(draws, dtype=torch.float64, device=scores.device)
            tokens = draw(cut(scores / self.sampling.temperature, self.sampling), uniform)
        for row, token in enumerate(forced):
            if token is not None:
                tokens[row] = token
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some of the rows."""
        self.streams = [self.streams[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[list(rows)]

    def _seen(self, scores: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.zeros_like(scores, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):
                self.seen[row, prompt.long()] = True
        return self.seen


def penalized(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens of ``seen [B, V]`` less likely (for a penalty above 1)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def cut(scores: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, top-p and min-p: ``scores [B, V]`` with -inf for what falls away.

    Each cut is a lowest score that may stay, so that equal scores stay or go together.
    """
    floor = scores.new_full((len(scores), 1), -math.inf)
    if 0 < sampling.top_k < scores.shape[1]:
        floor = scores.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p < 1:
        candidates = int((~(scores < floor)).sum(-1).max())  # NaN counts: broken logits pass through, to be noticed
        best = scores.topk(candidates).values  # [B, candidates], falling
        best = best.masked_fill(best < floor, -math.inf)
        probability = best.softmax(-1)
        before = probability.cumsum(-1) - probability
        stays = before < sampling.top_p
        stays[:, 0] = True  # the least top_p is 0 in float32
        floor = torch.maximum(floor, best.masked_fill(~stays, math.inf).amin(-1, keepdim=True))
    if sampling.min_p > 0:
        floor = torch.maximum(floor, scores.amax(-1, keepdim=True) + math.log(sampling.min_p))
    return scores.masked_fill(scores < floor, -math.inf)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Token ids ``[B]`` of ``softmax(scores [B, V])`` at ``uniform [B]``, float64 in [0, 1)."""
    reached = scores.double().softmax(-1).cumsum(-1)
    reached = reached / reached[:, -1:]  # ends at exactly 1, above every draw
    return torch.searchsorted(reached, uniform[:, None], right=True)[:, 0].clamp_(max=scores.shape[1] - 1)


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """``log softmax(logits [B, V])`` of ``tokens [B]``, float32 ``[B]``: no temperature, penalty, ban or cut."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def expect(ok: bool, name: str, expectation: str, actual: object) -> None:
    """An `InputError` that names a setting, unless ``ok``."""
    if not ok:
        raise InputError(f"generate: {name} must be {expectation}, got {actual}")
