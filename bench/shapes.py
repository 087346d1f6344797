"""The real shapes of GLM-4.1V-9B by name; every benchmark takes its cases from here.

Dims: T tokens, P patches, H query heads, K kv heads, D head dim, C width, S context length, B batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

# Vision tower and merger.
VISION_WIDTH, VISION_HEADS, VISION_INNER, MERGED_WIDTH, MERGER_INNER = 1536, 12, 4096, 4096, 13696
# Language model.
TEXT_WIDTH, TEXT_HEADS, TEXT_KV_HEADS, TEXT_INNER = 4096, 32, 2, 13696
HEAD_DIM = 128
PATCH_VALUES = 3 * 2 * 14 * 14

# Name -> patch grid (t, h, w). The first entry of a table is the one that --quick keeps.
GRIDS = {"336x336": (1, 24, 24), "672x672": (1, 48, 48), "1344x1344": (1, 96, 96)}
# Name -> patch grid of the whole tower's cases.
TOWER_GRIDS = {"336x336": (1, 24, 24), "784x784": (1, 56, 56), "1344x1344": (1, 96, 96)}
# Name -> sequence lengths of one packed vision attention call.
SEQUENCES = {"336x336": [576], "672x672": [2304], "1344x1344": [9216], "64x112x112": [64] * 64}
# Name -> tokens of one prompt.
PROMPTS = {"S512": 512, "S1024": 1024, "S2048": 2048, "S4096": 4096, "S8192": 8192}
# Name -> (sequences, cached tokens each) of one decoding step.
DECODE = {f"B{b}-KV{s}": (b, s) for b in (1, 8) for s in (4096, 512, 2048, 8192, 32768)}


def block_positions(t: int, h: int, w: int) -> Tensor:
    """Row and column ``[t * h * w, 2]`` of each patch, the four of a merge block side by side."""
    cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
    return cells.view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2).repeat(t, 1)


def cases(table: dict[str, Any], quick: Iterable[str] = ()) -> list[Any]:
    """Parameters named as in ``table``; --quick keeps those named in ``quick``, by default the first."""
    kept = set(quick) or set(list(table)[:1])
    return [pytest.param(v, id=k, marks=() if k in kept else pytest.mark.full) for k, v in table.items()]
