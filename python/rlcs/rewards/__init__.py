"""Rewards: one verifier per domain, each of which says one of four things of an answer. No torch.

    verify("math", response, "43.0") -> Verdict(outcome="score", score=1.0, detail="as numbers")

Tolerances: maths and short answers 1e-6 relative, whole numbers exactly; physics, chemistry, biology and geography
1e-2 after unit conversion; charts 2.5 %, years exactly; grounding IoU > 0.5. The paper (arXiv 2507.01006, table 1)
gives the rules; the numbers are ours.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np

from . import worker
from .answer import FormatFault, boxed_answer, open_answer, true_answer
from .chart import Chart
from .choice import Count, Words
from .grounding import Grounding
from .gui import Gui
from .judge import Endpoint, Judge
from .judged import Exact, Open
from .ocr import Ocr
from .stem import Stem
from .verdict import Verdict, graded, judged, right, wrong

__all__ = [
    "DOMAINS",
    "Endpoint",
    "Judge",
    "Verdict",
    "Verifier",
    "check",
    "check_truth",
    "concurrency",
    "find",
    "graded",
    "judged",
    "register",
    "right",
    "use_judge",
    "verify",
    "wrong",
]

Verifier = Callable[[str, str, "str | None"], Verdict | float]
"""``verifier(answer, truth, question)``: both without tags; a number in [0, 1] is a score. It may raise: that is a
verifier error."""

DOMAINS: dict[str, Verifier] = {
    "math": Stem(1e-6),
    "physics": Stem(1e-2, bare_numbers=False),
    "chemistry": Stem(1e-2, bare_numbers=False),
    "biology": Stem(1e-2),
    "geography": Stem(1e-2),
    "chart": Chart(),
    "ocr": Ocr(),
    "ocr_ignore_case": Ocr(ignore_case=True),
    "counting": Count(),
    "vqa": Words(),
    "choice": Words(),
    "spatial": Words(),
    "grounding": Grounding(),
    "gui_android": Gui("json", remarks=False),
    "gui_os": Gui("call", remarks=True),
    "gui_web": Gui("call", remarks=True),
    "video": Exact(),
    "geoguess": Exact(),
    "long_document": Exact(),
    "general": Open(),
}
"""Domain -> verifier. Users add theirs with :func:`register` or as an entry point of the group ``rlcs.verifiers``."""
BUILT_IN = frozenset(DOMAINS)


def verify(domain: str, response: str, truth: str, question: str | None = None) -> Verdict:
    """What the domain's verifier says of a response.

    Args:
        domain: a key of :data:`DOMAINS`, the name of an entry point of the group ``rlcs.verifiers``, or an import path
            ``"package.module:name"``. Verifiers of the last two kinds run in a worker process, with a deadline.
        response: the full text, ``<think>…</think><answer>…<|begin_of_box|>…<|end_of_box|>…</answer>``; in the domain
            ``general`` without a box.
        truth: the same, a boxed text, or the bare answer.
        question: the prompt's text; options listed in it (``A. red``) are read.

    Returns:
        Verdict with ``outcome`` "score", "wrong", "format" or "error" and ``score`` in [0, 1].

    Raises:
        ValueError: no such domain, or an argument that is no text.
    """
    for name, value in (
        ("response", response),
        ("truth", truth),
        *((("question", question),) if question is not None else ()),
    ):
        if not isinstance(value, str):
            raise ValueError(f"verify: {name} must be a text, got {type(value).__name__}")
    verifier = find(domain)
    try:
        expected = true_answer(truth)
        answer = open_answer(response) if isinstance(verifier, Open) else boxed_answer(response)
    except FormatFault as fault:
        return Verdict("format", 0.0, str(fault))
    except ValueError as error:
        return Verdict("error", 0.0, str(error))
    try:
        return _verdict(verifier(answer, expected, question), domain)
    except worker.WorkerFault as fault:  # it says itself what was raised there, or that time is up
        return Verdict("error", 0.0, str(fault))
    except Exception as error:  # a verifier that fails says nothing of the answer
        return Verdict("error", 0.0, f"{type(error).__name__}: {error}")


def register(domain: str, verifier: Verifier | str, replace: bool = False) -> None:
    """Adds a domain's verifier: a callable runs in this process; an import path runs in a worker. It takes a built-in
    one's place only if it is told to ``replace`` it.

    Raises:
        ValueError: no name, no verifier, or the name of a built-in one without ``replace``.
    """
    if not domain or not isinstance(domain, str):
        raise ValueError(f"register: domain must be a name, got {domain!r}")
    if domain in BUILT_IN and not replace:
        raise ValueError(f"register: domain must be a new one, or replace=True be given, got the built-in {domain!r}")
    if isinstance(verifier, str):
        verifier = Remote(verifier)
    if not callable(verifier):
        raise ValueError(f"register: verifier must be callable or an import path, got {type(verifier).__name__}")
    DOMAINS[domain] = verifier


def use_judge(judge: Judge | None) -> None:
    """Hands what the rules leave open to a judge, in every domain whose verifier can take one."""
    for domain, verifier in list(DOMAINS.items()):
        if hasattr(verifier, "judge"):
            DOMAINS[domain] = dataclasses.replace(verifier, judge=judge)  # type: ignore[type-var]


def find(domain: str) -> Verifier:
    """The verifier of a domain, of an entry point or of an import path."""
    if isinstance(domain, str):  # a list, say, would be no key
        if domain in DOMAINS:
            return DOMAINS[domain]
        if path := _entry_points().get(domain):
            return Remote(path)
        if ":" in domain:
            return Remote(domain)
    known = ", ".join([*DOMAINS, *_entry_points()])
    raise ValueError(f"verify: domain must be one of {known}, or an import path module:name, got {domain!r}")


def check(domain: str) -> None:
    """Raises ValueError where the domain's verifier could never say anything: no judge, no such function."""
    verifier = find(domain)
    if isinstance(verifier, Open) and verifier.judge is None:
        raise ValueError(f"rewards: domain {domain!r} needs a judge, got none")
    if isinstance(verifier, Remote):
        try:
            worker.call("rlcs.rewards:load_here", verifier.path, deadline_s=worker.START_S)
        except worker.WorkerFault as fault:
            raise ValueError(f"rewards: verifier {verifier.path} cannot be loaded: {fault}") from None


