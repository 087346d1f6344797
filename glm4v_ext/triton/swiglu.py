"""SwiGLU, a program per block of one row's columns. Dims: R rows, I inner width.

silu(gate) is rounded before the product with up, as two separate ops do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..build import checks

_BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * inner + column, mask=inside).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * inner + column, (up * silu).to(out.dtype.element_ty), mask=inside)


# With s = sigmoid(gate):  dup = dout * gate * s,  dgate = dout * up * s * (1 + gate * (1 - s)).
@triton.jit
def swiglu_backward_kernel(dout, gate_up, dgate_up, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    at_gate, at_up = row * 2 * inner + column, (row * 2 + 1) * inner + column
    d = tl.load(dout + row * inner + column, mask=inside).to(tl.float32)
    gate = tl.load(gate_up + at_gate, mask=inside).to(tl.float32)
    up = tl.load(gate_up + at_up, mask=inside).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    silu = (gate * s).to(dgate_up.dtype.element_ty).to(tl.float32)
    d_silu = (d * up).to(dgate_up.dtype.element_ty).to(tl.float32)
    tl.store(dgate_up + at_gate, (d_silu * s * (1 + gate * (1 - s))).to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dgate_up + at_up, (d * silu).to(dgate_up.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    checks.swiglu("swiglu", gate_up)
    inner = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], inner))
    swiglu_kernel[_grid(gate_up, inner)](gate_up.contiguous(), out, inner, BLOCK=_BLOCK, enable_fp_fusion=True)
    return out


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    checks.swiglu_backward(dout, gate_up)
    inner = gate_up.shape[-1] // 2
    dgate_up = gate_up.new_empty(gate_up.shape)
    swiglu_backward_kernel[_grid(gate_up, inner)](
        dout.contiguous(), gate_up.contiguous(), dgate_up, inner, BLOCK=_BLOCK, enable_fp_fusion=True
    )
    return dgate_up


def _grid(gate_up: Tensor, inner: int) -> tuple[int, int]:
    return gate_up.numel() // (2 * inner), triton.cdiv(inner, _BLOCK)
