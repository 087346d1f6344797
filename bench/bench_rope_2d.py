"""rope_2d on parts of a qkv against transformers' function, the definition and the definition under torch.compile."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import (
    Glm4vVisionConfig,
    Glm4vVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)

from bench.peers import compiled
from bench.shapes import GRIDS, HEAD_DIM, VISION_HEADS, VISION_WIDTH, block_positions, cases
from glm4v_ext import reference, rope_2d, rope_2d_


@pytest.mark.parametrize("grid", cases(GRIDS, quick=["1344x1344"]))
def bench_rope_2d(race, device, dtype, grid, backward):
    position_ids = block_positions(*grid).to(device)
    qkv = torch.randn(len(position_ids), 3, VISION_HEADS, HEAD_DIM, device=device).to(dtype)
    q, k, _ = qkv.unbind(1)
    own_q, own_k, _ = qkv.clone().unbind(1)
    config = Glm4vVisionConfig(hidden_size=VISION_WIDTH, num_heads=VISION_HEADS)
    cos, sin = Glm4vVisionRotaryEmbedding(config).to(device)(q, position_ids)
    fast = compiled(reference.rope_2d)

    def in_place():  # turns its own copy on and on; the first turn is the one that is compared
        rope_2d_(own_q, own_k, position_ids)
        return own_q, own_k

    peers = {
        "glm4v_ext": in_place,
        "transformers": lambda: apply_rotary_pos_emb_vision(q, k, cos, sin),
        "out of place": lambda: rope_2d(q, k, position_ids),
        "definition": lambda: reference.rope_2d(q, k, position_ids),
        "compiled": lambda: fast(q, k, position_ids),
    }
    if backward:
        peers["glm4v_ext"] = peers.pop("out of place")  # keeps its place, the first
    race(
        peers,
        flops=(2 if backward else 1) * 3 * (q.numel() + k.numel()),
        bytes=(4 if backward else 2) * (q.nbytes + k.nbytes),
        leaves=(q, k) if backward else (),
        slow=("compiled",),
        tolerance=1e-4 if dtype == torch.float32 else None,  # transformers' angles are fp32
    )
