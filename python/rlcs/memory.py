"""Which errors say that memory has run out: torch, numpy, Python and our ops each have their own."""

from __future__ import annotations

import re

import torch

MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|bad_alloc|ALLOC_FAILED"  # of torch and CUDA libraries
    "|(aoti_torch_empty|aten::(new_)?empty|aten::contiguous).*API call failed",  # within our ops
    re.IGNORECASE | re.DOTALL,
)


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
