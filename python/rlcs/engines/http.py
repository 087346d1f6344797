"""Answers by servers with OpenAI's API: vLLM, SGLang, ``transformers serve`` and others.

Every answer has one place and is taken once: a request that fails is made again, from the answer's beginning and with
the same seed, elsewhere or when the server is back; of a reply that comes too late nothing is kept. A server that was
gone is told its weights again before it is asked anything. Weights travel through a folder that all can read.

Where thinking is limited an answer takes two requests: one up to the budget, and one that goes on behind what was said,
or behind the forced ``</think><answer>``, which was not sampled.
Dims: N prompts, G answers each.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from glm4v import Processor
from glm4v.answer import CLOSE_THINK, OPEN_ANSWER, OPEN_THINK, FinishReason
from glm4v.generate import ThinkingBudget
from glm4v.prompt import Conversation, render

from .. import parallel
from ..config import EngineSettings
from ..endpoint import Fault, pause, persist, request
from ..files import PART, sync
from ..prompts import Prompt
from ..rollout import Answer, RolloutSettings
from ..types import Task
from . import EngineFault
from .media import wire
from .reply import Reader, Reply, closed, cut, unknown
from .servers import SERVERS, Ask, OpenAI, Told, Weights

KEPT = 2  # folders of weights: those in use, and those before
GRACE_S = 10.0  # for servers that don't take in weights, where another has them
LOOK_S = 0.2  # between two looks whether anybody still waits
REST_S = 5.0  # for a server that was lost, as long as there are others


class _Server:
    """One address, and which weights are there."""

    def __init__(self, url: str, settings: EngineSettings, key: str, kind: OpenAI, told: Told) -> None:
        self.url, self.settings, self.key, self.kind, self.told = url.rstrip("/"), settings, key, kind, told
        self.root = self.url.removesuffix("/v1")
        self.lock = threading.Lock()  # of what follows
        self.held: Weights | None = None  # None: unknown
        self.asked = 0  # answers under way
        self.rests_until = 0.0

    def call(self, path: str, body: Any = None) -> Any:
        """Something other than a completion."""
        try:
            return request(self.root + path, body, self.key, self.settings.timeout_s)
        except Fault as fault:
            raise Fault(f"{path}: {fault}", fault.passes, fault.lost) from None

    def tell(self, weights: Weights) -> bool:
        """Sees to it that the server has these weights; whether it hadn't."""
        with self.lock:
            if self.held == weights:
                return False
            if self.settings.told:
                self.told.tell(self.call, self.url, weights)
            else:
                self.kind.tell(self.call, weights)
            self.held = weights
            return True

    def lose(self) -> None:
        """It is gone, or has other weights than was thought: what is there when it answers again is not known."""
        with self.lock:
            self.held, self.rests_until = None, time.monotonic() + REST_S


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
        self.settings, self.folder, self.write = settings, folder.absolute(), write
        self.processor, self.note = processor, note
        self.kind = SERVERS[settings.server]
        told = Told(settings.update_path, settings.update_body, settings.update_command, settings.timeout_s)
        self.servers = [_Server(url, settings, settings.key, self.kind, told) for url in settings.urls]
        config = processor.config
        self.stop_ids, self.banned = list(stop_ids), list(config.vision_token_ids)
        self.context = config.text_config.max_position_embeddings
        self.read = Reader(processor, stop_ids, self.banned, config.text_config.vocab_size)
        open, close, answer = (processor.encode(tag) for tag in (OPEN_THINK, CLOSE_THINK, OPEN_ANSWER))
        self.tags = (open, close, answer)
        self._specials = frozenset(processor.codec.specials.values())
        self.weights: Weights | None = None
        # Of this run: what an earlier one has laid there is something else.
        self._mark = parallel.on_first(lambda: os.urandom(4).hex())
        self._counts: Counter[str] = Counter()
        self._count_lock, self._stop = threading.Lock(), threading.Event()

    # --- weights ---

    def renew(self, version: int) -> int:
        """See `Engine.renew`: every ``refresh_every`` waves; a server that can't take them in may go on with what it
        has, as far as ``staleness`` allows."""
        due = self.weights is None or version - self.weights.version >= self.settings.refresh_every
        if due:
            self.weights = self._lay(version)
        assert self.weights is not None
        return parallel.on_first(partial(self._renewed, version, self.weights))

    def _renewed(self, version: int, weights: Weights) -> int:
        faults = self._tell_all(weights)
        ages = [version - s.held.version for s in self.servers if s.held is not None]
        if not ages or min(ages) > self.settings.staleness:
            most = f"at most {self.settings.staleness} waves old (staleness)"
            found = "none are known there" if not ages else f"those there are {min(ages)} old"
            raise EngineFault(f"engine: weights must be {most}, {found}: {'; '.join(faults)}")
        for fault in faults:
            self.note(f"engine: goes on with older weights: {fault}")
        self._sweep()
        return version - max(age for age in ages if age <= self.settings.staleness)

    def _lay(self, version: int) -> Weights:
        """The model as it is, by all processes, in a folder that is there whole or not at all."""
        final = self.folder / f"wave-{version:06d}-{self._mark}"
        part = final.with_name(final.name + PART)

        def begin() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (part, final):
                shutil.rmtree(old, ignore_errors=True)
            part.mkdir()

        def end() -> None:
            for path in (*part.rglob("*"), part):
                sync(path)
            os.rename(part, final)
            sync(self.folder)

        try:
            parallel.on_first(begin)
            self.write(part)
            parallel.on_first(end)
        except OSError as error:
            parallel.on_first(lambda: shutil.rmtree(part, ignore_errors=True))
            raise EngineFault(f"engine: weights cannot be laid in {final}: {error.strerror or error}") from None
        return Weights(version, final)

    def _tell_all(self, weights: Weights) -> list[str]:
        """Tells all servers at once; what kept those from it that don't have the weights now."""
        faults, ready = dict[str, str](), threading.Event()

        def once(server: _Server) -> bool:
            try:
                if server.held == weights and self._restarted(server, weights):
                    server.lose()
                return server.tell(weights)
            except Fault as fault:
                if fault.lost:
                    server.lose()
                raise

        def goes_on(_: int, seconds: float) -> bool:
            return seconds < (GRACE_S if ready.is_set() else self.settings.patience_s) and not self._stop.is_set()

        def one(server: _Server) -> None:
            try:
                self._count("told", persist(lambda: once(server), goes_on, self._stop.wait))
                ready.set()
            except Exception as error:
                faults[server.url] = f"{server.url}: {error if isinstance(error, Fault) else repr(error)}"

        threads = [threading.Thread(target=one, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(faults.values())

    def _restarted(self, server: _Server, weights: Weights) -> bool:
        """Whether the server says that it has other weights than it was given: it has begun anew, unseen."""
        if self.settings.told:
            return False
        label = server.kind.held(server.call)
        return label is not None and label != weights.label

    def _sweep(self) -> None:
        """Removes weights that no server has any more, nor will be told; those of an earlier run, too."""
        used = {held.path for held in (self.weights, *(server.held for server in self.servers)) if held is not None}
        for path in sorted(self.folder.glob("wave-*"), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            if path not in used:
                shutil.rmtree(path, ignore_errors=True)

    # --- answers ---

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
        if self.weights is None:
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
        count = min(total, self.settings.concurrency * len(self.servers))
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
            server = self._server(job, tries)
            try:
                return self._answer(server, self._ready(server), job, settings)
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
            self._count("retries")
            tries += 1
            given_up.wait(pause(tries))

    def _ready(self, server: _Server) -> Weights:
        """The weights there; a server that was lost is told them first."""
        assert self.weights is not None
        held = server.held
        if held is None:
            held = self.weights
            self._count("told", server.tell(held))
        return held

    def _server(self, job: _Job, tries: int) -> _Server:
        """The group's own server, whose cache may hold the prompt, as long as it has room; after a failure the next."""
        order = [self.servers[(job.index + tries + k) % len(self.servers)] for k in range(len(self.servers))]
        order.sort(key=lambda server: server.rests_until > time.monotonic())
        while True:
            for server in order:
                with server.lock:
                    if server.asked < self.settings.concurrency:
                        server.asked += 1
                        return server
            time.sleep(0.01)  # as many threads as places: another is about to leave one

    def _answer(self, server: _Server, weights: Weights, job: _Job, settings: RolloutSettings) -> Answer:
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
        self._count("answers")
        self._count("read_again", int(read_again))
        self._count("tokens", len(ids))
        self._count("unknown_logprobs", unknown(logprobs))
        stopped = ended and ids[-1] in self.read.stop_ids
        reason: FinishReason = "length" if not ended else "budget" if forced else "stop"
        text = self.read.text(ids[:-1] if stopped else ids)
        kinds = (np.int64, np.float32, bool)
        arrays = [np.array(x, dtype=kind) for x, kind in zip((ids, logprobs, sampled), kinds, strict=True)]
        return Answer(arrays[0], arrays[1], arrays[2], text, reason)

    def _ask(
        self,
        server: _Server,
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
        self._count("seams", bool(said) and self.processor.encode(text) != said)
        stops, banned = self.stop_ids, self.banned
        ask = Ask(messages, rendered, text, tokens, settings.temperature, settings.top_p, seed, stops, banned)
        if self._ready(server) != weights:  # an answer is by one policy
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
        self._count("requests")
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
        names = {id: text for text, id in codec.specials.items()}
        pieces = render(self.processor.template, Conversation(task.messages), codec)
        return "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)

    def metrics(self) -> dict[str, float]:
        """Requests, tries again, tellings of weights; shares of answers that were continued behind other tokens than
        were said, and whose ids are the text's; share of tokens without a log-probability."""
        with self._count_lock:
            counts, self._counts = self._counts, Counter()
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

    def _count(self, name: str, by: int = 1) -> None:
        with self._count_lock:
            self._counts[name] += by
