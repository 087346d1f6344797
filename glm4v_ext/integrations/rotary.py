"""The rotary ops in the shapes that other codebases call them in.

transformers, vLLM and SGLang hand tables of cosines and sines from layer to layer; the ops take positions and compute
the angles themselves, which reads less memory and has no table's end (:func:`glm4v_ext.rope_3d` says up to which
positions it is exact). So the calls below have the others' shapes, with positions where the tables were.
Dims: B batch, S tokens each, T tokens, P patches, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.rope_2d import rope_2d
from ..ops.rope_3d import rope_3d


class Rotary(NamedTuple):
    """What a rotary embedding is, but for the positions; :func:`glm4v_ext.rope_3d` explains the fields."""

    theta: float = 1e4
    sections: Sequence[int] = (8, 12, 12)
    rotary_dim: int = 64
    interleaved: bool = True

    def unsqueeze(self, dim: int) -> Tensor:
        """What transformers' own attention asks first of the sines in whose place it was handed this."""
        there = "one whose layer or forward has changed since: enable(model) again, or with rope=False"
        raise RuntimeError(f"rotary: attention must be enabled where its rotary embedding is, got {there}")


GLM_4_1V = Rotary()


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, position_ids: Tensor, rotary: Rotary = GLM_4_1V, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' ``apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)`` of GLM's language models.

    Args:
        q: ``[B, H, S, D]``, or ``[B, S, H, D]`` with ``unsqueeze_dim=2``.
        k: the same with K heads.
        position_ids: ``[3, B, S]`` (time, row, column), or ``[B, S]`` for text alone; B may be 1.
        rotary: the embedding's settings.

    Returns:
        The turned q and k, in the order of dims they came in.

    Raises:
        RuntimeError: an argument does not fit; the text names it.
    """
    if unsqueeze_dim not in (1, 2):
        raise RuntimeError(f"apply_rotary_pos_emb: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    letters, along = ("[B, H, S, D]", 2) if unsqueeze_dim == 1 else ("[B, S, H, D]", 1)
    for name, x in (("q", q), ("k", k)):  # as tokens in a row they might fit where B and S don't
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[along] != q.shape[along]:
            expected = f"{letters} with one B and one S for q and k"
            raise RuntimeError(f"apply_rotary_pos_emb: {name} must be {expected}, got {list(x.shape)}")
    if unsqueeze_dim == 1:
        turned = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), position_ids, rotary, 2)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
    theta, sections, rotary_dim, interleaved = _settings("apply_rotary_pos_emb", rotary)
    rows, given = q.shape[:2], position_ids.shape
    if len(given) > 3 or any(n not in (1, m) for n, m in zip(given[::-1], (*rows[::-1], 3), strict=False)):
        expected = f"[3, B, S] or [B, S], [B, S] = {list(rows)}"
        raise RuntimeError(f"apply_rotary_pos_emb: position_ids must be {expected}, got {list(given)}")
    positions = position_ids.expand(3, *rows).flatten(1)
    turned = rope_3d(q.flatten(0, 1), k.flatten(0, 1), positions, sections, theta, rotary_dim, interleaved)
    return turned[0].unflatten(0, rows), turned[1].unflatten(0, rows)


def apply_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, position_ids: Tensor, rotary: Rotary = GLM_4_1V
) -> tuple[Tensor, Tensor]:
    """transformers' ``apply_rotary_pos_emb_vision(q, k, cos, sin)`` of GLM's vision towers.

    Args:
        q: ``[P, H, D]``.
        k: the same.
        position_ids: ``[P, 2]``, row and column of each patch.
        rotary: only its theta counts.

    Returns:
        The turned q and k.

    Raises:
        RuntimeError: an argument does not fit; the text names it.
    """
    return rope_2d(q, k, position_ids, _settings("apply_rotary_pos_emb_vision", rotary).theta)


def _settings(name: str, rotary: Rotary) -> Rotary:
    if not isinstance(rotary, Rotary):  # sines, where one still writes cos, sin
        raise RuntimeError(f"{name}: rotary must be a Rotary, got {type(rotary).__name__}")
    return rotary


class MRotaryEmbedding(nn.Module):
    """vLLM's and SGLang's ``MRotaryEmbedding``: the same arguments, the same call, gradients besides, and no table.

    Args:
        head_size: D.
        rotary_dim: how many dims of a head turn.
        max_position_embeddings: accepted; :func:`glm4v_ext.rope_3d` says which positions are served exactly.
        base: theta.
        is_neox_style: pairs of two halves, not of adjacent dims (GLM-4.1V's are adjacent: False).
        dtype: accepted; q and k keep theirs.
        mrope_section: pairs that turn by time, row and column.
    """

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position_embeddings: int,
        base: float,
        is_neox_style: bool,
        dtype: torch.dtype | None = None,
        mrope_section: Sequence[int] = (8, 12, 12),
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.rotary = Rotary(base, tuple(mrope_section), rotary_dim, not is_neox_style)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``positions [3, T]`` (or ``[T]`` for text), ``query [T, H * D]`` or ``[T, H, D]``, ``key`` with K heads;
        returns both turned, in their shapes."""
        for name, x in (("query", query), ("key", key)):
            if (
                x.dim() not in (2, 3)
                or x.shape[-1] % self.head_size
                or (x.dim() == 3 and x.shape[-1] != self.head_size)
            ):
                expected = f"[T, heads * {self.head_size}] or [T, heads, {self.head_size}]"
                raise RuntimeError(f"MRotaryEmbedding: {name} must be {expected}, got {list(x.shape)}")
        q, k = (x.flatten(1).unflatten(-1, (-1, self.head_size))[None] for x in (query, key))
        q, k = apply_rotary_pos_emb(q, k, positions.unsqueeze(-2), self.rotary, unsqueeze_dim=2)
        return q.reshape(query.shape), k.reshape(key.shape)
