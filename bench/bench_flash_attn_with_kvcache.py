"""One decoding step of the language model's attention against transformers' paths over its cache.

``transformers`` is what ``generate`` runs without a padding mask, ``masked`` with one, ``packed`` is sdpa on query
heads packed by hand; on a GPU there is flash-attention. Rates are of the keys and values read.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.peers import gpu_package
from bench.shapes import DECODE, HEAD_DIM, TEXT_HEADS, TEXT_KV_HEADS, cases
from glm4v_ext import flash_attn_with_kvcache


@pytest.mark.parametrize("context", cases(DECODE, quick=["B1-KV512", "B1-KV4096", "B8-KV4096"]))
def bench_decode(race, device, dtype, context):
    batch, length = context
    q = torch.randn(batch, 1, TEXT_HEADS, HEAD_DIM, device=device).to(dtype)
    k, v = (torch.randn(batch, length, TEXT_KV_HEADS, HEAD_DIM, device=device).to(dtype) for _ in "kv")
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    group = TEXT_HEADS // TEXT_KV_HEADS
    module = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    theirs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # [B, H, 1, D], [B, K, S, D]
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
    peers = {
        "glm4v_ext": lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True),
        "transformers": lambda: sdpa_attention_forward(module, *theirs, None)[0],
        "masked": lambda: sdpa_attention_forward(module, *theirs, mask)[0],
        "packed": lambda: scaled_dot_product_attention(theirs[0].unflatten(1, (-1, group)).squeeze(3), *theirs[1:]),
    }
    flash = gpu_package("flash_attn", device)
    if flash and dtype != torch.float32:
        peers["flash-attn"] = lambda: flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    race(peers, flops=4 * batch * length * TEXT_HEADS * HEAD_DIM, bytes=k.nbytes + v.nbytes)
