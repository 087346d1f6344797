"""Every op in plain PyTorch: the definition, the oracle of the tests and the baseline of the benchmarks.

Each function takes the arguments of the public op of its name and works in the dtype of its inputs, so that the same
code run in float64 is the exact answer and run in bfloat16 is what plain PyTorch makes of it.
Dims: T tokens, H query heads, K kv heads, D head dim, C width, P patches, I images, N sequences,
V vocabulary.
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


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight).to(_statistics_dtype(hidden)) / temperature
    logprobs = logits.log_softmax(-1)
    logprob = logprobs.gather(-1, targets.long()[:, None]).squeeze(-1)
    return (logprob, -(logprobs.exp() * logprobs).sum(-1)) if return_entropy else logprob


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, still: bool = False) -> Tensor:
    frames = patches.reshape(-1, *weight.shape[1:])  # [P, 3, 2, 14, 14]
    if still:  # both frames of a patch are equal: the first times the sum of the weight's two
        frames, weight = frames[:, :, :1], weight.sum(2, keepdim=True)
    return F.conv3d(frames, weight, bias).flatten(1)


def merge_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blocks = x.reshape(-1, 2, 2, x.shape[-1]).permute(0, 3, 1, 2)  # patches arrive block by block
    return F.conv2d(blocks, weight, bias).flatten(1)


def _visible(rows: int, keys: int, causal: bool, window_size: tuple[int, int], device: torch.device) -> Tensor:
    """[rows, keys] bool, aligned to the bottom right corner; -1 is unbounded."""
    left, right = window_size[0], 0 if causal else window_size[1]
    distance = torch.arange(keys, device=device) - torch.arange(rows, device=device)[:, None] - (keys - rows)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """One sequence: q [Sq, H, D], k and v [Sk, K, D] -> out [Sq, H, D], lse [H, Sq]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(hidden.detach().to(_statistics_dtype(q)), dim=-1)
    # A row without a visible key has no softmax: give it a uniform one, which the last mask makes 0.
    blind = ~visible.any(dim=-1, keepdim=True)
    weights = hidden.masked_fill(blind, 0).softmax(dim=-1).masked_fill(~visible, 0)
    return (weights @ v.transpose(0, 1)).transpose(0, 1), lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for n in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        kn, vn = k[keys], v[keys]
        if block_table is not None:
            length = keys.stop - keys.start
            kn, vn = (x[block_table[n].long()].flatten(0, 1)[:length] for x in (k, v))
        visible = _visible(rows.stop - rows.start, len(kn), causal, window_size, q.device)
        out, lse = _attend(q[rows], kn, vn, scale, visible, softcap)
        outs.append(out)
        lses.append(lse)
    padding = len(q) - starts_q[-1]
    out = torch.cat([*outs, q.new_zeros(padding, *q.shape[1:])])
    lse = torch.cat(
        [*lses, torch.full((q.shape[1], padding), float("-inf"), dtype=_statistics_dtype(q), device=q.device)], 1
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = _visible(q.shape[1], k.shape[1], causal, window_size, q.device)
    pairs = [_attend(*x, scale, visible, softcap) for x in zip(q, k, v, strict=True)]
    out, lse = (torch.stack(x) for x in zip(*pairs, strict=True))
    return (out, lse, None) if return_attn_probs else out


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
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    size = k_cache.shape[1]
    pairs = []
    for b in range(q.shape[0]):
        row = torch.tensor([b]) if cache_batch_idx is None else cache_batch_idx[b : b + 1]
        pages = row if block_table is None else block_table[b]
        slots = (pages.to(q.device).long()[:, None] * size + torch.arange(size, device=q.device)).flatten()
        lengths = len(slots) if cache_seqlens is None else cache_seqlens
        end = int(lengths[b] if isinstance(lengths, Tensor) else lengths)
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        if k is not None and v is not None:
            new = slots[end : end + k.shape[1]]
            k_cache[new // size, new % size], v_cache[new // size, new % size] = k[b], v[b]
            end += k.shape[1]
        seen = slots[begin:end]
        visible = _visible(q.shape[1], end - begin, causal, window_size, q.device)
        keys, values = (cache[seen // size, seen % size] for cache in (k_cache, v_cache))
        pairs.append(_attend(q[b], keys, values, scale, visible, softcap))
    out, lse = (torch.stack(x) for x in zip(*pairs, strict=True))
    return (out, lse) if return_softmax_lse else out
