"""Which of many ragged pieces a program's share lies in, found on the device: the host never learns their sizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(index, sizes, before):
    """Where ``index`` lies among pieces of ``sizes`` [N] behind ``before``: (is it in this one [N], starts [N])."""
    ends = before + tl.cumsum(sizes, 0)
    starts = ends - sizes
    return (starts <= index) & (index < ends), starts


@triton.jit
def pick(here, values):
    """The one of ``values`` that is ``here``, or 0."""
    return tl.sum(tl.where(here, values, 0), 0)