def check_truth(domain: str, truth: str) -> None:
    """Raises ValueError where the domain's rules cannot read a truth, or where it would be wrong as its own answer, as
    boxes in pixels are: no answer could ever be right."""
    if not isinstance(truth, str):
        raise ValueError(f"{domain}: truth must be a text, got {type(truth).__name__}")
    verifier, expected = find(domain), true_answer(truth)
    if not expected and isinstance(verifier, Stem | Words | Chart):
        raise ValueError(f"{domain}: truth must hold something, got {truth[:80]!r}")
    if not isinstance(verifier, Count | Grounding | Gui):
        return
    verdict = verifier(expected, expected, None)
    # A click may lie beside its own box by the rounding of its middle: a point within scores 1.
    if verdict.outcome != "score" if isinstance(verifier, Gui) else verdict.score < 1:
        due = "must be right as its own answer (coordinates are per mille, 0 to 1000)"
        raise ValueError(f"{domain}: truth {due}, got {verdict.detail} with {truth[:80]!r}")


def concurrency(domain: str) -> int:
    """How many verdicts of the domain may wait for a judge or a worker at once; 0 where rules decide at once."""
    verifier = find(domain)
    judge = getattr(verifier, "judge", None)
    waits_for_workers = isinstance(verifier, Stem | Remote)
    return max(judge.concurrency if judge else 0, worker.PROCESSES if waits_for_workers else 0)


@lru_cache
def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group="rlcs.verifiers")}


class Remote:
    """A verifier named by its import path, run where it can be killed."""

    def __init__(self, path: str, deadline_s: float = worker.DEADLINE_S) -> None:
        if not all(path.partition(":")):
            raise ValueError(f"verifier: the path must be module:name, got {path!r}")
        self.path, self.deadline_s = path, deadline_s

    def __call__(self, answer: str, truth: str, question: str | None) -> Verdict:
        fields = worker.call("rlcs.rewards:run_here", self.path, answer, truth, question, deadline_s=self.deadline_s)
        return Verdict(*fields)


def run_here(path: str, answer: str, truth: str, question: str | None) -> list[Any]:
    """The worker's side of :class:`Remote`."""
    verdict = _verdict(_function(path)(answer, truth, question), path)
    return [verdict.outcome, verdict.score, verdict.detail]


def _verdict(said: Any, name: str) -> Verdict:
    """What a verifier has returned, a number (numpy's too) as a verdict."""
    if isinstance(said, Real | np.bool_):
        return graded(float(said))
    if not isinstance(said, Verdict):
        raise TypeError(f"{name} must return a Verdict or a number, got {type(said).__name__}")
    return graded(said.score, said.detail) if said.outcome == "score" else said


def load_here(path: str) -> None:
    """The worker's side of :func:`check`."""
    if not callable(_function(path)):
        raise TypeError(f"{path} must be callable")


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
