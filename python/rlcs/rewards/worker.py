"""Work that may hang, crash or eat memory, done in processes that can be killed.

``call("rlcs.rewards.symbolic:equal", a, b, deadline_s=2)`` runs a function of an importable module in a worker: a fresh
Python with none of the parent's environment variables, with a deadline, and with limits on address space, core dumps
and bytes written to files. These are against accidents, no sandbox: a worker has the parent's rights, may read files,
start processes and use the network. One that passes its deadline or dies is killed and costs that one call; one whose
parent is killed ends by itself. Arguments and results are JSON.

This file is also what a worker runs; there it imports nothing of the package until it has its limits.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import math
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 << 30  # of address space: what a worker may map, not what it uses
DEADLINE_S = 5.0
PROCESSES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
START_S = 60.0  # importing a large library on a busy machine
GRACE_S = 5  # beyond its deadline a worker ends by itself: whoever should have killed it was killed


class WorkerFault(Exception):
    """The worker gave no result: it passed its deadline, died, or the function raised."""


class _Worker:
    """One process; a line of JSON in, a line out."""

    def __init__(self) -> None:
        # -I: no PYTHON* variables, no user site, no current folder. `_path` is handed over instead.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._loaded: set[str] = set()
        self._send({"path": _path()})
        self._receive(START_S)

    def call(self, target: str, arguments: tuple[Any, ...], deadline_s: float) -> Any:
        module = target.partition(":")[0]
        if module not in self._loaded:  # an import is not the answer's fault: it has a deadline of its own
            self._ask({"import": module}, START_S)
            self._loaded.add(module)
        return self._ask({"call": target, "arguments": arguments}, deadline_s)

    def _ask(self, message: dict[str, Any], deadline_s: float) -> Any:
        self._send({**message, "most_s": math.ceil(deadline_s) + GRACE_S})
        answer = json.loads(self._receive(deadline_s))
        if "raised" in answer:
            raise WorkerFault(answer["raised"])
        return answer["result"]

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise _Died("the worker died") from None

    def _receive(self, deadline_s: float) -> bytes:
        assert self._process.stdout is not None
        line, end = b"", time.monotonic() + deadline_s
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                raise _Died(f"no result within {deadline_s:g} s")
            part = self._process.stdout.read()
            if part == b"":
                raise _Died("the worker died (out of memory, or it was killed)")
            line += part or b""
        return line

    def kill(self) -> None:
        self._selector.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with whatever it started
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unsent bytes of a dead process
                    pipe.close()


def _path() -> list[str]:
    """This process's own, as it is seen from a worker's folder, and behind all of it the folder that stands for "here":
    a command's path has no such entry, and a user's verifier often lies there."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        here = "/"
    return [*(os.path.join(here, place) for place in sys.path if place), here]


class _Died(WorkerFault):
    """This worker is of no more use."""


class Pool:
    """Workers that threads borrow; one is started when a thread finds none idle, up to one for each core."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._room = threading.Semaphore(PROCESSES)

    def call(self, target: str, *arguments: Any, deadline_s: float = DEADLINE_S) -> Any:
        """``target`` is ``"module:function"``. Raises :class:`WorkerFault`. Waiting for a worker is not counted."""
        with self._room:
            return self._call(target, arguments, deadline_s)

    def _call(self, target: str, arguments: tuple[Any, ...], deadline_s: float) -> Any:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
        try:
            result = worker.call(target, arguments, deadline_s)
        except _Died as death:
            worker.kill()
            raise WorkerFault(str(death)) from None
        except WorkerFault:
            self._idle.put(worker)
            raise
        except BaseException:  # an interruption in the middle: what the worker would say next answers nothing
            worker.kill()
            raise
        self._idle.put(worker)
        return result

    def close(self) -> None:
        """Ends the idle workers; the pool can go on afterwards."""
        while True:
            try:
                self._idle.get_nowait().kill()
            except queue.Empty:
                return


_pool: Pool | None = None
_lock = threading.Lock()


def call(target: str, *arguments: Any, deadline_s: float = DEADLINE_S) -> Any:
    """:meth:`Pool.call` on the process's own pool, which a forked child does not share."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = Pool()
            atexit.register(_pool.close)
            os.register_at_fork(after_in_child=_forget)
    return _pool.call(target, *arguments, deadline_s=deadline_s)


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # writes no files


def _serve() -> None:
    """The loop of a worker. Its own stdout is the answers' way out, so that of the functions goes nowhere."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit()
    for line in sys.stdin.buffer:
        message = json.loads(line)
        answer: dict[str, Any] = {"result": None}
        signal.alarm(message.get("most_s", 0))
        try:
            if "path" in message:
                sys.path[:] = message["path"]
            elif "import" in message:
                importlib.import_module(message["import"])
            else:
                answer["result"] = _resolve(message["call"])(*message["arguments"])
            text = json.dumps(answer)
        except BaseException as error:
            text = json.dumps({"raised": f"{type(error).__name__}: {error}"[:500]})
        signal.alarm(0)
        answers.write(text.encode() + b"\n")


def _resolve(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    _serve()
