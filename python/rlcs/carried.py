"""Groups between two waves, as JSON's types: those that are carried, and those that were answered ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .rewards import Verdict
from .types import Group, Rollout, Task


def state_of(group: Group) -> dict[str, Any]:
    """A group without its task, whose id stands for it."""
    rows = [
        {
            "token_ids": r.token_ids.tolist(),
            "logprobs": r.logprobs.tolist(),
            "sampled": r.sampled.tolist(),
            "text": r.text,
            "finish_reason": r.finish_reason,
            "verdict": [r.verdict.outcome, r.verdict.score, r.verdict.detail],
        }
        for r in group.rollouts
    ]
    return {"task": group.task.id, "wave": group.wave, "rollouts": rows}


def groups_of(states: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task]) -> list[Group]:
    """Groups of such states, as far as their tasks are still there."""
    return [
        Group(tasks[one["task"]], tuple(map(_rollout, one["rollouts"])), one["wave"])
        for one in states
        if one["task"] in tasks
    ]


def _rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(
        np.array(row["token_ids"], dtype=np.int64),
        np.array(row["logprobs"], dtype=np.float32),
        np.array(row["sampled"], dtype=bool),
        row["text"],
        row["finish_reason"],
        Verdict(*row["verdict"]),
    )
