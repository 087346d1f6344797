"""Attention against sdpa per sequence (what transformers' vision tower runs), one sdpa over equal sequences and eager;
on a GPU against cuDNN, torch's own flash-attention and varlen attention, and the flash-attn package.

Causal flops are half of the full ones, backward is 2.5 forwards.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import gpu_package
from bench.shapes import HEAD_DIM, PROMPTS, SEQUENCES, TEXT_HEADS, TEXT_KV_HEADS, VISION_HEADS, cases
from glm4v_ext import flash_attn_varlen_func

PAGES = {f"P{size}": size for size in (256, 16)}
HEAD_DIMS = {f"D{dim}": dim for dim in (64, 80, 96)}
LONG = {f"S{tokens}": tokens for tokens in (8192, 2048, 4096, 16384, 32768)}
RAGGED = [64, 256, 576, 1024, 9216, 2304, 64, 4096]
EAGER_SCORES = 2**30  # bytes of one eager score matrix, at most


def sample(lengths, heads, kv_heads, device, dtype, dim=HEAD_DIM):
    """q, k, v as slices of one packed projection, and cu_seqlens."""
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, device=device).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return qkv.split([heads, kv_heads, kv_heads], dim=1), cu_seqlens


def sdpa(q, k, v, causal=False):
    """[N, S, H, D]"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def by(backend, function):
    def call():
        with sdpa_kernel(backend):
            return function()

    return call


