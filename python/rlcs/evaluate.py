"""`rlcs eval`: held-out tasks answered and judged: a mean and its error for each domain, sampled and greedy.

Sampled answers at temperature 1 are what RL moves; greedy ones are what a user sees. Both are always shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console

from glm4v import Glm4v, Processor
from glm4v.answer import CLOSE_ANSWER

from . import parallel
from .admission import check_tasks, eval_tasks
from .bounds import PROCESSES, WHOLE, expect_within
from .config import EvalSettings, JudgeSettings
from .data import MOST_BAD
from .engines import Engine
from .engines.native import Native
from .files import expect_writable, write_text
from .progress import Bar
from .prompts import Prompts
from .rewards import concurrency, verify
from .rollout import Answer, RolloutSettings
from .shards import BadRows, BadRule
from .types import Group, Rollout, Task

STREAM = (0, 0, 2)  # behind a seed: numpy fills up with zeros what is shorter, so no other stream begins like this
ROLLOUT, JUDGE = RolloutSettings(), JudgeSettings()  # defaults
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """Mean score of one domain (``all``: the mean over domains) and its standard error over tasks."""

    domain: str
    mode: str  # "sampled" or "greedy"
    mean: float
    error: float
    tasks: int
    format_share: float  # answers of a bad format
    forced_share: float
    tokens: float  # mean length
    # How much more another domain's verifier grants the same answers, and its standard error.
    lenience: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """What one process has to say to some tasks that all processes have been given."""

    tasks: Sequence[Task]
    version: int  # of the weights that answer
    judged: Mapping[int, tuple[Rollout, ...]]  # by the number of the task

    def groups(self) -> list[Group]:
        """The answers of all processes, in the order of the tasks. All must ask, from the thread that trains."""
        found = {i: each for share in parallel.gather(self.judged) for i, each in share.items()}
        return [Group(task, found[i], self.version) for i, task in enumerate(self.tasks)]


def answer(
    model: Glm4v | Engine,
    tasks: Sequence[Task],
    prompts: Prompts,
    group: int,
    seed: tuple[int, ...],
    settings: RolloutSettings,
    progress: Progress | None = None,
) -> list[Group]:
    """``group`` judged answers to each task, in the order of the tasks, by ``model`` or another engine."""
    engine = Native(model) if isinstance(model, Glm4v) else model
    return answer_share(engine, tasks, prompts, group, seed, settings, 0, progress).groups()


def answer_share(
    engine: Engine,
    tasks: Sequence[Task],
    prompts: Prompts,
    group: int,
    seed: tuple[int, ...],
    settings: RolloutSettings,
    version: int,
    progress: Progress | None = None,
) -> Share:
    """Judged answers to those of the tasks that are this process's; it asks nothing of the others.

    Rules judge at once. Verdicts that wait for a judge or a worker are waited for in threads while the engine goes on.
    """
    share = engine.share(len(tasks))
    mine = [tasks[i] for i in share]
    made = [prompts.outline(task.id, task.messages) for task in mine]
    seeds = [(*seed, i) for i in share]
    close = prompts.processor.codec.specials.get(CLOSE_ANSWER)
    waiting = {domain: concurrency(domain) for domain in {task.domain for task in tasks}}
    threads = ThreadPoolExecutor(max([1, *waiting.values()]), "verdict")
    found: dict[int, list[Rollout | Future[Rollout]]] = {}
    try:
        for i, answers in engine.rollouts(mine, made, group, seeds, settings, progress):
            calls = [partial(judge, mine[i], one, close) for one in answers]
            found[i] = [threads.submit(call) if waiting[mine[i].domain] else call() for call in calls]
        judged = [[one.result() if isinstance(one, Future) else one for one in found[i]] for i in range(len(mine))]
        return Share(tasks, version, {i: tuple(each) for i, each in zip(share, judged, strict=True)})
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def judge(task: Task, answer: Answer, close: int | None = None) -> Rollout:
    """An answer with the verdict of its domain. ``close`` is the id of ``</answer>``, which often is the stop token:
    verifiers read it as part of the answer."""
    text = answer.text + (CLOSE_ANSWER if answer.token_ids[-1] == close else "")
    return Rollout(
        token_ids=answer.token_ids,
        logprobs=answer.logprobs,
        sampled=answer.sampled,
        text=text,
        finish_reason=answer.finish_reason,
        verdict=verify(task.domain, text, task.truth, task.question),
    )


def evaluate(
    model: Glm4v,
    tasks: Sequence[Task],
    prompts: Prompts,
    settings: RolloutSettings,
    samples: int = 1,
    greedy: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
    proxies: Mapping[str, str] | None = None,
) -> list[Score]:
    """Scores by domain, and over all; a verifier error is left out of the mean.

    ``proxies`` (domain -> a held-out one) says whose verifiers judge the sampled answers of others as well.
    """
    modes = [("sampled", samples, dataclasses.replace(settings, temperature=1.0, top_p=1.0))] if samples else []
    modes += [("greedy", 1, dataclasses.replace(settings, temperature=0.0))] if greedy else []
    scores = []
    for mode, count, how in modes:
        groups = answer(model, tasks, prompts, count, (seed, *STREAM), how, progress=progress)
        others = proxies if mode == "sampled" else None
        scores += parallel.on_first(partial(scores_of, groups, mode, others))  # a judge may say two things
    return scores


def scores_of(groups: Sequence[Group], mode: str, proxies: Mapping[str, str] | None = None) -> list[Score]:
    """One score for each domain, and the mean over domains."""
    others = [(name, held_out) for name, held_out in (proxies or {}).items() if name != held_out]
    scores = []
    for domain in dict.fromkeys(group.task.domain for group in groups):
        here = [group for group in groups if group.task.domain == domain]
        means = [np.mean(known) for g in here if (known := [r for r in g.rewards if r is not None])]
        answers = [rollout for group in here for rollout in group.rollouts]
        scores.append(
            Score(
                domain=domain,
                mode=mode,
                mean=float(np.mean(means)) if means else math.nan,
                error=float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan,
                tasks=len(here),
                format_share=sum(r.verdict.outcome == "format" for r in answers) / len(answers),
                forced_share=sum(r.forced for r in answers) / len(answers),
                tokens=float(np.mean([len(r.token_ids) for r in answers])),
                lenience={name: lenience(here, name) for name, held_out in others if held_out == domain},
            )
        )
    if not scores:
        return []

    def over(name: str) -> float:
        return float(np.mean([getattr(score, name) for score in scores]))

    error = math.sqrt(sum(score.error**2 for score in scores)) / len(scores)
    shares = (over("format_share"), over("forced_share"), over("tokens"))
    return [*scores, Score("all", mode, over("mean"), error, sum(s.tasks for s in scores), *shares)]


def lenience(groups: Sequence[Group], domain: str) -> tuple[float, float]:
    """What the verifier of ``domain`` grants these groups' answers beyond their own verdicts: mean over groups of the
    mean difference, and its standard error. Answers that one of the two cannot judge are left out; NaN if all are."""

    def gap(group: Group, rollout: Rollout) -> float | None:
        task = group.task
        other = verify(domain, rollout.text, task.truth, task.question)
        return None if other.failed or rollout.reward is None else other.score - rollout.reward

    with ThreadPoolExecutor(max(1, concurrency(domain)), "verdict") as threads:
        waiting = [[threads.submit(gap, group, rollout) for rollout in group.rollouts] for group in groups]
        found = [[one for future in each if (one := future.result()) is not None] for each in waiting]
    means = [np.mean(gaps) for gaps in found if gaps]
    if not means:
        return math.nan, math.nan
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def flat(scores: Sequence[Score]) -> dict[str, float]:
    """As a row of metrics: ``sampled/ocr``, ``sampled/ocr/error``, ..."""
    row: dict[str, float] = {}
    for score in scores:
        row[f"{score.mode}/{score.domain}"] = score.mean
        row[f"{score.mode}/{score.domain}/error"] = score.error
        row[f"{score.mode}/{score.domain}/tasks"] = float(score.tasks)
        row[f"{score.mode}/{score.domain}/format"] = score.format_share
        row[f"{score.mode}/{score.domain}/forced"] = score.forced_share
        row[f"{score.mode}/{score.domain}/tokens"] = score.tokens
        for name, (mean, error) in score.lenience.items():
            row[f"{score.mode}/{score.domain}/lenience/{name}"] = mean
            row[f"{score.mode}/{score.domain}/lenience/{name}/error"] = error
    return row


def table(scores: Sequence[Score]) -> Any:
    """Scores for a terminal; what is not known, as an error by one task, is a dash."""
    from rich.table import Table

    def known(x: float) -> str:
        return "–" if math.isnan(x) else f"{x:.3f}"

    out = Table("domain", "mode", "score", "± error", "tasks", "bad format", "forced", "tokens")
    for score in scores:
        shares = (f"{score.format_share:.1%}", f"{score.forced_share:.1%}", f"{score.tokens:.0f}")
        out.add_row(score.domain, score.mode, known(score.mean), known(score.error), str(score.tasks), *shares)
    return out


def evaluate_files(
    model: Path,
    tasks: Path,
    samples: int = 1,
    greedy: bool = True,
    limit: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    bad_rows: BadRule = "fatal",
    max_bad_rows: int = MOST_BAD,
    rollout: RolloutSettings = ROLLOUT,
    judge: JudgeSettings = JUDGE,
) -> list[Score]:
    """Answers held-out tasks, sampled at temperature 1 and greedy, and prints scores with their standard errors.

    Args:
        model: a checkpoint in Hugging Face layout.
        tasks: JSON lines as `rlcs train` reads them.
        samples: answers to each task at temperature 1; 0 leaves them out.
        greedy: also one answer at temperature 0.
        limit: at most so many tasks of each domain.
        seed: of the sampling.
        out: also write the scores to this JSON file; null for what is not known.
        threads: of torch.
        device: where the model answers, such as cuda.
        bad_rows: skip leaves out tasks that cannot be read, asked or judged; each is told.
        max_bad_rows: that are left out, before it is an error after all.
        rollout: how answers are made.
        judge: who judges what rules leave open.
    """
    how = EvalSettings(tasks, limit, samples, greedy)
    bounds = {"seed": (0, WHOLE), "threads": (1, PROCESSES), "max_bad_rows": (0, WHOLE)}
    expect_within("eval", SimpleNamespace(seed=seed, threads=threads, max_bad_rows=max_bad_rows), **bounds)
    rollout.expect_for_evaluation("eval")
    if threads is not None:
        torch.set_num_threads(threads)
    judge.use()
    where = parallel.device(device)
    processor = Processor.from_pretrained(model)
    bar = Bar("evaluation")
    bad = BadRows(bad_rows, max_bad_rows, bar.note)
    chosen = check_tasks(eval_tasks(how, bad), rollout, processor, bad)
    if out is not None:
        expect_writable(out)
    reader = Glm4v.from_pretrained(model, device=where)
    processor.dtype = reader.dtype
    prompts, reader.processor = Prompts(processor), processor
    with bar:
        chosen = _decodable(chosen, prompts, bad, bar.inner("pictures"))
        inner = bar.inner("answers")
        scores = evaluate(reader, chosen, prompts, rollout, samples, greedy, seed, inner)
    if out is not None:
        try:
            write_text(out, json.dumps([_row(score) for score in scores], indent=1) + "\n")
        except OSError:
            Console().print(table(scores))  # the disk is full by now, perhaps: they took hours
            raise
    return scores


def _decodable(tasks: Sequence[Task], prompts: Prompts, bad: BadRows, progress: Progress) -> list[Task]:
    """The tasks whose pictures can be decoded, which headers don't tell: before answers that one more would lose."""
    good = []
    for i, task in enumerate(tasks, 1):
        try:
            prompts(task.id, task.messages)
            good.append(task)
        except ValueError as error:
            bad(f"task {task.id!r}", error)
        progress(i, len(tasks))
    if not good:
        raise ValueError("data: a task must have pictures that can be decoded, got none")
    return good


def _row(score: Score) -> dict[str, Any]:
    """As JSON, which has no name for NaN: what is not known is null."""
    row = dataclasses.asdict(score)
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()}
