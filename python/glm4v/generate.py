"""Answers from a model: prefill once, then one token per request and step, until every request has ended.

Prompts of different lengths stand packed in one batch, without padding, and share one cache that is written in place. A
request that ends leaves the batch, so that a step costs what the remaining ones need. Each request owns its random
stream: what it says doesn't depend on its neighbours.
Dims: N requests, B those still running, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from .answer import CLOSE_THINK, OPEN_ANSWER, OPEN_THINK, FinishReason, Generation, separate
from .detokenize import TextStream
from .kinds import is_list, is_whole
from .prompt_cache import PromptCache
from .sampling import Sampler, Sampling, Seed, expect, log_probability, streams


class Model(Protocol):
    """What generation asks of a model: `Glm4v`, or the tests' mock."""

    config: Any  # .vision_token_ids, .text_config.max_position_embeddings
    generation_config: Any  # the content of generation_config.json

    @property
    def processor(self) -> Any: ...  # messages -> batch; .tokenizer

    def new_cache(self, batch_size: int, capacity: int) -> Any: ...  # with .select(rows, used)

    def prefill(self, batch: Any, cache: Any) -> Tensor: ...  # logits [N, V] of what follows

    def decode(self, input_ids: Tensor, position_ids: Tensor, cache: Any) -> Tensor: ...  # [B], [3, B] -> [B, V]


@dataclass(frozen=True)
class Piece:
    """One token of one request, as it comes.

    Args:
        index: which request.
        token_id: the token.
        text: what the token adds to the request's text: whole characters, often none. The texts of a request's pieces
            make up its ``Generation.text``.
        generation: the whole answer, in the last piece of a request.
    """

    index: int
    token_id: int
    text: str
    generation: Generation | None = None


@dataclass(frozen=True)
class Settings:
    """What `stream` was asked for, over a checkpoint's defaults: all that can be checked before there is a prompt."""

    sampling: Sampling
    max_new_tokens: int
    stop_strings: list[str]
    stop_ids: frozenset[int]

    @classmethod
    def read(
        cls,
        defaults: Mapping[str, Any],
        max_new_tokens: int = 4096,
        stop: str | int | Sequence[str | int] = (),
        thinking_budget: int | None = None,
        **sampling: float | None,
    ) -> Settings:
        """``defaults`` is the content of a ``generation_config.json``.

        Raises:
            InputError: a setting is of another kind or out of range; the text names it.
        """
        stops, eos = _list(stop), defaults.get("eos_token_id")
        known = [] if eos is None else _list(eos)
        expect(is_whole(max_new_tokens), "max_new_tokens", "a whole number", repr(max_new_tokens))
        expect(max_new_tokens >= 1, "max_new_tokens", "1 or more", max_new_tokens)
        ok = all((one and isinstance(one, str)) or is_whole(one) for one in stops)
        expect(ok, "stop", "strings of one character or more and token ids", stops)
        ok = thinking_budget is None or is_whole(thinking_budget)
        expect(ok, "thinking_budget", "a whole number or None", repr(thinking_budget))
        expect(thinking_budget is None or thinking_budget >= 0, "thinking_budget", "0 or more", thinking_budget)
        expect(all(map(is_whole, known)), "the checkpoint's eos_token_id", "a token id or a list of them", repr(eos))
        return cls(
            sampling=Sampling.from_defaults(defaults, **sampling),
            max_new_tokens=max_new_tokens,
            stop_strings=[one for one in stops if isinstance(one, str)],
            stop_ids=frozenset(one for one in (*known, *stops) if not isinstance(one, str)),
        )


