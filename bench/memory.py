"""Memory that a call takes at its peak, beyond what stood there before it.

On the CPU that is resident memory, to a few MiB, and Linux alone tells it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import torch

from glm4v_ext import _C


def peak_mib(call: Callable[[], Any], device: str) -> int | None:
    """Calls, and says what that took; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) >> 20
    without_kept_memory()
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the highest so far is now
    except OSError:
        call()
        return None
    before = _status_kib("VmRSS")
    call()
    return max(0, round((_status_kib("VmHWM") - before) / 1024))


def without_kept_memory() -> None:
    """What the allocators keep of dead tensors goes back: reused, it would not count."""
    _C.release_kept_memory()
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))
