"""Memory that a call takes at its peak, beyond what stood there before it.

On the CPU that is resident memory, to a few MiB, and Linux alone tells it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm4v_ext import rms_norm

KEPT_OUTPUTS = 8  # more than the library keeps


def peak_mib(call: Callable[[], Any], device: str) -> int | None:
    """Calls, and says what that took; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) >> 20
    held = without_kept_memory()
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the highest so far is now
    except OSError:
        call()
        return None
    before = _status_kib("VmRSS")
    call()
    held.clear()
    return max(0, round((_status_kib("VmHWM") - before) / 1024))


def without_kept_memory() -> list[Tensor]:
    """What the allocators keep of dead tensors goes back, for as long as these live: reused, it would not count."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    x, weight = torch.zeros(1024, 256), torch.ones(256)
    for _ in range(2):  # of 1 MiB each: dying they take the places of those that are kept, and then they live again
        outputs: list[Tensor] = []
        outputs += [rms_norm(x, weight, 1e-5) for _ in range(KEPT_OUTPUTS)]
    return outputs


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
