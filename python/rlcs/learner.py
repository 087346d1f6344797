"""Samples to a step of the optimizer: packed under a token budget, a forward and a backward for each micro-step.

Dims: T tokens of a micro-step, N samples, R trained tokens, C width, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from glm4v import Glm4v
from glm4v_ext import token_logprob

from .batches import cost_of, inputs, units
from .costs import packing_cost
from .memory import first_line, out_of_memory
from .optimizer import Optimizer
from .packing import batch_of, pack
from .prompts import Prompt
from .types import PackedBatch, Sample


@dataclass(frozen=True)
class Micro:
    """What a loss is made of. ``new`` has a graph; ``trained`` says where it counts."""

    batch: PackedBatch
    new: Tensor  # [T] log-probabilities of the targets, 0 where not trained
    trained: Tensor  # [T] bool
    entropy: Tensor  # scalar, mean over the trained tokens
    tokens: int  # trained ones, here
    all_tokens: int  # trained ones, of the whole step


Loss = Callable[[Micro], tuple[Tensor, dict[str, Tensor]]]
"""Loss of a micro-step, already weighted so that the micro-steps of a step add up, and means over its tokens to log."""


def target_logprobs(
    model: Glm4v, batch: PackedBatch, prompts: Sequence[Prompt], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``[T]`` log-probabilities of the targets that are trained on (0 elsewhere), and their mean entropy."""
    read = inputs(batch, prompts)
    hidden = model.hidden(**read.arguments)
    trained = torch.from_numpy(batch.trained).nonzero().flatten()
    at, targets, rows = (
        x.to(hidden.device) for x in (trained, torch.from_numpy(batch.targets)[trained], read.rows[trained])
    )
    seen = hidden.index_select(0, rows)
    found, entropy = token_logprob(seen, model.lm_head.weight, targets, temperature, return_entropy=True)
    every = torch.zeros(len(batch.targets), dtype=found.dtype, device=found.device).index_copy(0, at, found)
    return every, entropy.mean() if len(at) else entropy.new_zeros(())


class Learner:
    """``update(samples, prompts, loss, rate)`` makes one step of the optimizer; `with_old` prepares several."""

    def __init__(self, model: Glm4v, optimizer: Optimizer, tokens: int) -> None:
        self.model, self.optimizer, self.tokens = model, optimizer, tokens
        self.cost = packing_cost(model.config)
        self._held: tuple[PackedBatch, Sequence[Prompt]] | None = None  # the micro-step at work

    @torch.no_grad()
    def with_old(self, samples: Sequence[Sample], prompts: Sequence[Prompt], temperature: float) -> list[Sample]:
        """The samples with their log-probabilities under the weights as they are, before the steps that will follow."""
        out = list(samples)
        for chosen, _ in self._pack(samples, prompts):
            batch = batch_of([samples[i] for i in chosen], len(samples))
            found = target_logprobs(self.model, batch, prompts, temperature)[0].float().cpu().numpy()
            for i, start, end in zip(chosen, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                out[i] = replace(
                    samples[i], old=np.append(np.float32(0), found[start : end - 1])
                )  # of the token itself
        return out

    def _pack(self, samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[tuple[list[int], int]]:
        """Micro-steps: indices of samples, and the tokens that are read for them. Samples of one prompt stay together
        as far as the budget allows."""
        whole = list(units(samples, prompts, self.tokens))
        costs = [cost_of(self.cost, [len(samples[i]) for i in u], prompts[samples[u[0]].source]) for u, _ in whole]
        packs = pack([tokens for _, tokens in whole], self.tokens, costs)[0]
        return [([i for u in micro for i in whole[u][0]], sum(whole[u][1] for u in micro)) for micro in packs if micro]

    def update(
        self, samples: Sequence[Sample], prompts: Sequence[Prompt], loss: Loss, rate: float, temperature: float = 1.0
    ) -> dict[str, float]:
        """Gradients of all micro-steps, then one step; ``samples[i]`` belongs to ``prompts[samples[i].source]``.

        Returns:
            Means of what the losses logged, weighted by trained tokens; ``loss``, ``entropy``, ``grad_norm``,
            ``rate``, ``micro_steps``, ``tokens`` (read) and ``trained_tokens``. A gradient that is not finite moves
            nothing, and ``skipped`` is 1.

        Raises:
            MemoryError: a micro-step does not fit; the text says what it holds.
        """
        try:
            return self._update(samples, prompts, loss, rate, temperature)
        except (MemoryError, RuntimeError) as error:
            if self._held is None or not out_of_memory(error):
                raise
            raise MemoryError(f"{first_line(error)}; {_size(*self._held, self.tokens)}") from error
        finally:
            self._held = None

    def _update(
        self, samples: Sequence[Sample], prompts: Sequence[Prompt], loss: Loss, rate: float, temperature: float
    ) -> dict[str, float]:
        micro_steps = self._pack(samples, prompts)
        every = sum(int(sample.trained.sum()) for sample in samples)
        if not every:
            raise ValueError("update: samples must hold a token to train on, got none")
        sums = dict[str, Tensor]()  # on the device: the host waits for them once, at the end of the step
        for chosen, _ in micro_steps:
            batch = batch_of([samples[i] for i in chosen], len(samples))
            self._held = batch, prompts
            new, entropy = target_logprobs(self.model, batch, prompts, temperature)
            here = int(batch.trained.sum())
            part, facts = loss(Micro(batch, new, torch.from_numpy(batch.trained).to(new.device), entropy, here, every))
            part.backward()
            shares = {name: value * (here / every) for name, value in {**facts, "entropy": entropy}.items()}
            for name, value in {"loss": part, **shares}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()  # type: ignore[operator]
        self._held = None
        norm = self.optimizer.step(rate)
        return {
            **{name: float(value) for name, value in sums.items()},
            "grad_norm": norm,
            "rate": rate,
            "skipped": float(not math.isfinite(norm)),
            "micro_steps": float(len(micro_steps)),
            "tokens": float(sum(tokens for _, tokens in micro_steps)),
            "trained_tokens": float(every),
        }


def _size(batch: PackedBatch, prompts: Sequence[Prompt], budget: int) -> str:
    """What a micro-step holds, in words."""
    seen = [prompts[source] for source in dict.fromkeys(batch.sources.tolist())]
    grids = [grid for prompt in seen for grid in (prompt.image_grid_thw, prompt.video_grid_thw) if grid is not None]
    pictures, patches = sum(map(len, grids)), sum(prompt.patches for prompt in seen)
    return (
        f"its micro-step held {len(batch.input_ids)} tokens (--tokens allows {budget}) in {len(batch.sources)} samples "
        f"with {pictures} pictures of {patches} patches"
    )


def sft_loss(micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood over the step's trained tokens."""
    return -micro.new.sum() / micro.all_tokens, {}
