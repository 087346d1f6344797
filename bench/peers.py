"""Peers side by side in one process: they agree first, then they are timed in turns.

A peer is a function without arguments that does the whole job of one case. Ours is called ``glm4v_ext`` and comes
first; the second is the baseline, over which ratios are taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.memory import peak_mib

Peer = Callable[[], Any]

# Relative rms distance that two right answers may have; the tests hold each op to the stricter derived rule.
AGREEMENT = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
# The same of several layers, with rounding on both sides.
AGREEMENT_OF_LAYERS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def assert_agree(peers: dict[str, Peer], tolerance: float | None = None) -> None:
    """Every peer gives what the first gives, up to the rounding of the dtype. Peers may return nested tuples."""
    names = list(peers)
    ours = [t.detach().double() for t in _tensors(peers[names[0]]())]  # a copy: in-place peers share one buffer
    assert ours, f"{names[0]}: gives no tensors to compare"
    for name in names[1:]:
        theirs = [t.detach() for t in _tensors(peers[name]())]
        assert len(theirs) == len(ours), f"{name}: {len(theirs)} outputs, expected {len(ours)}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.numel() == b.numel(), f"{name}: output {i} is {list(b.shape)}, expected {list(a.shape)}"
            bound = AGREEMENT.get(b.dtype, 0.0) if tolerance is None else tolerance
            distance = float((a - b.double().reshape(a.shape)).norm() / b.double().norm().clamp_min(1e-30))
            assert distance <= bound, (
                f"{name}: output {i} differs by {distance:.2e} (relative rms), at most {bound:.1e}"
            )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list)) else []


def gradients(peers: dict[str, Peer], leaves: Sequence[Tensor]) -> dict[str, Peer]:
    """Forward and backward of each peer: what ``leaves`` get from random gradients of the outputs, alike for all."""
    for leaf in leaves:
        leaf.requires_grad_()

    def step_of(peer: Peer) -> Peer:
        douts: list[Tensor] = []

        def step() -> tuple[Tensor, ...]:
            outs = _tensors(peer())
            if not douts:  # peers may differ in shape, not in the order of what they give
                generator = torch.Generator(outs[0].device).manual_seed(0)
                flat = (torch.randn(o.numel(), generator=generator, device=o.device).to(o.dtype) for o in outs)
                douts.extend(dout.view(out.shape) for dout, out in zip(flat, outs, strict=True))
            return torch.autograd.grad(outs, leaves, douts)

        return step

    return {name: step_of(peer) for name, peer in peers.items()}


class Lane:
    """One peer's turns: each runs ``calls`` calls, so that a turn is long against the clock, and notes the mean.

    The peer has run before, in `assert_agree`.
    """

    def __init__(self, peer: Peer, turn_s: float, device: str) -> None:
        self.peer, self.seconds = peer, list[float]()
        self.sync = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.calls = 1
        self.peak_mib = peak_mib(self.turn, device)
        self.fastest_s = self.seconds[-1]
        if self.fastest_s < 0.5:  # beyond, neither warming up nor more calls tell anything new
            self.fastest_s = min(self.turn() for _ in range(3))
        self.calls = max(1, min(10_000, int(turn_s / self.fastest_s)))
        self.seconds.clear()

    def turn(self) -> float:
        self.sync()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.peer()
        self.sync()
        self.seconds.append((time.perf_counter() - start) / self.calls)
        return self.seconds[-1]

    def median(self) -> float:
        return statistics.median(self.seconds)


def rounds_within(budget_s: float, round_s: float) -> int:
    """How many rounds of so many seconds. An even number where there are several: peers come behind one another in one
    order, then in the other, and behind a peer that sweeps the caches a call takes up to half longer."""
    least = 4 if round_s < 10 else 2 if round_s < 20 else 1  # calls that long vary by little
    rounds = max(least, min(50, int(budget_s / round_s)))
    return rounds if rounds == 1 else rounds + rounds % 2


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under torch.compile; for peers that --quick leaves out (the first compile takes a minute)."""
    torch.compiler.reset()  # of one function only a few versions are kept, fewer than a benchmark has cases
    return torch.compile(function, fullgraph=True, dynamic=False)


def gpu_package(name: str, device: str) -> Any:
    """A package whose kernels need a GPU; None where it is not installed or the device is another."""
    if device != "cuda" or importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    return importlib.import_module(name)
