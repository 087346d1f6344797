"""Every op in plain PyTorch: the definition, the oracle of the tests and the baseline of the benchmarks.

Each function takes the arguments of the public op of its name and works in the dtype of its inputs, so that the same
code run in float64 is the exact answer and run in bfloat16 is what plain PyTorch makes of it.
Dims: T tokens, H query heads, K kv heads, D head dim, C width, P patches, I images, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32 for the training dtypes, fp64 where the oracle asks for it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.to(_statistics_dtype(x))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def patchify(
    frames: Tensor,  # uint8 [F, H, W, 3]
    mean: Sequence[float],
    std: Sequence[float],
    temporal_patch_size: int = 2,
    patch_size: int = 14,
    merge_size: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    (f, height, width, _), d, p, m = frames.shape, temporal_patch_size, patch_size, merge_size
    t, h, w = -(-f // d), height // p, width // p
    repeats = [min(i, f - 1) for i in range(t * d)]
    pixels = (frames[repeats].double() * (1 / 255)).float()
    pixels = (pixels - pixels.new_tensor(mean)) / pixels.new_tensor(std)
    pixels = pixels.view(t, d, h // m, m, p, w // m, m, p, 3)
    # (time, block row, block column, row in block, column in block), then (channel, frame, y, x) inside a patch
    patches = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    return patches.to(dtype), torch.tensor([[t, h, w]], device=frames.device)


def _bicubic_matrix(target: int, source: int) -> Tensor:
    """[target, source] fp64: what each of `source` cells gives to each of `target` cells over the same extent.

    Keys' kernel with a = -0.75, taps clamped to the border: `grid_sample(mode="bicubic", align_corners=False,
    padding_mode="border")` along one axis.
    """
    a = -0.75
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    first = position.floor()

    def near(d: Tensor) -> Tensor:  # |d| <= 1
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:  # 1 <= |d| <= 2
        return ((d - 5) * d + 8) * d * a - 4 * a

    d = position - first
    weights = torch.stack((far(d + 1), near(d), near(1 - d), far(2 - d)), -1)
    taps = (first[:, None] + torch.arange(-1, 3)).clamp(0, source - 1).long()
    return torch.zeros(target, source, dtype=torch.float64).scatter_add(1, taps, weights)


def interpolate_pos_embed(x: Tensor, table: Tensor, grid_thw: Tensor) -> Tensor:
    wide, c = _statistics_dtype(table), table.shape[-1]
    s = math.isqrt(table.shape[0])
    square = table.to(wide).view(s, s, c)
    adapted = []
    for t, h, w in grid_thw.tolist():
        rows, columns = (_bicubic_matrix(n, s).to(square) for n in (h, w))
        grid = torch.einsum("hr,wc,rcn->hwn", rows, columns, square)
        blocks = grid.view(h // 2, 2, w // 2, 2, c).transpose(1, 2).reshape(h * w, c)
        adapted.append(blocks.repeat(t, 1))
    return x + torch.cat([square.new_empty(0, c), *adapted]).to(table.dtype)


def _frequencies(count: int, theta: float, like: Tensor) -> Tensor:
    """[count] fp64: theta ** (-i / count)."""
    return theta ** (-torch.arange(count, dtype=torch.float64, device=like.device) / count)


def _rotate(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:  # [T, H, D], [T, R/2] fp64
    """Pairs of the first R dims turned by `angles`: adjacent ones, or one of each half. The other dims pass through."""
    rotary_dim = 2 * angles.shape[-1]
    wide = x[..., :rotary_dim].to(_statistics_dtype(x))
    cos, sin = (table.to(wide.dtype)[:, None] for table in (angles.cos(), angles.sin()))
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)


def rope_2d(q: Tensor, k: Tensor, position_ids: Tensor, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    frequencies = _frequencies(q.shape[-1] // 4, theta, position_ids)
    angles = (position_ids.double()[:, :, None] * frequencies).flatten(1)  # rows' angles, then columns'
    return _rotate(q, angles, False), _rotate(k, angles, False)


def rope_3d(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    sections: Sequence[int] = (8, 12, 12),
    theta: float = 1e4,
    rotary_dim: int = 64,
    interleaved: bool = True,
) -> tuple[Tensor, Tensor]:
    frequencies = _frequencies(rotary_dim // 2, theta, position_ids).split(list(sections))
    angles = torch.cat([p[:, None] * f for p, f in zip(position_ids.double(), frequencies, strict=True)], -1)
    return _rotate(q, angles, interleaved), _rotate(k, angles, interleaved)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return residual + rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, still: bool = False) -> Tensor:
    frames = patches.reshape(-1, *weight.shape[1:])  # [P, 3, 2, 14, 14]
    if still:  # both frames of a patch are equal: the first times the sum of the weight's two
        frames, weight = frames[:, :, :1], weight.sum(2, keepdim=True)
    return F.conv3d(frames, weight, bias).flatten(1)


def merge_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blocks = x.reshape(-1, 2, 2, x.shape[-1]).permute(0, 3, 1, 2)  # patches arrive block by block
    return F.conv2d(blocks, weight, bias).flatten(1)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    (batch, queries, heads, dim), kv_heads, wide = q.shape, k_cache.shape[2], _statistics_dtype(q)
    left, right = window_size[0], 0 if causal else window_size[1]
    outs, lses = [], []
    for b in range(batch):
        if block_table is not None:  # [B, max_pages] -> where each key of the sequence lies
            page, offset = block_table[b].long()[:, None], torch.arange(k_cache.shape[1], device=q.device)
            slots = (page * k_cache.shape[1] + offset).flatten()
        else:
            row = b if cache_batch_idx is None else int(cache_batch_idx[b])
            slots = row * k_cache.shape[1] + torch.arange(k_cache.shape[1], device=q.device)
        lengths = len(slots) if cache_seqlens is None else cache_seqlens
        end = lengths if isinstance(lengths, int) else int(lengths[b])
        at = (slots // k_cache.shape[1], slots % k_cache.shape[1])
        if k is not None and v is not None:
            new = slice(end, end + k.shape[1])
            k_cache[at[0][new], at[1][new]], v_cache[at[0][new], at[1][new]] = k[b], v[b]
            end = new.stop
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        keys, values = (c[at[0][begin:end], at[1][begin:end]] for c in (k_cache, v_cache))  # [L, K, D]
        keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[b], keys).to(wide) * (
            dim**-0.5 if softmax_scale is None else softmax_scale
        )
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(begin, end, device=q.device) - (
            torch.arange(queries, device=q.device)[:, None] + end - queries
        )
        hidden = ((distance < -left) & (left >= 0)) | ((distance > right) & (right >= 0))
        scores = scores.masked_fill(hidden, -math.inf)
        weights = torch.softmax(scores, -1).masked_fill(hidden.all(-1, keepdim=True), 0)  # no key seen: zeros
        outs.append(torch.einsum("hqk,khd->qhd", weights.to(values.dtype), values))
        lses.append(torch.logsumexp(scores, -1))
    out, lse = torch.stack(outs), torch.stack(lses)
    return (out, lse) if return_softmax_lse else out
