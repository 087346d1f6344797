"""What the machine can do, measured when a row first asks: multiply-adds, a matrix product, reading and copying.

Rates of memory are of as many bytes as the row moves: what fits into a cache is held against that cache.
`measured` holds all ceilings of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from glm4v_ext import _C, build_info

MOST_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # beyond every cache
measured: dict[str, dict[str, float]] = {"peak_gflops": {}, "product_gflops": {}, "bandwidth_gbs": {}}


def peak_gflops(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of all threads: the multiply-add instruction that serves the dtype at the active level (fp32 FMA,
    vdpbf16ps or AMX tiles); where that is unknown or something is faster, torch's matrix product."""

    def measure() -> float:
        product = product_gflops(dtype, device)
        if device == "cuda":
            return product
        kinds = {"amx": "amx", "avx512_bf16": "bf16_dot"}
        kind = kinds.get(str(build_info()["isa"]), "fp32") if dtype == torch.bfloat16 else "fp32"
        return max(_C.measure_peak(kind, torch.get_num_threads()), product)

    return _once("peak_gflops", _name(dtype), measure)


def product_gflops(dtype: torch.dtype, device: str) -> float:
    def measure() -> float:
        n = 8192 if device == "cuda" else 1024
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        return 2 * n**3 / _fastest_s(lambda: a @ b, device) / 1e9

    return _once("product_gflops", _name(dtype), measure)


def bandwidth_gbs(bytes: float, device: str) -> float:
    """The faster of reading and copying ``bytes``, rounded down to a power of two; on a GPU, whose caches are emptied
    before each call, of memory."""
    most = MOST_BYTES[device]
    size = most if device == "cuda" else min(most, max(4096, 1 << (int(bytes).bit_length() - 1)))

    def measure() -> float:
        values = torch.ones(size // 4, device=device)
        source, target = values.chunk(2)
        fastest = min(_fastest_s(lambda: target.copy_(source), device), _fastest_s(values.sum, device))
        return size / fastest / 1e9

    return _once("bandwidth_gbs", str(size), measure)


def _once(kind: str, name: str, measure: Callable[[], float]) -> float:
    if name not in measured[kind]:
        measured[kind][name] = measure()
    return measured[kind][name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fastest_s(call: Callable[[], Any], device: str, budget_s: float = 0.05) -> float:
    """A ceiling is what the machine can do undisturbed."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    best, began, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < budget_s:
        sync()
        start = time.perf_counter()
        call()
        sync()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best
