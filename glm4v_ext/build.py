"""Loads the native libraries, once, and tells how they were built."""

from __future__ import annotations

import importlib.metadata
import pathlib

import torch

_FOLDER = pathlib.Path(__file__).parent


def _load() -> None:
    library = _FOLDER / "libglm4v_ops.so"
    if not library.exists():
        raise ImportError(
            f"glm4v_ext: the native library must be built, got no {library.name} beside the package; "
            "run `pip install .` or `make build` in the source tree"
        )
    torch.ops.load_library(str(library))


_load()
from . import _C, triton  # noqa: E402  (_C links against the library that was just loaded)

checks = torch.ops.glm4v_ext_checks  # the contracts of the ops, for backends that are not C++


def build_info() -> dict[str, object]:
    """Facts of this build and of this machine.

    Returns:
        dict with ``version``, ``compiler``, ``cpu_archs`` (levels compiled in), ``cuda`` (whether CUDA kernels were
        compiled in), ``cuda_archs`` (for which GPUs) and ``nvcc`` (its version, or ""), ``triton`` (version of the
        installed one, or ""), ``isa`` (the CPU level in use), ``products`` (dtype -> what serves ``linear``: F.linear,
        glm4v_ext, or where the CPU has AMX, in fp32 and bf16, glm4v_ext on tiles) and ``ops``: op name -> {device:
        backend that serves it, C++ or Triton}, with ``gpu_verified`` where that is CUDA's: whether a GPU has passed the
        op's tests.
    """
    facts: dict[str, object] = dict(_C.build_facts())
    for archs in ("cpu_archs", "cuda_archs"):
        facts[archs] = str(facts[archs]).split()
    facts["triton"] = _triton_version()
    facts["ops"] = {name: _backends(name) for name in _op_names()}
    return facts


def _op_names() -> list[str]:
    names = {
        schema.split("::")[1] for schema in torch._C._dispatch_get_all_op_names() if schema.startswith("glm4v_ext::")
    }
    return sorted(name.split(".")[0] for name in names)


# Ops, backward included, that a record in bench/results/ shows to have passed on a GPU: all of both backends. Whoever
# changes a kernel or its launch without one at hand takes its op out of that backend's.
_OPS = {
    "rms_norm", "add_rms_norm", "rms_norm_add", "swiglu", "rope_2d", "rope_3d", "linear", "token_logprob", "patchify",
    "patch_embed", "merge_patches", "interpolate_pos_embed", "flash_attn_varlen", "flash_attn_with_kvcache",
}  # fmt: skip
# The last record's tests of this twin did not reach it.
_GPU_VERIFIED = {"C++": _OPS, "Triton": _OPS - {"merge_patches"}}


def _has_kernel(op: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"glm4v_ext::{op}", device))


# Decided once: Triton serves what no CUDA kernel does.
_CUDA = frozenset(op for op in _op_names() if _has_kernel(op, "CUDA"))
_TRITON = triton.register(_CUDA)


def _backends(op: str) -> dict[str, str | bool]:
    backends: dict[str, str | bool] = {"cpu": "C++"} if _has_kernel(op, "CPU") else {}
    if op in _CUDA | _TRITON:
        backend = "C++" if op in _CUDA else "Triton"
        verified = op.removesuffix("_backward").removesuffix("_") in _GPU_VERIFIED[backend]
        backends["cuda"], backends["gpu_verified"] = backend, verified
    return backends


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
