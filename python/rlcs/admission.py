"""The tasks that a run begins with: those that are held out, and of all, those that its model can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from glm4v import Processor

from . import parallel, rewards
from .config import EvalSettings
from .data import read_tasks
from .progress import Bar
from .rollout import RolloutSettings
from .shards import BadRows, files_of
from .types import Task

MANY, STRIDE = 20_000, 500  # of what is checked: how much is worth a bar, and how often that moves
T = TypeVar("T")


def eval_tasks(settings: EvalSettings, bad: BadRows | None = None) -> list[Task]:
    """Held-out tasks, at most ``limit`` of each domain."""
    if settings.tasks is None:
        return []
    tasks, counts = [], dict[str, int]()
    for task in read_tasks(settings.tasks, bad or "fatal"):
        counts[task.domain] = counts.get(task.domain, 0) + 1
        if settings.limit is None or counts[task.domain] <= settings.limit:
            tasks.append(task)
    return tasks


def trained_on(tasks: Path, held_out: Path | None) -> list[Path]:
    """Files of held-out tasks that training reads, too."""
    if held_out is None:
        return []
    files = {file.resolve() for file in files_of(tasks)}
    return [file for file in files_of(held_out) if file.resolve() in files]


def check_tasks(
    tasks: Sequence[Task],
    rollout: RolloutSettings,
    processor: Processor,
    bad: BadRows | None = None,
    budget: int | None = None,
) -> list[Task]:
    """The tasks that the model can be asked and whose answers can be judged, before anything is computed.

    Raises:
        ValueError: answers or a prompt are longer than the context (or, with ``budget``, than a micro-step), a picture
            or a truth cannot be read, a verifier cannot judge. Tasks are left out, and noted, where ``bad`` allows it.
    """
    bad = bad or BadRows("fatal", 0, print)
    if not tasks:
        return []
    context = processor.config.text_config.max_position_embeddings
    if rollout.max_new_tokens >= context:
        most = f"below {context}, the model's context"
        raise ValueError(f"rollout: max_new_tokens must be {most}, got {rollout.max_new_tokens}")
    for domain in dict.fromkeys(task.domain for task in tasks):
        rewards.check(domain)
    good = []
    for task in watched(tasks, "checking tasks"):
        try:
            rewards.check_truth(task.domain, task.truth)
            length = sum(processor.count_tokens([list(task.messages)]))  # type: ignore[arg-type]
            if length >= context:
                raise ValueError(f"the prompt must be below {context} tokens, the model's context, got {length}")
            whole = min(length + rollout.max_new_tokens, context)
            if budget is not None and whole > budget:
                raise ValueError(f"prompt and answer must fit the {budget} tokens of a micro-step, got up to {whole}")
            good.append(task)
        except ValueError as error:
            bad(f"task {task.id!r}", error)
    if not good:
        raise ValueError("data: a task must fit the model, got none that does")
    return good


def watched(items: Sequence[T], what: str) -> Iterator[T]:
    """The items in turn, with a bar where a look at each takes more than seconds."""
    if len(items) < MANY:
        yield from items
        return
    with Bar(what, quiet=not parallel.first()) as bar:
        for i, item in enumerate(items):
            if i % STRIDE == 0:
                bar(i, len(items))
            yield item
        bar(len(items), len(items))
