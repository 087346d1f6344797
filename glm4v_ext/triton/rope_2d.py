"""Rotary embedding of the vision tower; the kernel is rope.py's. Dims as there, tokens are patches."""

from __future__ import annotations

from torch import Tensor

from ..build import checks
from .rope import adjacent, turn


def rope_2d(q: Tensor, k: Tensor, position_ids: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    checks.rope_2d("rope_2d", q, k, position_ids, theta)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _turn(adjacent(q), adjacent(k), q_out, k_out, position_ids, theta)
    return q_out, k_out


def rope_2d_(q: Tensor, k: Tensor, position_ids: Tensor, theta: float) -> None:
    checks.rope_2d("rope_2d_", q, k, position_ids, theta)
    checks.rope_in_place("rope_2d_", q, k)
    _turn(q, k, q, k, position_ids, theta)


def _turn(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, position_ids: Tensor, theta: float) -> None:
    n = q.shape[2] // 4
    turn(q, k, q_out, k_out, position_ids, 1, (n, n), n, theta, False)
