"""Answers for reinforcement learning: G of each prompt, as fast as the model can say them.

A prompt is read once. Its continuations share the pages that hold its keys and values; each owns the pages of its own
tokens. All answers of a call are numbered i * G + g, and what is known of them lies in arrays by that number, on the
host: a step uploads one small array, downloads one, and a change of who is running is a change of index. When answers
end, their rows go to those that wait; prompts are read in packs, ahead of need.
Dims: N prompts, G answers each, A = N * G, B answers that run, L tokens of the longest answer, V vocab, M pages.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glm4v import Glm4v
from glm4v.answer import FinishReason
from glm4v.detokenize import token_bytes
from glm4v.generate import Settings
from glm4v.kinds import is_list, is_whole
from glm4v.sampling import Sampling, cut

from .bounds import TOKENS
from .budgets import Budgets
from .pages import Pages
from .prompts import Prompt, packed

STEP = 16  # rows: batches grow and shrink by as many, since libraries prepare a product for each new size
GPU_STEP = 64  # of larger batches on a GPU, where more rows cost little and each size is recorded
PACK = 8192  # tokens of the prompts that are read together


class NotFinite(RuntimeError):
    """The model gives NaN or infinity."""


@dataclass(frozen=True)
class RolloutSettings:
    """How answers are made.

    Args:
        max_new_tokens: the most tokens of one answer, thinking and forced tokens included.
        thinking_budget: after so many tokens of thinking, ``</think><answer>`` is put in the model's mouth (forced
            answering); None never does. As in `Glm4v.generate`.
        random_budgets: (least, most): each answer draws its own budget from this range, both ends included.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: samples from the likeliest tokens that reach this probability together; 1, as the paper has it, from all.
        rows: the most answers that are continued together.
        cache_tokens: the most tokens that the cache holds, or None for as many as ``rows`` answers may need. Fewer rows
            run where they don't fit.
    """

    max_new_tokens: int = 64
    thinking_budget: int | None = None
    random_budgets: tuple[int, int] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    rows: int = 512
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("rows", 1), ("thinking_budget", 0), ("cache_tokens", 1)):
            value = getattr(self, name)
            optional = name in ("thinking_budget", "cache_tokens")
            ok = (optional and value is None) or (is_whole(value) and value >= least)
            _expect(ok, name, f"a whole number of {least} or more{' or None' * optional}", repr(value))
            _expect(value is None or value <= TOKENS, name, f"at most {TOKENS}", value)
        budgets = self.random_budgets
        ok = budgets is None or (is_list(budgets) and len(budgets) == 2 and all(map(is_whole, budgets)))
        ok = ok and (budgets is None or 0 <= budgets[0] <= budgets[1] <= TOKENS)
        _expect(ok, "random_budgets", f"(least, most), 0 <= least <= most <= {TOKENS}, or None", repr(budgets))
        both = self.thinking_budget is not None and budgets is not None
        _expect(not both, "random_budgets", "None where thinking_budget is given", repr(budgets))
        Sampling(self.temperature, self.top_p)

    def expect_for_evaluation(self, whose: str) -> None:
        """Raises ValueError for what evaluations, sampled as they are and greedy, would not heed."""
        for name in ("temperature", "top_p"):
            if (value := getattr(self, name)) != 1:
                raise ValueError(f"{whose}: rollout.{name} must be 1, as sampled answers have it, got {value}")


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer, token by token.

    Attributes:
        token_ids: ``[L]`` int64, the stop token included.
        logprobs: ``[L]`` float32: log softmax(logits / temperature) over the whole vocabulary, banned ids included,
            which is what training recomputes; 0 where a token was inserted. Temperature 0 counts as 1.
        sampled: ``[L]`` bool, False where a token was inserted.
        text: without the stop token; tags are part of it.
        finish_reason: ``stop`` for a stop token, ``budget`` for one behind a forced end of thinking, ``length``.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    sampled: np.ndarray
    text: str
    finish_reason: FinishReason


@dataclass
class Statistics:
    """What a call has done so far.

    Attributes:
        answers: ended answers.
        forced: those whose thinking was ended by the budget.
        tokens: of all answers, inserted ones included.
        forced_tokens: inserted ones.
        prefills: packs of prompts read.
        prefill_tokens: prompt tokens read.
        steps: decoding steps.
        row_steps: answers continued, summed over the steps.
        prefill_s, decode_s: seconds spent in each, first tokens and all bookkeeping included.
    """

    answers: int = 0
    forced: int = 0
    tokens: int = 0
    forced_tokens: int = 0
    prefills: int = 0
    prefill_tokens: int = 0
    steps: int = 0
    row_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Rollouts:
    """Iterates over ``(prompt index, its G answers)``, each as soon as the group is complete. See `rollouts`."""

    def __init__(
        self,
        model: Glm4v,
        prompts: Sequence[Prompt],
        group: int,
        seeds: Sequence[Sequence[int]],
        settings: RolloutSettings,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        context, tokenizer = model.config.text_config.max_position_embeddings, model.processor.tokenizer
        _expect(is_whole(group) and group >= 1, "group", "a whole number of 1 or more", repr(group))
        _expect(len(seeds) == len(prompts), "seeds", f"one per prompt ({len(prompts)})", f"{len(seeds)} of them")
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            ok = 0 < len(prompt) < context
            _expect(ok, f"prompt {i}", f"of 1 to {context - 1} tokens, for the context", len(prompt))
            ok = len(seed) > 0 and all(is_whole(part) and part >= 0 for part in seed)
            _expect(ok, f"seed {i}", "whole numbers of 0 or more", repr(seed))

        self.model, self.prompts, self.group, self.settings, self.progress = model, prompts, group, settings, progress
        self.statistics = Statistics()
        self._seeds, self._tokenizer = seeds, tokenizer
        self._token_bytes: dict[int, bytes] = {}
        self._banned = torch.tensor(model.config.vision_token_ids, device=model.device)
        self._stops = np.zeros(model.config.text_config.vocab_size, dtype=bool)
        stop_ids = Settings.read(model.generation_config).stop_ids
        self._stops[[one for one in stop_ids if 0 <= one < len(self._stops)]] = True

        def each(values: list[int]) -> np.ndarray:  # [N] -> [A]
            return np.repeat(np.array(values, dtype=np.int64), group)

        answers, longest = group * len(prompts), settings.max_new_tokens
        self._prompt_length = each([len(prompt) for prompt in prompts])
        self._first_position = each([prompt.next_position for prompt in prompts])
        self._limit = np.minimum(longest, context - self._prompt_length)
        self._length = np.zeros(answers, dtype=np.int64)
        self._token_ids = np.empty((answers, longest), dtype=np.int64)
        self._logprobs = np.empty((answers, longest), dtype=np.float32)
        self._sampled = np.ones((answers, longest), dtype=bool)
        self._uniform = np.empty((answers, longest))
        self._drawn = np.zeros(answers, dtype=np.int64)
        self._forced = np.zeros(answers, dtype=bool)
        self._open = np.full(len(prompts), group)  # answers that haven't ended
        budget = settings.thinking_budget
        self._budget_range = settings.random_budgets if budget is None else (budget, budget)
        self._budgets = Budgets(model, prompts, answers) if self._budget_range else None
        lengths, limits = self._prompt_length[::group], self._limit[::group]
        self._pages = Pages(model, lengths, limits, group, settings.rows, settings.cache_tokens)
        self._groups = self._run()

    def __iter__(self) -> Iterator[tuple[int, list[Answer]]]:
        return self._groups

    def __next__(self) -> tuple[int, list[Answer]]:
        return next(self._groups)

    def _run(self) -> Iterator[tuple[int, list[Answer]]]:
        statistics, pages = self.statistics, self._pages
        unread, waiting = deque(range(len(self.prompts))), np.zeros(0, dtype=np.int64)
        running, table = waiting, None
        while len(running) or len(waiting) or unread:
            start = time.perf_counter()
            ended = []
            while unread and len(running) + len(waiting) < pages.rows:
                pack = self._next_pack(unread)
                if not pack:
                    break
                fresh, over = self._prefill(pack)
                waiting = np.concatenate((waiting, fresh))
                ended += over
            statistics.prefill_s += time.perf_counter() - start
            yield from self._complete(ended)

            start = time.perf_counter()
            room = pages.rows - len(running)
            if room and len(waiting):
                fresh, waiting = waiting[:room], waiting[room:]
                pages.give(fresh)
                running, table = np.concatenate((running, fresh)), None
            if not len(running):
                continue
            if table is None:
                # The last answer fills up the batch: its token is written again, to the same place.
                rows = np.pad(running, (0, self._spare(len(running))), mode="edge")
                table = pages.table(rows)
            ended, stays = [], self._decode(running, rows, table)
            if not stays.all():
                ended, running, table = running[~stays].tolist(), running[stays], None
                pages.take_back(ended)
            statistics.decode_s += time.perf_counter() - start
            yield from self._complete(ended)

    def _spare(self, running: int) -> int:
        """Rows that fill up a batch of ``running``."""
        if self.model.device.type == "cuda":
            return -running % (GPU_STEP if running > STEP else STEP)
        return -running % STEP if running > STEP else 0

    def _next_pack(self, unread: deque[int]) -> list[int]:
        """The next prompts that fit into a pack and into the cache; none, where they must wait for pages."""
        pack: list[int] = []
        tokens = 0
        while unread:
            length = len(self.prompts[unread[0]])
            if (pack and tokens + length > PACK) or not self._pages.give_prompt(unread[0]):
                break
            tokens += length
            pack.append(unread.popleft())
        return pack

    def _prefill(self, pack: list[int]) -> tuple[np.ndarray, list[int]]:
        """Reads prompts and chooses the first token of their answers: those that go on, and those that ended."""
        answers = (np.array(pack)[:, None] * self.group + np.arange(self.group)).ravel()
        for i in pack:
            for g, random in enumerate(_streams(self._seeds[i], self.group)):
                answer = i * self.group + g
                random.random(out=self._uniform[answer])
                if self._budgets is not None and self._budget_range is not None:
                    self._budgets.left[answer] = random.integers(*self._budget_range, endpoint=True)
        device = self.model.device
        batch = packed([self.prompts[i] for i in pack])
        lengths = batch["cu_seqlens"].diff()
        table = self._pages.table(answers[:: self.group])
        self._pages.cache.hold(table, lengths.to(device))
        logits = self.model.prefill(batch, self._pages.cache)
        uniform = torch.from_numpy(self._uniform[answers, 0].reshape(len(pack), self.group)).to(device)
        stays = self._accept(answers, _choose(logits, uniform, self.settings, self._banned))
        self.statistics.prefills += 1
        self.statistics.prefill_tokens += int(batch["cu_seqlens"][-1])
        return answers[stays], answers[~stays].tolist()

    def _decode(self, running: np.ndarray, rows: np.ndarray, table: Tensor) -> np.ndarray:
        """One more token for each of B answers, which ``rows`` begin with: which of them go on."""
        length, device = self._length[rows], self.model.device
        step = np.stack(
            (
                self._token_ids[rows, length - 1],
                self._first_position[rows] + length - 1,
                self._prompt_length[rows] + length - 1,  # tokens in the cache
                self._uniform[rows, self._drawn[rows]].view(np.int64),
            )
        )
        tokens, positions, held, uniform = torch.from_numpy(step).to(device)
        self._pages.cache.hold(table, held)
        logits = self.model.decode(tokens, positions.expand(3, -1), self._pages.cache)
        chosen = _choose(logits, uniform.view(torch.float64)[:, None], self.settings, self._banned)
        self.statistics.steps += 1
        self.statistics.row_steps += len(running)
        return self._accept(running, chosen[:, : len(running)])

    def _accept(self, answers: np.ndarray, chosen: Tensor) -> np.ndarray:
        """Takes in the next token of each answer, or the one that its budget forces: bool, which answers go on.

        ``chosen [2, B]`` are tokens and log probabilities, float64.
        """
        values = chosen.cpu().numpy()  # the one time in a step that the host waits for the device
        tokens, logprobs, length = values[0].astype(np.int64), values[1], self._length[answers]
        if not np.isfinite(logprobs).all():
            a = answers[np.flatnonzero(~np.isfinite(logprobs))[0]]
            at = f"prompt {a // self.group}, rollout {a % self.group}, token {self._length[a]}"
            raise NotFinite(f"rollouts: logits must be finite, got NaN or infinity ({at}); are the weights whole?")
        drawn: int | np.ndarray = 1
        if self._budgets is not None:
            forced = self._budgets.forced(answers, self._token_ids, length)
            drawn = forced < 0
            if not drawn.all():
                tokens, logprobs = np.where(drawn, tokens, forced), np.where(drawn, logprobs, 0)
                self._sampled[answers, length] = drawn
                self._forced[answers] |= ~drawn
                self.statistics.forced_tokens += int((~drawn).sum())
        self._token_ids[answers, length] = tokens
        self._logprobs[answers, length] = logprobs
        self._drawn[answers] += drawn
        self._length[answers] = length + 1
        self.statistics.tokens += len(answers)
        return ~self._stops[tokens] & (length + 1 < self._limit[answers])

    def _complete(self, ended: list[int]) -> Iterator[tuple[int, list[Answer]]]:
        """Groups that are whole, now that some answers have ended."""
        if not ended:
            return
        self.statistics.answers += len(ended)
        self.statistics.forced += int(self._forced[ended].sum())
        whole = []
        for answer in ended:
            i = answer // self.group
            self._open[i] -= 1
            if not self._open[i]:
                self._pages.take_prompt_back(i)
                whole.append(i)
        if self.progress is not None:
            self.progress(self.statistics.answers, len(self._length))
        for i in whole:
            yield i, [self._answer(i * self.group + g) for g in range(self.group)]

    def _answer(self, a: int) -> Answer:
        length = self._length[a]
        token_ids, sampled = self._token_ids[a, :length].copy(), self._sampled[a, :length].copy()
        stopped = bool(self._stops[token_ids[-1]])
        reason: FinishReason = "length" if not stopped else "budget" if self._forced[a] else "stop"
        text = self._text(token_ids[:-1] if stopped else token_ids)
        return Answer(token_ids, self._logprobs[a, :length].copy(), sampled, text, reason)

    def _text(self, token_ids: np.ndarray) -> str:
        known, ids = self._token_bytes, token_ids.tolist()
        for token in set(ids) - known.keys():
            known[token] = token_bytes(self._tokenizer, token)
        return b"".join([known[token] for token in ids]).decode("utf-8", "replace")


def rollouts(
    model: Glm4v,
    prompts: Sequence[Prompt],
    group: int,
    seeds: Sequence[Sequence[int]],
    settings: RolloutSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """``(prompt index, its answers)`` for each prompt, as soon as its ``group`` answers are complete.

    Args:
        model: says the answers; its processor's tokenizer reads them.
        prompts: what to answer.
        group: answers per prompt, G.
        seeds: one per prompt: answer g of prompt i draws from numpy's ``default_rng((*seeds[i], g))`` alone, as in
            `Glm4v.generate`. What it says doesn't depend on its neighbours, but for the rounding of sums.
        settings: see `RolloutSettings`; None takes the defaults.
        progress: called as ``progress(ended answers, all answers)``.

    Returns:
        An iterator; its ``statistics`` tell what has been done so far.

    Raises:
        ValueError: an argument does not fit; nothing has been computed then.
        NotFinite: while iterating: the model gives NaN or infinity.
    """
    return Rollouts(model, prompts, group, seeds, settings or RolloutSettings(), progress)


@torch.inference_mode()
def _choose(logits: Tensor, uniform: Tensor, settings: RolloutSettings, banned: Tensor) -> Tensor:
    """Next tokens and their log probabilities, float64 ``[2, B * G]``, for ``logits [B, V]`` at ``uniform [B, G]``.

    A token is drawn as `glm4v.sampling.draw` does it: by inverting the distribution function in float64, in the order
    of the ids. NaN anywhere in a row makes its log probability NaN.
    """
    scores = logits.float()
    if settings.temperature not in (0, 1):
        scores = scores / settings.temperature
    probability = scores.softmax(-1)
    allowed = probability.index_fill(1, banned, 0)
    if settings.temperature == 0:
        tokens = scores.index_fill(1, banned, -torch.inf).argmax(-1, keepdim=True).expand_as(uniform)
    else:
        if settings.top_p < 1:
            stays = cut(scores.index_fill(1, banned, -torch.inf), Sampling(1.0, settings.top_p))
            allowed = allowed.masked_fill_(stays == -torch.inf, 0)
        reached = allowed.cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(reached, uniform * reached[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    return torch.stack((tokens.double(), probability.gather(1, tokens).double().log_())).flatten(1)


def _streams(seed: Sequence[int], group: int) -> list[np.random.Generator]:
    if all(part < 2**32 for part in seed):  # one word each: an array of words gives the same stream, and sooner
        return [np.random.default_rng(np.array([*seed, g], dtype=np.uint32)) for g in range(group)]
    return [np.random.default_rng((*seed, g)) for g in range(group)]


def _expect(ok: bool, name: str, expectation: str, actual: object) -> None:
    if not ok:
        raise ValueError(f"rollouts: {name} must be {expectation}, got {actual}")
