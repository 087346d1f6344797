"""Answers by servers with OpenAI's API: vLLM, SGLang, ``transformers serve`` and others.

Every answer has one place and is taken once: a request that fails is made again, from the answer's beginning and with
the same seed, elsewhere or when the server is back; of a reply that comes too late nothing is kept. Which servers there
are, and with which weights, is `fleet`'s.

Where thinking is limited an answer takes two requests: one up to the budget, and one that goes on behind what was said,
or behind the forced ``</think><answer>``, which was not sampled.
Dims: N prompts, G answers each.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glm4v import Processor
from glm4v.answer import CLOSE_THINK, OPEN_ANSWER, OPEN_THINK, FinishReason
from glm4v.generate import ThinkingBudget
from glm4v.prompt import Conversation, render

from .. import parallel
from ..config import EngineSettings
from ..endpoint import Fault, pause, request
from ..prompts import Prompt
from ..rollout import Answer, RolloutSettings
from ..types import Task
from . import EngineFault
from .fleet import Counts, Fleet, Server
from .media import wire
from .reply import Reader, Reply, closed, cut, unknown
from .servers import SERVERS, Ask, Weights

LOOK_S = 0.2  # between two looks whether anybody still waits


@dataclass
class _Job:
    """One answer to be made. What a group shares is made once, and goes with it."""

    index: int  # of the prompt
    rank: int  # in its group
    shared: _Shared
    seed: Sequence[int]


_Ended = tuple[_Job, Answer | BaseException]


@dataclass
class _Shared:
    task: Task
    prompt: Prompt
    engine: Http
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        return wire(self.task.messages)

    @cached_property
    def rendered(self) -> str:
        return self.engine.rendered(self.task)


class Http:
    """The engine of servers.

    Args:
        settings: where they are, and how they are dealt with.
        folder: where weights are laid for them.
        write: writes the trainer's model, as it is, to a folder; where there are several processes, all call it.
        processor: the model's; the servers' must be the same.
        stop_ids: the tokens that end an answer.
        note: what is told to a person, line by line.
    """

    def __init__(
        self,
        settings: EngineSettings,
        folder: Path,
        write: Callable[[Path], None],
        processor: Processor,
        stop_ids: Sequence[int],
        note: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.processor = settings, processor
        self.kind = SERVERS[settings.server]
        config = processor.config
        self.stop_ids, self.banned = list(stop_ids), list(config.vision_token_ids)
        self.context = config.text_config.max_position_embeddings
        self.read = Reader(processor, stop_ids, self.banned, config.text_config.vocab_size)
        open, close, answer = (processor.encode(tag) for tag in (OPEN_THINK, CLOSE_THINK, OPEN_ANSWER))
        self.tags = (open, close, answer)
        self._specials = frozenset(processor.codec.specials.values())
        self._counts, self._stop = Counts(), threading.Event()
        self.fleet = Fleet(settings, folder, write, self._counts, self._stop, note)

    def renew(self, version: int) -> int:
        """See `Engine.renew`."""
        return self.fleet.renew(version)

    def share(self, count: int) -> range:
        """All of them by the first process: asking costs little, and the servers' limits are those of one run."""
        return range(count if parallel.first() else 0)

    def rollouts(
        self,
        tasks: Sequence[Task],
        prompts: Sequence[Prompt],
        group: int,
        seeds: Sequence[Sequence[int]],
        settings: RolloutSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """See `Engine.rollouts`."""
        if self.fleet.weights is None:
            raise EngineFault("engine: renew must be called before rollouts")
        jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        done: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
        for i, (task, prompt, seed) in enumerate(zip(tasks, prompts, seeds, strict=True)):
            shared = _Shared(task, prompt, self)
            for g in range(group):
                jobs.put(_Job(i, g, shared, (*seed, g)))
        given_up = threading.Event()

        def work() -> None:
            while True:
                try:
                    job = jobs.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((job, self._made(job, settings, given_up)))
                except BaseException as error:
                    done.put((job, error))
                    return

        total = len(tasks) * group
        count = min(total, self.settings.concurrency * len(self.fleet.servers))
        # Threads of our own: those of concurrent.futures would keep an interrupted process waiting for its requests.
        for _ in range(count):
            threading.Thread(target=work, name="rollout", daemon=True).start()
        found: dict[int, dict[int, Answer]] = {}
        try:
            for ended in range(1, total + 1):
                job, answer = self._next(done)
                if isinstance(answer, BaseException):
                    raise answer
                group_of = found.setdefault(job.index, {})
                assert job.rank not in group_of, "an answer is made once"
                group_of[job.rank] = answer
                if progress is not None:
                    progress(ended, total)
                if len(group_of) == group:
                    yield job.index, [group_of[g] for g in range(group)]
                    del found[job.index]
        finally:
            given_up.set()

    def _next(self, done: queue.SimpleQueue[_Ended]) -> _Ended:
        """What has ended; `close` isn't kept waiting for the requests that are under way."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return done.get(timeout=LOOK_S)
        raise EngineFault("engine: the wave was given up")

    def _made(self, job: _Job, settings: RolloutSettings, given_up: threading.Event) -> Answer:
        """The answer, however often a server has to be asked for it."""
        failed, tries = 0.0, 0
        while True:
            if given_up.is_set() or self._stop.is_set():
                raise EngineFault("engine: the wave was given up")
            server = self.fleet.place(job.index + tries)
            try:
                return self._answer(server, self.fleet.ready(server), job, settings)
            except Fault as fault:
                if fault.lost:
                    server.lose()
                said = f"engine: {server.url}: task {job.shared.task.id!r}: {fault}"
                failed = failed or time.monotonic()
                waited = time.monotonic() - failed
                if not fault.passes:
                    raise EngineFault(said) from None
                if waited > self.settings.patience_s:
                    raise EngineFault(f"{said}; given up after {tries + 1} tries in {waited:.0f} s") from None
            finally:
                with server.lock:
                    server.asked -= 1
            self._counts.add("retries")
            tries += 1
            given_up.wait(pause(tries))

    def _answer(self, server: Server, weights: Weights, job: _Job, settings: RolloutSettings) -> Answer:
        """One answer, in one or two requests to one server that has these weights."""
        random = np.random.default_rng(job.seed)
        prompt, limit = job.shared.prompt, min(settings.max_new_tokens, self.context - len(job.shared.prompt))
        seeds = [int(x) for x in random.integers(2**31, size=2)]
        budget = settings.thinking_budget
        if settings.random_budgets is not None:
            budget = int(random.integers(*settings.random_budgets, endpoint=True))
        opening, close, answer = self.tags
        ids, logprobs, sampled = list[int](), list[float](), list[bool]()
        ended = forced = read_again = False
        first = limit if budget is None else min(limit, budget + len(opening))
        if budget != 0:
            reply = self._ask(server, weights, job, [], first, seeds[0], settings)
            ids, logprobs, ended, read_again = reply.token_ids, reply.logprobs, reply.ended, reply.read_again
        at = None if budget is None else cut(ids, budget, self.tags)
        if at is None and budget is not None and read_again and not ended and closed(ids, self.tags) is None:
            at = len(ids)  # read again, the tokens of the budget are fewer
        if at is not None and at < limit and not (ended and at >= len(ids)):
            at = self.read.whole(ids[:at])
            opened = ThinkingBudget(None, prompt.input_ids.tolist(), self.processor.encode).opened
            script = [*([] if at or opened else opening), *close, *answer]
            ids = [*ids[:at], *script][:limit]
            logprobs = [*logprobs[:at], *[0.0] * (len(ids) - at)]
            sampled = [True] * at + [False] * (len(ids) - at)
            forced, ended = True, False
        else:
            sampled = [True] * len(ids)
        if budget is not None and not ended and len(ids) < limit and (forced or len(ids) >= first or read_again):
            if not forced:
                kept = self.read.whole(ids)
                ids, logprobs, sampled = ids[:kept], logprobs[:kept], sampled[:kept]
            reply = self._ask(server, weights, job, ids, limit - len(ids), seeds[1], settings)
            ids, logprobs = [*ids, *reply.token_ids], [*logprobs, *reply.logprobs]
            sampled = [*sampled, *[True] * len(reply.token_ids)]
            ended, read_again = reply.ended, read_again or reply.read_again
        if not ids:  # a stop token that the server doesn't show, and no other
            ids, logprobs, sampled = self.stop_ids[:1], [math.nan], [True]
        ids, logprobs, sampled = ids[:limit], logprobs[:limit], sampled[:limit]  # text read again may be longer
        self._counts.add("answers")
        self._counts.add("read_again", int(read_again))
        self._counts.add("tokens", len(ids))
        self._counts.add("unknown_logprobs", unknown(logprobs))
        stopped = ended and ids[-1] in self.read.stop_ids
        reason: FinishReason = "length" if not ended else "budget" if forced else "stop"
        text = self.read.text(ids[:-1] if stopped else ids)
        kinds = (np.int64, np.float32, bool)
        arrays = [np.array(x, dtype=kind) for x, kind in zip((ids, logprobs, sampled), kinds, strict=True)]
        return Answer(arrays[0], arrays[1], arrays[2], text, reason)

    def _ask(
        self,
        server: Server,
        weights: Weights,
        job: _Job,
        said: list[int],
        tokens: int,
        seed: int,
        settings: RolloutSettings,
    ) -> Reply:
        """One request for so many tokens behind what was said."""
        shared = job.shared
        with shared.lock:  # the group's first makes what all share
            messages, rendered = shared.messages, shared.rendered
        text = self.read.text(said)
        self._counts.add("seams", bool(said) and self.processor.encode(text) != said)
        stops, banned = self.stop_ids, self.banned
        ask = Ask(messages, rendered, text, tokens, settings.temperature, settings.top_p, seed, stops, banned)
        if self.fleet.ready(server) != weights:  # an answer is by one policy
            raise Fault(f"weights must be {weights.label}, got others in the middle of an answer", passes=True)
        body = {
            "model": str(weights.path) if self.kind.path_is_model else self.settings.model,
            "max_tokens": tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed,
            **self.kind.body(ask),
            **self.settings.more,
        }
        reply = self.read(request(f"{server.url}/chat/completions", body, server.key, self.settings.timeout_s), tokens)
        self._counts.add("requests")
        if reply.version not in (None, weights.label) and self.kind.tells and not self.settings.told:
            server.lose()
            raise Fault(f"weights must be {weights.label}, got an answer from {reply.version}", passes=True)
        self._check_prompt(shared.prompt, said, text, reply)
        return reply

    def _check_prompt(self, prompt: Prompt, said: list[int], text: str, reply: Reply) -> None:
        """The server must have read what the trainer reads: another template or other pictures have other lengths."""
        if reply.prompt_tokens is None:
            return
        expected = {len(prompt)}
        if said:
            ids = prompt.input_ids.tolist()
            tail = ids[max((i for i, id in enumerate(ids) if id in self._specials), default=-1) + 1 :]
            again = self.processor.encode(self.read.text(tail) + text)  # it may grow together with the prompt's
            expected = {
                len(prompt) + len(said),
                len(prompt) + len(self.processor.encode(text)),
                len(prompt) - len(tail) + len(again),
            }
        if reply.prompt_tokens not in expected:
            counts = " or ".join(map(str, sorted(expected)))
            raise Fault(
                f"the prompt must have {counts} tokens, got {reply.prompt_tokens} there: another chat template, "
                "tokenizer or picture settings"
            )

    # --- the rest ---

    def rendered(self, task: Task) -> str:
        """The prompt as the trainer's template writes it, with one placeholder for each picture."""
        codec = self.processor.codec
        template = self.processor.template
        return codec.text(render(template, Conversation(task.messages, template), codec))

    def metrics(self) -> dict[str, float]:
        """Requests, tries again, tellings of weights; shares of answers that were continued behind other tokens than
        were said, and whose ids are the text's; share of tokens without a log-probability."""
        counts = self._counts.taken()
        answers, tokens = max(1, counts["answers"]), max(1, counts["tokens"])
        return {
            "requests": float(counts["requests"]),
            "retries": float(counts["retries"]),
            "told": float(counts["told"]),
            "seams": counts["seams"] / answers,
            "read_again": counts["read_again"] / answers,
            "unknown_logprobs": counts["unknown_logprobs"] / tokens,
        }

    def close(self) -> None:
        self._stop.set()
