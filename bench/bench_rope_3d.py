"""rope_3d against transformers' function (given cos and sin), the definition and the definition under torch.compile."""

import pytest
import torch
from transformers.models.glm4v.modeling_glm4v import apply_rotary_pos_emb

from bench.peers import compiled
from bench.shapes import HEAD_DIM, PROMPTS, TEXT_HEADS, TEXT_KV_HEADS, cases
from glm4v_ext import reference, rope_3d, rope_3d_


@pytest.mark.parametrize("tokens", cases({"S1": 1, **PROMPTS}, quick=["S1", "S4096"]))
def bench_rope_3d(race, device, dtype, tokens, backward):
    q, k = (
        torch.randn(tokens, heads, HEAD_DIM, device=device).to(dtype).requires_grad_(backward)
        for heads in (TEXT_HEADS, TEXT_KV_HEADS)
    )
    own_q, own_k = q.detach().clone(), k.detach().clone()
    position_ids = torch.arange(tokens, device=device).expand(3, tokens).contiguous()
    frequencies = 1e4 ** (-torch.arange(32, device=device) / 32)
    angles = (position_ids[0, :, None] * frequencies).repeat_interleave(2, -1)
    cos, sin = angles.cos()[None].to(dtype), angles.sin()[None].to(dtype)
    heads = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    fast = compiled(reference.rope_3d)

    def in_place():  # turns its own copy on and on; the first turn is the one that is compared
        rope_3d_(own_q, own_k, position_ids)
        return own_q, own_k

    def transformers():
        return tuple(x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads, cos, sin))

    peers = {
        "glm4v_ext": in_place,
        "transformers": transformers,
        "out of place": lambda: rope_3d(q, k, position_ids),
        "definition": lambda: reference.rope_3d(q, k, position_ids),
        "compiled": lambda: fast(q, k, position_ids),
    }
    if backward:
        peers["glm4v_ext"] = peers.pop("out of place")  # keeps its place, the first
    race(
        peers,
        flops=(2 if backward else 1) * 3 * (q.numel() + k.numel()) // 2,
        bytes=(4 if backward else 1) * (q.nbytes + k.nbytes),  # in place, half of the dims are read and written
        leaves=(q, k) if backward else (),
        slow=("compiled",),
        tolerance=5e-4 if dtype == torch.float32 else None,  # transformers' angles are fp32
    )
