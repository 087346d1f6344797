"""Steps that run again and again on the same memory: on a GPU, launches are recorded once and then replayed.

A decode step of the 9B launches some 760 kernels of a few microseconds: called one by one, the host takes longer to
launch them than the GPU to run them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """``function(*tensors)``, recorded as a CUDA graph once it has been called a few times on tensors of the same kind.

    Before that, on other devices, where gradients are wanted, under `torch.compile` and inside another recording it is
    plainly called, so the results are the same everywhere. Recording begins anew when shapes, dtypes, devices,
    autocast or inference mode change.

    Args:
        function: tensors to one tensor. What else it reads or writes (weights, a cache) must stay at its addresses, and
            it may neither ask the device for a value nor have an effect on the host.
        after: plain calls before the recording, which takes as long as several of them.
    """

    def __init__(self, function: Callable[..., Tensor], after: int = 8) -> None:
        self.function, self.after = function, after
        self._kind: object = None
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result, in memory of its own."""
        if not self._records(tensors):
            return self.function(*tensors)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        kind = [*((x.shape, x.dtype, x.device) for x in tensors), autocast, torch.is_inference_mode_enabled()]
        if kind != self._kind:
            self._kind, self._calls, self._graph, self._out = kind, 0, None, None
        self._calls += 1
        if self._calls <= self.after:
            return self.function(*tensors)
        with torch.cuda.device(tensors[0].device):
            if self._graph is None:
                self._inputs, graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on
                    self._out = self.function(*self._inputs)
                self._graph = graph
            assert self._out is not None
            for kept, x in zip(self._inputs, tensors, strict=True):
                kept.copy_(x)
            self._graph.replay()
            return self._out.clone()

    @staticmethod
    def _records(tensors: tuple[Tensor, ...]) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not tensors:
            return False
        if any(x.device.type != "cuda" or x.device != tensors[0].device for x in tensors):
            return False
        with torch.cuda.device(tensors[0].device):
            return not torch.cuda.is_current_stream_capturing()
