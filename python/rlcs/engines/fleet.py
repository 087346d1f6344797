"""Servers and their weights: which there are, who has which, and who is asked.

Weights travel through a folder that all can read. A server that was gone is told its weights again before it is asked
anything.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import parallel
from ..config import EngineSettings
from ..endpoint import Fault, persist, request
from ..files import PART, sync
from ..memory import first_line
from . import EngineFault
from .servers import SERVERS, OpenAI, Told, Weights

KEPT = 2  # folders of weights: those in use, and those before
GRACE_S = 10.0  # for servers that don't take in weights, where another has them
REST_S = 5.0  # for a server that was lost, as long as there are others


class Counts:
    """What has happened, counted by threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def taken(self) -> Counter[str]:
        """Since it was last asked."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts


class Server:
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


class Fleet:
    """All servers of an engine.

    Args:
        settings: where they are, and how they are dealt with.
        folder: where weights are laid for them.
        write: writes the trainer's model, as it is, to a folder; where there are several processes, all call it.
        counts: counts how often a server was told its weights.
        stop: set when nobody waits any more.
        note: what is told to a person, line by line.
    """

    def __init__(
        self,
        settings: EngineSettings,
        folder: Path,
        write: Callable[[Path], None],
        counts: Counts,
        stop: threading.Event,
        note: Callable[[str], None],
    ) -> None:
        self.settings, self.folder, self.write = settings, folder.absolute(), write
        self._counts, self._stop, self.note = counts, stop, note
        kind = SERVERS[settings.server]
        told = Told(settings.update_path, settings.update_body, settings.update_command, settings.timeout_s)
        self.servers = [Server(url, settings, settings.key, kind, told) for url in settings.urls]
        self.weights: Weights | None = None
        # Of this run: what an earlier one has laid there is something else.
        self._mark = parallel.on_first(lambda: os.urandom(4).hex())

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
        except (OSError, SafetensorError) as error:
            parallel.on_first(lambda: shutil.rmtree(part, ignore_errors=True))
            why = getattr(error, "strerror", None) or first_line(error)
            raise EngineFault(f"engine: weights cannot be laid in {final}: {why}") from None
        return Weights(version, final)

    def _tell_all(self, weights: Weights) -> list[str]:
        """Tells all servers at once; what kept those from it that don't have the weights now."""
        faults, ready = dict[str, str](), threading.Event()

        def once(server: Server) -> bool:
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

        def one(server: Server) -> None:
            try:
                self._counts.add("told", persist(lambda: once(server), goes_on, self._stop.wait))
                ready.set()
            except Exception as error:  # a thread's: told with the others' faults, where the caller waits
                faults[server.url] = f"{server.url}: {error if isinstance(error, Fault) else repr(error)}"

        threads = [threading.Thread(target=one, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(faults.values())

    def _restarted(self, server: Server, weights: Weights) -> bool:
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

    def ready(self, server: Server) -> Weights:
        """The weights there; a server that was lost is told them first."""
        assert self.weights is not None
        held = server.held
        if held is None:
            held = self.weights
            self._counts.add("told", server.tell(held))
        return held

    def place(self, turn: int) -> Server:
        """A place at the server whose turn it is, as long as that has room, else at the next. Answers to a prompt have
        the same turn, for its server's cache may hold it; after a failure it is the next one's."""
        order = [self.servers[(turn + k) % len(self.servers)] for k in range(len(self.servers))]
        order.sort(key=lambda server: server.rests_until > time.monotonic())
        while True:
            for server in order:
                with server.lock:
                    if server.asked < self.settings.concurrency:
                        server.asked += 1
                        return server
            time.sleep(0.01)  # as many threads as places: another is about to leave one
