"""The vision tower and its merger: patches of all pictures in one row to embeddings of the language model.

A grid row (t, h, w) is one picture (t = 1) or the t temporal units of one video; attention stays inside a unit, so a
video row and the same units as t rows of (1, h, w) are the same thing. Patches come in 2x2 merge-block order.
Dims: P patches, I grid rows, H heads, D head dim, C width of the tower, C_out of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm4v_ext import (
    add_rms_norm,
    flash_attn_varlen_func,
    interpolate_pos_embed,
    merge_patches,
    patch_embed,
    rope_2d,
    rope_2d_,
    swiglu,
)

from .config import CHANNELS, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, VisionConfig
from .layers import Kernel, Linear, Mlp, RMSNorm, run


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Kernel(config.hidden_size, CHANNELS, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)

    def forward(self, patches: Tensor) -> Tensor:  # [P, 1176] -> [P, C]
        # Not still=True for images: it saves 0.1 % of the tower, and callers' own pixel_values may hold two frames.
        weight = self.proj.weight
        return patch_embed(patches.to(weight.dtype), weight, self.proj.bias)


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(config.table_side**2, config.hidden_size)

    def forward(self, x: Tensor, grid_thw: Tensor) -> Tensor:  # [P, C]
        return interpolate_pos_embed(x, self.position_embedding.weight, grid_thw)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.shape = (3, config.num_heads, config.head_dim)
        self.theta = config.rope_theta
        self.qkv = Linear(c, 3 * c, bias=config.attention_bias)
        self.proj = Linear(c, c, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self.shape).unbind(1)
        if torch.is_grad_enabled():
            q, k = rope_2d(q, k, position_ids, self.theta)
        else:
            rope_2d_(q, k, position_ids, self.theta)
        return self.proj(flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen).flatten(1))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.mlp = Mlp(config.hidden_size, config.out_hidden_size)

    def forward(
        self,
        x: Tensor,  # [P, C]
        pending: Tensor | None,  # what the block before adds to x; None before the first
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> tuple[Tensor, Tensor]:
        """``x`` and what is to be added to it behind the block: each residual sum is fused with the norm that follows
        it, and a block reads no weights but its own."""
        if pending is None:
            normed = self.norm1(x)
        else:
            normed, x = add_rms_norm(pending, x, self.norm1.weight, self.norm1.eps)
        out = self.attn(normed, position_ids, cu_seqlens, max_seqlen)
        normed, x = add_rms_norm(out, x, self.norm2.weight, self.norm2.eps)
        return x, self.mlp(normed)


class Merger(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c, inner = config.out_hidden_size, config.intermediate_size
        self.proj = Linear(c, c, bias=False)
        self.post_projection_norm = nn.LayerNorm(c)
        self.gate_up_proj = Linear(c, 2 * inner, bias=False)
        self.down_proj = Linear(inner, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [P / 4, C_out]
        x = F.gelu(self.post_projection_norm(self.proj(x)))
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class VisionTower(nn.Module):
    """From patches to embeddings of the language model: patch embedding, blocks, 2x2 downsample, merger."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.recompute = False  # see Glm4v.recompute_activations
        self.embeddings = Embeddings(config)
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.merger = Merger(config)
        self.post_conv_layernorm = RMSNorm(c, config.rms_norm_eps)
        self.downsample = Kernel(config.out_hidden_size, c, MERGE_SIZE, MERGE_SIZE)
        self.post_layernorm = RMSNorm(c, config.rms_norm_eps)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """``patches [P, 1176]``, in the dtype of the weights, of the pictures ``grid_thw [I, 3]``, integers, whose
        h and w are even, to embeddings ``[P / 4, C_out]``. The host reads the grids, so it waits for those of a GPU."""
        units = [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]
        lengths = torch.tensor([0, *(h * w for h, w in units)], device="cpu")
        index = (grid_thw, patch_positions(units), lengths.cumsum(0, dtype=torch.int32))
        grid_thw, position_ids, cu_seqlens = (x.to(patches.device, non_blocking=True) for x in index)
        return self.encode(patches, grid_thw, position_ids, cu_seqlens, int(lengths.max()))

    def encode(
        self,
        patches: Tensor,  # [P, 1176]
        grid_thw: Tensor,  # [I, 3]
        position_ids: Tensor,  # [P, 2]
        cu_seqlens: Tensor,  # int32 [units + 1]
        max_seqlen: int,
    ) -> Tensor:
        """`forward` once the host knows the grids: one graph that asks the device nothing."""
        x = self.embeddings(self.post_conv_layernorm(self.patch_embed(patches)), grid_thw)
        pending = None
        for block in self.blocks:
            x, pending = run(block, self.recompute, x, pending, position_ids, cu_seqlens, max_seqlen)
        after = self.post_layernorm
        normed = after(x) if pending is None else add_rms_norm(pending, x, after.weight, after.eps)[0]
        return self.merger(merge_patches(normed, self.downsample.weight, self.downsample.bias))


def patch_positions(units: list[tuple[int, int]]) -> Tensor:
    """``[P, 2]``: row and column of each patch of ``(h, w)`` grids, in merge-block order."""
    m = MERGE_SIZE
    parts = [torch.empty(0, 2, dtype=torch.int64, device="cpu")]
    for h, w in units:
        rows = torch.arange(h, device="cpu").view(-1, 1, m, 1)
        columns = torch.arange(w, device="cpu").view(1, -1, 1, m)
        shape = (h // m, w // m, m, m)
        parts.append(torch.stack((rows.expand(shape), columns.expand(shape)), -1).flatten(0, 3))
    return torch.cat(parts)
