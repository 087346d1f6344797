"""Advantages of a group: how much better than its siblings a rollout did (GRPO, arXiv 2402.03300). No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_STD = 1e-6  # below it rewards are equal to rounding, and so are the advantages: zero


def group_advantages(rewards: Sequence[float | None], normalise: bool = True) -> np.ndarray:
    """``(r - mean) / std`` over the rollouts that were judged, ``r - mean`` without ``normalise``; [G] float32.

    The standard deviation is the population's. None (a verifier error) gets NaN, which no loss may use: such rollouts
    are dropped, not trained on as average. A group without spread gets zeros.

    Raises:
        ValueError: a reward is not finite: its siblings would get NaN with it.
    """
    known = np.array([r is not None for r in rewards], dtype=bool)
    out = np.full(len(rewards), np.nan, dtype=np.float32)
    if not known.any():
        return out
    r = np.array([x for x in rewards if x is not None], dtype=np.float64)
    if not np.isfinite(r).all():
        raise ValueError(f"group_advantages: rewards must be finite or None, got {list(rewards)}")
    centred, std = r - r.mean(), r.std()
    if std < LEAST_STD:
        out[known] = 0.0
    else:
        out[known] = centred / std if normalise else centred
    return out
