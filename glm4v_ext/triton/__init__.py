"""Triton twins of the ops: they serve GPUs where the native library was built without CUDA kernels.

A twin has the name and the arguments of its op. Which backend serves an op is decided once, when the package is
imported; triton itself is imported by an op's first call. Contracts are the native library's own (csrc/checks.cpp):
a twin begins with the call of its check, so that there is one copy of the rules and of their words. What an index
tensor holds stays on the device, unchecked, as it does in the CUDA kernels: looking would stop the host.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

_library = torch.library.Library("glm4v_ext", "IMPL")

_BUILD = "build the package with nvcc"
_FILES = {
    op: op.removesuffix("_backward").removesuffix("_")
    for op in (
        "rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward", "rms_norm_add", "swiglu",
        "swiglu_backward", "linear", "patch_embed", "merge_patches", "patchify", "interpolate_pos_embed",
        "interpolate_pos_embed_backward", "rope_2d", "rope_2d_", "rope_3d", "rope_3d_", "flash_attn_varlen",
        "flash_attn_with_kvcache", "token_logprob", "token_logprob_backward",
    )
}  # fmt: skip


def register(taken: Iterable[str], device: str = "CUDA") -> frozenset[str]:
    """Registers the twins of the ops that are not ``taken``, and an error for those that have none.

    Args:
        taken: ops that another backend serves.
        device: their dispatch key; tests let the twins take the CPU's place.

    Returns:
        The ops that now have a twin.
    """
    free = _FILES.keys() - set(taken)
    for op in sorted(free):
        _library.impl(op, _kernel(op), device)
    if "flash_attn_varlen_backward" not in set(taken):
        _library.impl("flash_attn_varlen_backward", _refuse_backward, device)
    return frozenset(free)


def unsupported(op: str, argument: str, expected: str, got: str) -> RuntimeError:
    """What a twin raises where only the CUDA kernels go on."""
    return RuntimeError(f"{op}: {argument} must be {expected} for Triton ({_BUILD} for others), got {got}")


def _kernel(op: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
            return _twin(op)(*arguments)

    return kernel


@functools.cache
def _twin(op: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(f".{_FILES[op]}", __name__), op)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{op}: a GPU must have triton (install it, or {_BUILD}), got {error}") from error


def _refuse_backward(*arguments: Any) -> Any:
    raise RuntimeError(
        f"flash_attn_varlen_backward: tensors must be on the CPU, or {_BUILD}: Triton serves attention's forward alone"
    )
