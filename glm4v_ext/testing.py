"""What every op test shares: devices, the tolerance rule, gradients of a function, forced instruction-set levels.

The rule is flash-attention's: the error against the definition in float64 is at most twice the error that the same
definition makes in the tested dtype, plus one unit in the last place.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of attention, by device: its CUDA kernels work on tensor cores alone.
ATTENTION_DTYPES = {"cpu": DTYPES, "cuda": DTYPES[1:]}
# Of 16-bit values in `linear`, by device: a row has the same bits alone and among so many.
FEW_ROWS = {"cpu": 4, "cuda": 16}


def devices() -> list[str]:
    """Devices of this machine that the ops serve."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def attention_cases() -> list[tuple[str, torch.dtype]]:
    """Devices of this machine, each with the dtypes that attention takes there."""
    return [(device, dtype) for device in devices() for dtype in ATTENTION_DTYPES[device]]


def isa_levels() -> list[str]:
    """Instruction-set levels of this machine, lowest first."""
    levels = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
    return levels[: levels.index(_C.best_isa()) + 1]


@contextlib.contextmanager
def forced_isa(level: str) -> Iterator[None]:
    """Runs the CPU loops compiled for ``level`` inside the block."""
    previous = str(_C.build_facts()["isa"])
    _C.force_isa(level)
    try:
        yield
    finally:
        _C.force_isa(previous)


@contextlib.contextmanager
def forced_product(name: str, dtype: torch.dtype) -> Iterator[None]:
    """Makes products of ``dtype`` on the CPU by ``F.linear`` or by ``glm4v_ext``'s own loops inside the block."""
    word = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    products: Any = _C.build_facts()["products"]
    previous = products[word]
    _C.force_product(word, name)
    try:
        yield
    finally:
        _C.force_product(word, previous)


def assert_close_to_exact(actual: Tensor, plain: Tensor, exact: Tensor, name: str = "output") -> None:
    """Holds ``actual`` to the rule, given the definition in the tested dtype and in float64."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    if actual.numel() == 0:
        return
    exact = exact.double()
    unit = torch.finfo(actual.dtype).eps * exact.abs() + torch.finfo(actual.dtype).tiny
    error = ((actual.double() - exact).abs() - unit).max().item()
    bound = 2 * (plain.double() - exact).abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e} beyond one ulp, expected at most {bound:.3e}"


def leaves_of(inputs: Sequence[Any]) -> list[Any]:
    """Copies of ``inputs`` of which the floating tensors require grad."""
    return [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]


def outputs_and_grads(function: Callable[..., Any], inputs: Sequence[Any], expanded: bool = False) -> list[Tensor]:
    """Outputs of ``function(*inputs)``, then the gradients of its floating inputs for a fixed random cotangent.

    ``expanded``: the cotangent is a single one, expanded by strides of 0, as ``sum().backward()`` hands it down.
    """
    leaves = leaves_of(inputs)
    outputs = function(*leaves)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    generator = torch.Generator().manual_seed(0)
    smooth = [o for o in outputs if o.requires_grad]
    cotangents = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in smooth]
    if expanded:
        cotangents = [o.new_ones(()).expand_as(o) for o in smooth]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(smooth, wanted, cotangents, allow_unused=True) if smooth else ()
    return [o.detach() for o in outputs] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)
    ]


def assert_as_accurate(
    op: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any], expanded: bool = False
) -> None:
    """Outputs and gradients of ``op`` against ``definition`` in float64, by the rule of this module."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    actual, plain, exact = (
        outputs_and_grads(op, inputs, expanded=expanded),
        outputs_and_grads(definition, inputs, expanded=expanded),
        outputs_and_grads(definition, wide, expanded=expanded),
    )
    assert len(actual) == len(exact)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_close_to_exact(a, p, e, f"result {i}")


def on_gpu(op: str) -> Callable[..., Any]:
    """The op as a GPU computes it where gradients are needed: in functions of torch's own, which a CPU has, too."""
    return importlib.import_module(f"glm4v_ext.ops.{op}").on_gpu


def assert_accurate_product(op: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """With gradients and without, since a GPU makes products by other kernels then."""
    assert_as_accurate(op, definition, inputs)
    wide = [x.double() if isinstance(x, Tensor) else x for x in inputs]
    assert_close_to_exact(op(*inputs), definition(*inputs), definition(*wide))


def assert_repeatable(function: Callable[..., Any], inputs: Sequence[Any], threads_of_second: int = 1) -> None:
    """Two runs, the second one on so many threads, give the same bits, gradients included."""
    threads = torch.get_num_threads()
    first = outputs_and_grads(function, inputs)
    torch.set_num_threads(threads_of_second)
    try:
        second = outputs_and_grads(function, inputs)
    finally:
        torch.set_num_threads(threads)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {i} differs between two runs"


def assert_takes_expanded_gradients(
    op: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any]
) -> None:
    """Gradients that arrive with strides of 0 are read as what they are."""
    ours, theirs = (outputs_and_grads(function, inputs, expanded=True) for function in (op, definition))
    torch.testing.assert_close(ours, theirs)


def assert_traceable(op: Any, function: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """``op``, registered for ``function`` with the same arguments, passes `opcheck` and compiles as one graph."""
    leaves = leaves_of(inputs)
    torch.library.opcheck(op, tuple(leaves))
    torch.compiler.reset()  # the number of graphs of one function is limited
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), function(*leaves))
