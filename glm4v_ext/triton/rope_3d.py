"""Rotary embedding of the language model; the kernel is rope.py's. Dims as there."""

from __future__ import annotations

from torch import Tensor

from ..build import checks
from .rope import adjacent, turn


def rope_3d(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    time_pairs: int,
    row_pairs: int,
    column_pairs: int,
    theta: float,
    rotary_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    sections = (time_pairs, row_pairs, column_pairs)
    checks.rope_3d("rope_3d", q, k, position_ids, *sections, theta, rotary_dim, interleaved)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    turn(adjacent(q), adjacent(k), q_out, k_out, position_ids, 0, sections, rotary_dim // 2, theta, interleaved)
    return q_out, k_out


def rope_3d_(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    time_pairs: int,
    row_pairs: int,
    column_pairs: int,
    theta: float,
    rotary_dim: int,
    interleaved: bool,
) -> None:
    sections = (time_pairs, row_pairs, column_pairs)
    checks.rope_3d("rope_3d_", q, k, position_ids, *sections, theta, rotary_dim, interleaved)
    checks.rope_in_place("rope_3d_", q, k)
    turn(q, k, q, k, position_ids, 0, sections, rotary_dim // 2, theta, interleaved)