def stream(
    model: Model,
    prompt: Any,
    max_new_tokens: int = 4096,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[Seed] | None = None,
    stop: str | int | Sequence[str | int] = (),
    thinking_budget: int | None = None,
    logprobs: bool = False,
    allow_vision_ids: bool = False,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Piece]:
    """Answers as they come, one `Piece` per token; the requests of a batch take turns.

    Args:
        model: the model (this is a method of `Glm4v`).
        prompt: a `Batch`, or messages, or a list of those, which go through the model's processor.
        max_new_tokens: the most tokens of one answer, thinking and forced tokens included.
        temperature, top_p, top_k, min_p, repetition_penalty: see `Sampling`. What is None comes from the checkpoint's
            ``generation_config.json``; temperature 0 takes the likeliest token.
        seed: request i draws from numpy's ``default_rng((seed, i))``, or from ``default_rng(seed[i])`` where one seed
            per request is given (an int or a tuple); None draws differently each time.
        stop: strings that end an answer, the text is cut before them; and token ids, beside the checkpoint's own.
        thinking_budget: after so many tokens of thinking, ``</think><answer>`` is put in the model's mouth. The opening
            ``<think>`` doesn't count; 0 turns thinking off.
        logprobs: also return the log probability of each token (see `Generation`).
        allow_vision_ids: let the six tokens of pictures and their borders be chosen, which a prompt cannot hold again.
        prompt_cache: reads only what is new since the last call with it, of a single request.

    Raises:
        InputError: a setting is of another kind or out of range, or the prompt leaves no room in the context.
    """
    settings = Settings.read(
        model.generation_config,
        max_new_tokens=max_new_tokens,
        stop=stop,
        thinking_budget=thinking_budget,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    for name, flag in (("logprobs", logprobs), ("allow_vision_ids", allow_vision_ids)):
        expect(isinstance(flag, bool), name, "True or False", repr(flag))
    batch = prompt if isinstance(prompt, Mapping) and "input_ids" in prompt else model.processor(prompt)
    for name in ("cu_seqlens", "position_ids"):
        expect(name in batch, "a batch", f"one with {name}", list(batch))
    starts = batch["cu_seqlens"].tolist()
    prompts = [batch["input_ids"][a:b] for a, b in pairwise(starts)]
    expect(len(prompts) > 0, "prompt", "one request or more", len(prompts))
    expect(isinstance(prompt_cache, PromptCache | None), "prompt_cache", "a PromptCache or None", repr(prompt_cache))
    expect(prompt_cache is None or len(prompts) == 1, "prompt", "one request with a prompt_cache", len(prompts))
    positions = [batch["position_ids"][:, a:b] for a, b in pairwise(starts)]
    context, tokenizer = model.config.text_config.max_position_embeddings, model.processor.tokenizer

    def encode(tag: str) -> list[int]:
        return tokenizer.encode(tag, add_special_tokens=False).ids

    requests = []
    for i, ids in enumerate(prompts):
        expect(0 < len(ids) < context, f"prompt {i}", f"of 1 to {context - 1} tokens, for the context", len(ids))
        request = _Request(
            index=i,
            prompt_tokens=len(ids),
            next_position=int(positions[i].max()) + 1,
            limit=min(settings.max_new_tokens, context - len(ids)),
            stop_ids=settings.stop_ids,
            text=TextStream(tokenizer, settings.stop_strings),
            thinking=ThinkingBudget(thinking_budget, ids.tolist(), encode),
        )
        requests.append(request)
    banned = () if allow_vision_ids else model.config.vision_token_ids
    sampler = Sampler(settings.sampling, streams(seed, len(prompts)), banned, prompts)
    return _run(model, batch, requests, sampler, logprobs, prompt_cache)


def generate(
    model: Model,
    prompt: Any,
    max_new_tokens: int = 4096,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[Seed] | None = None,
    stop: str | int | Sequence[str | int] = (),
    thinking_budget: int | None = None,
    logprobs: bool = False,
    allow_vision_ids: bool = False,
    prompt_cache: PromptCache | None = None,
) -> list[Generation]:
    """Answers, one per request. Arguments and errors as in `stream`."""
    pieces = stream(
        model,
        prompt,
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        seed,
        stop,
        thinking_budget,
        logprobs,
        allow_vision_ids,
        prompt_cache,
    )
    done = {piece.index: piece.generation for piece in pieces if piece.generation is not None}
    return [done[i] for i in range(len(done))]


@torch.inference_mode()
def _run(
    model: Model,
    batch: Any,
    running: list[_Request],
    sampler: Sampler,
    logprobs: bool,
    prompt_cache: PromptCache | None,
) -> Iterator[Piece]:
    capacity = max(request.prompt_tokens + request.limit for request in running)
    if prompt_cache is None:
        cache = model.new_cache(len(running), capacity)
        logits = model.prefill(batch, cache)
    else:
        cache, logits = prompt_cache.prefill(model, batch, capacity)
        call = prompt_cache.calls
    while True:
        forced = [request.thinking.forced_token(request.token_ids) for request in running]
        tokens = sampler.choose(logits, forced)
        chosen = tokens.tolist()
        likely = log_probability(logits, tokens).tolist()  # always: it also tells of broken logits
        for request, token, logprob, force in zip(running, chosen, likely, forced, strict=True):
            text = request.accept(token, logprob, force is not None)
            yield Piece(request.index, token, text, request.generation(logprobs))
        rows = [row for row, request in enumerate(running) if request.finish_reason is None]
        if not rows:
            return
        if len(rows) < len(running):
            running = [running[row] for row in rows]
            sampler.keep(rows)
            kept = torch.tensor(rows, device=logits.device)
            tokens = tokens[kept]
            cache.select(kept, max(request.prompt_tokens + len(request.token_ids) for request in running) - 1)
        if prompt_cache is not None:
            expect(prompt_cache.calls == call, "prompt_cache", "one answer's at a time", "another call before its end")
        positions = torch.tensor([request.position for request in running], device=logits.device)
        logits = model.decode(tokens, positions.repeat(3, 1), cache)
        if prompt_cache is not None:
            prompt_cache.append(chosen[0], running[0].position)


class ThinkingBudget:
    """Ends the thinking of one request when it has become long enough.

    Thinking is what stands before ``</think>`` or ``<answer>``; an opening ``<think>`` doesn't count. The ending is
    well-formed: where nothing was said yet and the template hasn't opened the thinking, ``<think>`` comes first.
    """

    def __init__(self, budget: int | None, prompt: list[int], encode: Callable[[str], list[int]]) -> None:
        self.budget = budget
        self._open, self._close, self._answer = encode(OPEN_THINK), encode(CLOSE_THINK), encode(OPEN_ANSWER)
        self.opened = _ends(prompt, self._open) or _ends(prompt[:-1], self._open)  # a line may end after the tag
        self._next: list[int] = []

    def forced_token(self, token_ids: list[int]) -> int | None:
        """The token that must come after ``token_ids``, if any. To be asked once per token."""
        if self.budget is not None:
            if _ends(token_ids, self._close) or _ends(token_ids, self._answer):
                self.budget = None
            elif len(token_ids) - len(self._open) * (token_ids[: len(self._open)] == self._open) >= self.budget:
                self.budget = None
                unopened = [] if token_ids or self.opened else self._open
                self._next = [*unopened, *self._close, *self._answer]
        return self._next.pop(0) if self._next else None


@dataclass
class _Request:
    """What one answer has come to."""

    index: int
    prompt_tokens: int
    next_position: int  # of the first new token
    limit: int
    stop_ids: frozenset[int]
    text: TextStream
    thinking: ThinkingBudget
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def position(self) -> int:
        """Where the latest token stands, along all three axes."""
        return self.next_position + len(self.token_ids) - 1

    def accept(self, token: int, logprob: float, forced: bool) -> str:
        """Takes the next token in and returns the text that it settles."""
        if not (forced or math.isfinite(logprob)):
            at = f"request {self.index}, token {len(self.token_ids)}"
            raise RuntimeError(f"generate: logits must be finite, got NaN or infinity ({at}); are the weights whole?")
        if forced:
            self.forced.append(len(self.token_ids))
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        ends = token in self.stop_ids
        text = "" if ends else self.text.push(token)
        if ends or self.text.stopped:
            self.finish_reason = "budget" if self.forced else "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self.text.finish()
        self.pieces.append(text)
        return text

    def generation(self, logprobs: bool) -> Generation | None:
        """The whole answer, once it has ended."""
        if self.finish_reason is None:
            return None
        text = "".join(self.pieces)
        parts = separate(OPEN_THINK + text if self.thinking.opened else text, ended=self.finish_reason != "length")
        return Generation(
            text=text,
            thinking=parts.thinking,
            answer=parts.answer,
            box=parts.box,
            token_ids=self.token_ids,
            prompt_tokens=self.prompt_tokens,
            finish_reason=self.finish_reason,
            forced=self.forced,
            logprobs=self.logprobs if logprobs else None,
        )


def _ends(ids: list[int], tag: list[int]) -> bool:
    return ids[-len(tag) :] == tag


def _list(value: Any) -> list[Any]:
    return list(value) if is_list(value) or isinstance(value, Set) else [value]
