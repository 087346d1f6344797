"""The policy loss: GRPO's clipped ratio with a higher upper clip, averaged over a sample's tokens, then over samples.

    l_t = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A),   rho_t = exp(log p_new(t) - log p_old(t))

No KL term and no entropy bonus by default; the mean over samples weighs a short answer as much as a long one (the
paper: more stable than per token). Clip values are ours: 0.2 and 0.28, those of DAPO (arXiv 2503.14476), from which
clip-higher comes. Dims: T tokens of a packed batch, N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .bounds import expect_above_zero, expect_within


@dataclass(frozen=True)
class LossSettings:
    """What is clipped and added, and what the mean is over."""

    clip_low: float = 0.2  # the ratio of probabilities counts from 1 - clip_low ...
    clip_high: float = 0.28  # ... to 1 + clip_high
    kl: float = 0.0  # times E[exp(d) - d - 1], d = log p_ref - log p_new
    mean: Literal["sample", "token"] = "sample"  # answers weigh the same, or tokens do
    # Most weight of p_old over p_behaviour, where the engine's log-probabilities differ.
    truncate_importance: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"loss: clip_low must be above 0 and below 1, got {self.clip_low}")
        expect_above_zero("loss", self, clip_high=math.inf)
        expect_within("loss", self, kl=(0, 1e3), truncate_importance=(1, math.inf))
        if self.mean not in ("sample", "token"):
            raise ValueError(f"loss: mean must be sample or token, got {self.mean!r}")


def policy_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    trained: Tensor,
    cu_seqlens: Tensor,
    settings: LossSettings,
    behaviour: Tensor | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the batch, and facts to log; multiply by the micro-step's weight to add it to others.

    Args:
        new: ``[T]`` log-probabilities of the targets under the policy that is trained, with a graph; of whatever
            type, all is computed in fp32 at least.
        old: ``[T]`` under the policy that the ratio is taken to, without.
        advantages: ``[N]``.
        trained: ``[T]`` bool; other tokens count nowhere, whatever they hold.
        cu_seqlens: ``[N + 1]``.
        behaviour: ``[T]`` as the rollout engine reported them, if it is not this model: tokens are then weighted by the
            truncated ``exp(old - behaviour)`` (truncated importance sampling).
        reference: ``[T]`` for the KL term.

    Returns:
        A scalar, and clip_high, clip_low, ratio, kl_old and mismatch by name, shares and means over the trained tokens.
    """
    wide = torch.promote_types(new.dtype, torch.float32)  # a sum of ones in bf16 ends at 256
    new, old = new.to(wide), old.to(wide)
    tokens, samples = len(new), len(advantages)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sample = torch.repeat_interleave(torch.arange(samples, device=new.device), lengths, output_size=tokens)
    zero = new.new_zeros(())
    difference = torch.where(trained, new - old, zero)  # what is not trained on may hold infinities
    ratio = difference.exp()
    advantage = advantages[sample]
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    mismatch = zero
    if behaviour is not None:
        drift = torch.where(trained, old - behaviour, zero)
        loss = loss * drift.exp().clamp(max=settings.truncate_importance)
        mismatch = drift.abs()
    if settings.kl:
        if reference is None:
            raise ValueError("policy_loss: reference must be given when kl > 0, got none")
        gap = torch.where(trained, reference - new, zero)
        loss = loss + settings.kl * (gap.exp() - gap - 1)
    loss = torch.where(trained, loss, zero)
    counts = torch.zeros(samples, dtype=new.dtype, device=new.device).index_add_(0, sample, trained.to(new.dtype))
    if settings.mean == "sample":
        total = (loss / counts.clamp(min=1)[sample]).sum() / max(samples, 1)
    else:
        total = loss.sum() / counts.sum().clamp(min=1)
    with torch.no_grad():
        share = counts.sum().clamp(min=1)
        facts = {
            "clip_high": (trained & (ratio > 1 + settings.clip_high) & (advantage > 0)).sum() / share,
            "clip_low": (trained & (ratio < 1 - settings.clip_low) & (advantage < 0)).sum() / share,
            "ratio": torch.where(trained, ratio, zero).sum() / share,
            "kl_old": torch.where(trained, ratio - 1 - difference, zero).sum() / share,
            "mismatch": mismatch.sum() / share,
        }
    return total, facts