def eager(q, k, v, causal=False):
    """[S, H, D], as transformers' eager_attention_forward."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q @ k.transpose(1, 2) * HEAD_DIM**-0.5
    if causal:
        scores += torch.full(scores.shape[1:], float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(0, 1)


def peers_of(q, k, v, cu_seqlens, lengths, causal):
    longest, sequences = max(lengths), len(lengths)

    def each(function):
        parts = (x.split(lengths) for x in (q, k, v))
        return torch.cat([function(*part, causal) for part in zip(*parts, strict=True)])

    def batched():
        return sdpa(*(x.unflatten(0, (sequences, longest)) for x in (q, k, v)), causal).flatten(0, 1)

    peers = {
        "glm4v_ext": lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=causal),
        "sdpa": lambda: each(lambda *x: sdpa(*(t[None] for t in x[:3]), causal)[0]),
    }
    equal = longest * sequences == len(q)
    if equal and sequences > 1:
        peers["batched sdpa"] = batched
    if equal and q.is_cuda and q.shape == k.shape:  # torch's cuDNN takes no groups of heads
        peers["cudnn"] = by(SDPBackend.CUDNN_ATTENTION, batched)
    if q.is_cuda and q.shape == k.shape and not causal:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        peers["varlen_attn"] = lambda: varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    if longest**2 * q.shape[1] * 4 <= EAGER_SCORES:
        peers["eager"] = lambda: each(eager)
    flash = gpu_package("flash_attn", q.device.type)
    if flash and q.dtype != torch.float32:
        peers["flash-attn"] = lambda: flash.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=causal
        )
    return peers


def moved(q, k, backward):
    """Bytes of q, k, v and out, and on the way back of all of them again and of their gradients."""
    return (3 if backward else 1) * 2 * (q.nbytes + k.nbytes)


@pytest.mark.parametrize("lengths", cases(SEQUENCES, quick=["336x336", "64x112x112"]))
def bench_vision(race, device, dtype, lengths, backward):
    parts, cu_seqlens = sample(lengths, VISION_HEADS, VISION_HEADS, device, dtype)
    q, k, v = (x.requires_grad_(backward) for x in parts)
    flops = (3.5 if backward else 1) * sum(4 * n * n for n in lengths) * VISION_HEADS * HEAD_DIM
    peers = peers_of(q, k, v, cu_seqlens, lengths, False)
    race(peers, flops=flops, bytes=moved(q, k, backward), leaves=(q, k, v) if backward else ())


@pytest.mark.parametrize("tokens", cases(PROMPTS))
def bench_prefill(race, device, dtype, tokens):
    (q, k, v), cu_seqlens = sample([tokens], TEXT_HEADS, TEXT_KV_HEADS, device, dtype)
    flops = 2 * tokens * tokens * TEXT_HEADS * HEAD_DIM
    race(peers_of(q, k, v, cu_seqlens, [tokens], True), flops=flops, bytes=moved(q, k, False))


@pytest.mark.parametrize("size", cases(PAGES, quick=PAGES))
def bench_pages(race, device, dtype, size):
    """A quarter of a prompt, as servers read long ones: its keys and those before stand in pages of a cache."""
    new, seen = (1024, 4096) if device == "cuda" else (256, 1024)
    q = torch.randn(new, TEXT_HEADS, HEAD_DIM, device=device).to(dtype)
    k, v = (torch.randn(seen // size, size, TEXT_KV_HEADS, HEAD_DIM, device=device).to(dtype) for _ in "kv")
    table = torch.randperm(seen // size, device=device).int()[None]
    starts = [torch.tensor([0, n], device=device).int() for n in (new, seen)]
    flat = [x[table[0].long()].flatten(0, 1) for x in (k, v)]
    mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)

    def gathered():
        parts = (x[table[0].long()].flatten(0, 1) for x in (k, v))
        rows = (x.transpose(0, 1)[None] for x in (q, *parts))
        return F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    race(
        {
            "glm4v_ext": lambda: flash_attn_varlen_func(q, k, v, *starts, new, seen, causal=True, block_table=table),
            "without pages": lambda: flash_attn_varlen_func(q, *flat, *starts, new, seen, causal=True),
            "sdpa of gathered": gathered,
        },
        flops=4 * int(mask.sum()) * TEXT_HEADS * HEAD_DIM,
        bytes=moved(q, flat[0], False),
    )


def race_long(race, device, dtype, tokens, causal, backward, dim=HEAD_DIM):
    """16 heads and 16k tokens or more: what kernels for GPUs are compared by."""
    if device == "cpu":
        pytest.skip("for a GPU")
    sequences = max(1, 16384 // tokens)
    parts, cu_seqlens = sample([tokens] * sequences, 16, 16, device, dtype, dim)
    q, k, v = (x.requires_grad_(backward) for x in parts)

    def batched():
        return sdpa(*(x.unflatten(0, (sequences, tokens)) for x in (q, k, v)), causal).flatten(0, 1)

    race(
        {
            "glm4v_ext": lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, tokens, tokens, causal=causal),
            "cudnn": by(SDPBackend.CUDNN_ATTENTION, batched),
            "torch's flash": by(SDPBackend.FLASH_ATTENTION, batched),
        },
        flops=(3.5 if backward else 1) * (2 if causal else 4) * sequences * tokens**2 * 16 * dim,
        bytes=moved(q, k, backward),
        leaves=(q, k, v) if backward else (),
    )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tokens", cases(LONG))
def bench_long(race, device, dtype, tokens, causal, backward):
    race_long(race, device, dtype, tokens, causal, backward)


@pytest.mark.parametrize("dim", cases(HEAD_DIMS, quick=["D80"]))
def bench_head_dims(race, device, dtype, dim, backward):
    """Of other models' towers."""
    race_long(race, device, dtype, 4096, False, backward, dim)


def bench_ragged(race, device, dtype, backward):
    """Pictures of all sizes in one call."""
    if device == "cpu":
        pytest.skip("for a GPU")
    parts, cu_seqlens = sample(RAGGED, VISION_HEADS, VISION_HEADS, device, dtype)
    q, k, v = (x.requires_grad_(backward) for x in parts)
    flops = (3.5 if backward else 1) * sum(4 * n * n for n in RAGGED) * VISION_HEADS * HEAD_DIM
    peers = peers_of(q, k, v, cu_seqlens, RAGGED, False)
    race(peers, flops=flops, bytes=moved(q, k, backward), leaves=(q, k, v) if backward else ())
