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

from . import fsdp, parallel
from .batches import cost_of, filler, inputs, units
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
    prompts: Sequence[Prompt]  # that the batch's sources number
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


@dataclass(frozen=True)
class Step:
    """What one micro-step reads, on this rank."""

    samples: list[int]  # which of the step's
    fill: bool  # something besides them: others have samples or pictures where this rank has none
    pictured: bool  # and that is a picture


class Learner:
    """``update(samples, prompts, loss, rate)`` makes one step of the optimizer; `with_old` prepares several.

    All ranks are given the same samples and share them out alike. Each makes as many micro-steps as the others, in
    which all run the same parts of the model: weights are gathered and gradients summed by all together. Copies of the
    sharded weights sum theirs up in the last one.
    """

    def __init__(self, model: Glm4v, optimizer: Optimizer, tokens: int) -> None:
        self.model, self.optimizer, self.tokens = model, optimizer, tokens
        self.cost = packing_cost(model.config)
        self._held: tuple[PackedBatch, Sequence[Prompt]] | None = None  # the micro-step at work

    @torch.no_grad()
    def with_old(self, samples: Sequence[Sample], prompts: Sequence[Prompt], temperature: float) -> list[Sample]:
        """The samples with their log-probabilities under the weights as they are, before the steps that will follow."""
        out, mine = list(samples), dict[int, np.ndarray]()
        for step in self._plan(samples, prompts)[0]:
            batch, known = self._batch(step, samples, prompts)
            found = target_logprobs(self.model, batch, known, temperature)[0].float().cpu().numpy()
            for i, start, end in zip(step.samples, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                mine[i] = np.append(np.float32(0), found[start : end - 1])  # of the token itself
        fsdp.drop_gathered(self.model)
        for of_rank in parallel.gather(mine):
            for i, old in of_rank.items():
                out[i] = replace(samples[i], old=old)
        return out

    def share(self, samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[int]:
        """Which of a step's samples this rank will read; outlines of their prompts will do to know."""
        return [i for step in self._plan(samples, prompts)[0] for i in step.samples]

    def _plan(self, samples: Sequence[Sample], prompts: Sequence[Prompt]) -> tuple[list[Step], int]:
        """Micro-steps of this rank, and the tokens that all ranks read. Samples of one prompt stay together as far as
        the budget allows."""
        whole = list(units(samples, prompts, self.tokens))
        costs = [cost_of(self.cost, [len(samples[i]) for i in u], prompts[samples[u[0]].source]) for u, _ in whole]
        shares = pack([tokens for _, tokens in whole], self.tokens, costs, parallel.size())
        steps = []
        for micro in zip(*shares, strict=True):
            each = [[i for u in mine for i in whole[u][0]] for mine in micro]
            pictured = [any(prompts[samples[i].source].patches for i in mine) for mine in each]
            mine, seen = each[parallel.rank()], pictured[parallel.rank()]
            if any(each):
                steps.append(Step(mine, not mine or (any(pictured) and not seen), any(pictured)))
        if parallel.copies() > 1 and any(step.pictured for step in steps):  # `fsdp.sum_over_copies` wants them alike
            steps = [step if step.pictured else replace(step, fill=True, pictured=True) for step in steps]
        return steps, sum(tokens for _, tokens in whole)

    def _batch(
        self, step: Step, samples: Sequence[Sample], prompts: Sequence[Prompt]
    ) -> tuple[PackedBatch, Sequence[Prompt]]:
        """The samples of a micro-step, and the prompts that it numbers."""
        chosen = [samples[i] for i in step.samples]
        if step.fill:
            sample, prompt = filler(self.model, step.pictured, len(prompts))
            chosen, prompts = [*chosen, sample], [*prompts, prompt]
        return batch_of(chosen, len(samples)), prompts

    def update(
        self, samples: Sequence[Sample], prompts: Sequence[Prompt], loss: Loss, rate: float, temperature: float = 1.0
    ) -> dict[str, float]:
        """Gradients of all micro-steps, then one step; ``samples[i]`` belongs to ``prompts[samples[i].source]``.

        Returns:
            Means of what the losses logged, weighted by trained tokens; ``loss``, ``entropy``, ``grad_norm``,
            ``rate``, ``micro_steps`` (of each rank), ``tokens`` (read) and ``trained_tokens``. A gradient that is not
            finite moves nothing, and ``skipped`` is 1.

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
        steps, tokens = self._plan(samples, prompts)
        every = sum(int(sample.trained.sum()) for sample in samples)
        if not every:
            raise ValueError("update: samples must hold a token to train on, got none")
        sums = dict[str, Tensor]()  # on the device: the host waits for them once, at the end of the step
        for step in steps:
            fsdp.sum_over_copies(self.model, step is steps[-1])
            batch, known = self._batch(step, samples, prompts)
            self._held = batch, known
            new, entropy = target_logprobs(self.model, batch, known, temperature)
            here, trained = int(batch.trained.sum()), torch.from_numpy(batch.trained).to(new.device)
            part, facts = loss(Micro(batch, known, new, trained, entropy, here, every))
            if part.requires_grad:  # not so without a picture where the tower alone is trained
                part.backward()
            shares = {name: value * (here / every) for name, value in {**facts, "entropy": entropy}.items()}
            for name, value in {"loss": part, **shares}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()  # type: ignore[operator]
        self._held = None
        norm = self.optimizer.step(rate)
        return {
            **{name: float(value) for name, value in parallel.sums(sums).items()},
            "grad_norm": norm,
            "rate": rate,
            "skipped": float(not math.isfinite(norm)),
            "micro_steps": float(len(steps)),
            "tokens": float(tokens),
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
