"""A wave's answers in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .types import Group


def means(groups: Sequence[Group]) -> dict[str, float]:
    """What a wave's answers were like, over all and by domain."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    known = [[r for r in group.rewards if r is not None] for group in groups]

    def share(outcome: str) -> float:
        return sum(r.verdict.outcome == outcome for r in rollouts) / len(rollouts)

    row = {
        "reward": float(np.mean([r for rewards in known for r in rewards] or [np.nan])),
        "pass_at_k": float(np.mean([max(rewards) for rewards in known if rewards] or [np.nan])),
        "length": float(np.mean([len(r.token_ids) for r in rollouts])),
        "forced": sum(r.forced for r in rollouts) / len(rollouts),
        "unfinished": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "format": share("format"),
        "verifier_errors": share("error"),
    }
    forced = [r.reward for r in rollouts if r.forced and r.reward is not None]
    if forced:
        row["reward_forced"] = float(np.mean(forced))
    for domain in dict.fromkeys(group.task.domain for group in groups):
        here = [
            rewards for group, rewards in zip(groups, known, strict=True) if group.task.domain == domain and rewards
        ]
        if here:
            row[f"reward/{domain}"] = float(np.mean([r for rewards in here for r in rewards]))
            row[f"pass_at_k/{domain}"] = float(np.mean([max(rewards) for rewards in here]))
    return row


def idle(row: Mapping[str, float]) -> str:
    """What a person is told of a wave without a valid group: a run may go on like that to its end."""
    causes = {
        "unfinished": "of answers unfinished (--rollout.max-new-tokens)",
        "format": "of a bad format",
        "verifier_errors": "not judged",
    }
    shares = [f"{row[name]:.0%} {said}" for name, said in causes.items() if row[name]]
    return ", ".join([f"nothing is learned, no group is valid: reward {row['reward']:.3f}", *shares])
