"""Turns on a GPU: every call between two events, after the L2 cache was filled with something else."""

from __future__ import annotations

import functools

import torch

from bench.peers import Lane, Peer


@functools.cache
@torch.inference_mode(False)  # whoever asks first: it is written in every mode
def _other_data(device: str) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)  # more than any L2


class CudaLane(Lane):
    def __init__(self, peer: Peer, turn_s: float, device: str) -> None:
        self.other_data = _other_data(device)  # is nothing that a peer takes
        super().__init__(peer, turn_s, device)

    def turn(self) -> float:
        spans = []
        for _ in range(self.calls):
            self.other_data.zero_()  # long enough to hide what the host takes to launch the call
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.peer()
            end.record()
            spans.append((begin, end))
        self.sync()
        self.seconds.append(sum(begin.elapsed_time(end) for begin, end in spans) / 1e3 / self.calls)
        return self.seconds[-1]
