"""Runs tests of ops on their Triton twins: `python served.py [--device=cuda] OP EXPRESSION …`, in a process of its own.

EXPRESSION chooses tests of tests/ops/test_OP.py as pytest's -k does; options that begin with -- are pytest's.

With --device=cuda the twins take the place of the CUDA kernels. Else that of the CPU's ops: Triton's interpreter runs
kernels on CPU tensors. It knows no bfloat16: it keeps the bits in integers, cuts fp32 off where a GPU rounds, and
multiplies the integers in a dot. Both are set right here.
"""

import importlib
import os
import sys

os.environ["TRITON_INTERPRET"] = str(int("--device=cuda" not in sys.argv))  # read when triton is imported

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from glm4v_ext import build_info
from glm4v_ext import triton as twins

ON_GPU = "--device=cuda" in sys.argv
# Tests of the CPU's loops and products, of what Python alone decides, and of threads.
NOT_OF_THE_DEVICE = ["isa", "transformers", "trace", "compile", "in_place_refuses", "angles and not generic"]
# Tests that ask for more than a device can tell without waiting, the values of its index tensors; for pages; and for
# more programs than the interpreter runs in minutes.
LEFT_OUT = {
    "interpolate_pos_embed": ["grid10", "grid11", "errors and (hold or even)", "random", "bitwise"],
    "flash_attn_varlen": [
        "ascending",
        "given",
        "max_seqlen",
        "tiles_of_fp32",
        "errors_of_pages and (table3 or table4)",
    ],
    "flash_attn_with_kvcache": ["pages", "errors"],
    "token_logprob": ["refused", "memory", "shape8", "bitwise and shape1", "entropy and shape4", "only_what"],
    "linear": ["not definition and not errors"],  # the others are about the CPU's paths
}

calls: dict[str, int] = {}
launched: set[str] = set()


def widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(data):
    bits = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16)
    return bits.numpy().reshape(data.shape)


def repair(builder):
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, to):
        if src.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(rounded(src.data), tl.bfloat16)
        return cast(self, src, to)

    def create_dot(self, a, b, d, *options):
        return dot(self, widened(a), widened(b), d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def at_the_largest_score(statistics, largest, q, *arguments):
    """Sums of weights, relative to another score than they are."""
    given = [*arguments, *[None] * 12]  # defaults at the end are not handed on
    scale, softcap = given[7], given[11]
    factor = 1.0 if softcap else scale or q.shape[2] ** -0.5
    seen = largest > -torch.inf
    difference = torch.where(seen, statistics[0] - largest, 0.0)
    return statistics[1] * torch.exp(difference * factor)


def with_native_statistics(twin, native):
    """Attention whose backward, which has no twin, gets its own forward's statistics: it repeats them to the bit."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA if ON_GPU else torch._C.DispatchKey.CPU)

    def run(*arguments):
        out, lse, statistics = twin(*arguments)
        _, expected, native_statistics = native.call_boxed(keys, *arguments)
        close = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
        if not ON_GPU:  # there each kernel has its own score that weights are relative to; on a CPU, tiles alone have
            if arguments[0].dtype != torch.float16 and build_info()["isa"] == "amx":
                assert not (native_statistics[0] > statistics[0] + close["atol"]).any()  # NaN is below
                moved = at_the_largest_score(native_statistics, statistics[0], *arguments)
                torch.testing.assert_close(statistics[1], moved, **close)
            else:
                torch.testing.assert_close(statistics, native_statistics, **close)
        if not (ON_GPU and torch.cuda.is_current_stream_capturing()):  # there are no values yet
            torch.testing.assert_close(lse, expected, **close)
        return out, lse, native_statistics

    return run


def note_launches(function):
    run = function.run

    def noted(self, *arguments, **options):
        launched.add(self.__name__)
        return run(self, *arguments, **options)

    function.run = noted


def counted(kernel, op):
    def run(*arguments):
        calls[op] = calls.get(op, 0) + 1
        return kernel(*arguments)

    return run


if __name__ == "__main__":
    if not ON_GPU:
        torch.set_num_threads(1)
        torch.set_num_threads = lambda count: None  # torch's products, which some twins are, may depend on them
        repair(interpreter.InterpreterBuilder)
        note_launches(interpreter.InterpretedFunction)
    place = "CUDA" if ON_GPU else "CPU"
    attention = torch.library.get_kernel("glm4v_ext::flash_attn_varlen", place)
    make = twins._kernel

    def kernel_of(op):
        kernel = counted(make(op), op)
        return with_native_statistics(kernel, attention) if op == "flash_attn_varlen" else kernel

    twins._kernel = kernel_of
    twins.register(["flash_attn_varlen_backward"], place)
    token_logprob = importlib.import_module("glm4v_ext.triton.token_logprob")
    token_logprob._CHUNK_BYTES, token_logprob._LEAST_COLUMNS = 0, 64  # several chunks of a small vocabulary
    options = [text for text in sys.argv[1:] if text.startswith("--")]
    chosen = [text for text in sys.argv[1:] if not text.startswith("--")]
    for op, wanted in zip(chosen[::2], chosen[1::2], strict=True):
        left_out = " or ".join(f"({text})" for text in NOT_OF_THE_DEVICE + LEFT_OUT.get(op, []))
        expression = f"({wanted}) and not ({left_out})"
        arguments = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--durations=5", *options]
        code = pytest.main([*arguments, f"tests/ops/test_{op}.py", "-k", expression])
        assert code == 0 and calls[op] > 0, f"{op}: pytest's exit code is {code}"
    print("launched:", *sorted(launched))
