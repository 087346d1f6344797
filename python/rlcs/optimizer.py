"""AdamW with a warm-up and a decay, gradient clipping, and fp32 master weights for a model in bf16.

The paper gives no optimizer; everything here is our choice. Dims: none, parameters have any shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from glm4v.weights import Rows

from . import fsdp, parallel

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
FIRST = 0.1  # share of the rate at the very first step, which would else be wasted


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights move."""

    lr: float = 1e-6  # the learning rate at its highest
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam's means of gradients and of their squares
    weight_decay: float = 0.0  # of matrices
    clip_norm: float = 1.0  # longer gradients are scaled down to this norm
    warmup: float = 0.02  # share of the run over which the rate rises, from a tenth
    decay: Literal["cosine", "tail", "constant"] = "cosine"  # how the rate falls behind the warmup
    tail: float = 0.3  # share of the run over which "tail" falls linearly, after a constant stretch
    final: float = 0.05  # of lr, at the end

    def __post_init__(self) -> None:
        for name, least, most in (
            ("lr", 0, 1), ("weight_decay", 0, 1), ("clip_norm", 1e-6, 1e6), ("warmup", 0, 1), ("tail", 0, 1),
            ("final", 0, 1),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"optimizer: {name} must be from {least} to {most}, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer: betas must be from 0 to below 1, got {self.betas}")

    def rate(self, progress: float) -> float:
        """The learning rate when ``progress`` in [0, 1] of the run is behind us."""
        if progress < self.warmup:
            return self.lr * (FIRST + (1 - FIRST) * progress / self.warmup)
        if self.decay == "cosine":
            done = (progress - self.warmup) / max(1 - self.warmup, 1e-9)
            share = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        elif self.decay == "tail":
            share = min(1.0, (1 - progress) / self.tail) if self.tail else 1.0
        else:
            share = 1.0
        return self.lr * (self.final + (1 - self.final) * max(share, 0.0))


class Optimizer:
    """``step(rate)`` after the gradients of a batch have been summed into the model's parameters.

    A model in bf16 or fp16 gets fp32 copies of its trained weights; the steps happen there and are rounded back. What
    is sharded is in fp32 already; the norm is that of all shards.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.rounded = fsdp.dtype_of(model) != torch.float32  # what a checkpoint has of the weights
        self.names, self.weights = [], []
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                self.names.append(name)
                self.weights.append(weight)
        if not self.weights:
            raise ValueError("optimizer: the model must have a weight to train, got none: everything is frozen")
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [m for m in self.masters if m.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)

    def begin(self, rows: Rows) -> None:
        """Masters start from the checkpoint's own values, which are finer than the model's where it is in fp32."""
        for name, weight, master in zip(self.names, self.weights, self.masters, strict=True):
            if master is not weight and rows.dtype != weight.dtype:
                master.copy_(rows(name, 0, len(master)))

    def step(self, rate: float) -> float:
        """Clips the gradients, moves the weights, clears the gradients; returns the norm before clipping.

        A norm that is not finite moves nothing.
        """
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
        norm = float(parallel.plain(nn.utils.clip_grad_norm_(self.masters, self.settings.clip_norm)))
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = rate
            self.adam.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                if master is not weight:
                    weight.copy_(master)
                    master.grad = None
                weight.grad = None
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, step counts and masters under their parameter's name."""
        out = {}
        for name, master in zip(self.names, self.masters, strict=True):
            for key, value in self.adam.state.get(master, {}).items():
                out[f"{key}.{name}"] = value
            if self.rounded:
                out[f"master.{name}"] = master.detach()
        return out

    def like(self, name: str) -> Tensor:
        """Room for one of the tensors of :meth:`state_dict`, which lies where that one does."""
        key, _, parameter = name.partition(".")
        return torch.zeros(()) if key == "step" else torch.empty_like(self.masters[self.names.index(parameter)])

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up where :meth:`state_dict` was taken. A parameter that never had a gradient has no moments.

        Raises:
            ValueError: a tensor is missing, or of another shape than its parameter.
        """
        for name, master in zip(self.names, self.masters, strict=True):
            keys = MOMENTS if any(f"{key}.{name}" in state for key in MOMENTS) else ()
            for key in (*keys, "master") if self.rounded else keys:
                due, found = () if key == "step" else tuple(master.shape), state.get(f"{key}.{name}")
                if found is None or tuple(found.shape) != due:
                    got = "none" if found is None else tuple(found.shape)
                    raise ValueError(f"optimizer: {key}.{name} must be of shape {due}, got {got}")
            kept = {key: state[f"{key}.{name}"].to(master.device, copy=True) for key in keys}
            if kept:
                self.adam.state[master] = kept
            if self.rounded:
                with torch.no_grad():
                    master.copy_(state[f"master.{name}"])
