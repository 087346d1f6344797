"""Large outputs: written past the caches, with the values of small ones, and in the memory of dead ones.

The large input of a case is a small one many times over.
"""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from glm4v_ext import add_rms_norm, interpolate_pos_embed, patchify, rms_norm, rms_norm_add, swiglu
from glm4v_ext.testing import DTYPES, forced_isa, isa_levels

pytestmark = pytest.mark.long

LARGE = 16 << 20  # bytes, from csrc/cpu/parallel.h


def width_for(dtype):  # whole cache lines, in fp32 not whole pairs of vectors
    return 528 if dtype == torch.float32 else 544


def rows(op, *widths):
    """A case whose inputs are some rows each, of ``widths`` times the width."""

    def case(dtype):
        width = width_for(dtype)
        inputs = [torch.randn(37, times * width).to(dtype) for times in widths]
        weight = torch.randn(width).to(dtype)
        return inputs, lambda *inputs, times: op(*inputs, weight)

    return case


def pos_embed(dtype):
    width = width_for(dtype)
    x, table, grid = torch.randn(48, width).to(dtype), torch.randn(25, width).to(dtype), torch.tensor([[1, 6, 8]])
    return [x], lambda x, times: interpolate_pos_embed(x, table, grid.repeat(times, 1))


def patches(dtype):
    frames = torch.randint(0, 256, (2, 56, 84, 3), dtype=torch.uint8)
    return [frames], lambda frames, times: patchify(frames, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], dtype=dtype)[0]


CASES = {
    "rms_norm": rows(lambda x, weight: rms_norm(x, weight, 1e-5), 1),
    "add_rms_norm": rows(lambda x, residual, weight: torch.cat(add_rms_norm(x, residual, weight, 1e-5), -1), 1, 1),
    "rms_norm_add": rows(lambda x, residual, weight: rms_norm_add(x, residual, weight, 1e-5), 1, 1),
    "swiglu": rows(lambda gate_up, weight: swiglu(gate_up), 2),
    "interpolate_pos_embed": pos_embed,
    "patchify": patches,
}


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CASES)
def test_values_of_small_outputs(op, dtype, level):
    torch.manual_seed(0)
    inputs, run = CASES[op](dtype)
    with forced_isa(level):
        small = run(*inputs, times=1)
        times = LARGE // small.nbytes + 1
        if op == "add_rms_norm":
            times *= 2  # two outputs, each of which is to be large
        large = run(*[t.repeat(times, *[1] * (t.dim() - 1)) for t in inputs], times=times)
    assert torch.equal(large, small.repeat(times, *[1] * (small.dim() - 1)))


ONES = torch.ones(LARGE // 4096, 1024)


def doubled(value):
    """A large output, ``2 * value`` everywhere: the norm of a row of ones is one."""
    return rms_norm(ONES, torch.full((1024,), 2.0 * value), 0.0)


needs_kept_memory = pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.10 does not tell of a tensor's end")


@needs_kept_memory
def test_takes_over_the_memory_of_the_dead():
    before = doubled(1).data_ptr()
    assert doubled(2).data_ptr() == before


def test_the_living_share_nothing():
    outs = [doubled(i) for i in range(1, 8)]
    views = [out[3:5] for out in outs]
    del outs
    more = [doubled(i) for i in range(8, 12)]
    for i, part in enumerate([*views, *more], start=1):
        assert (part == 2 * i).all()


def test_many_threads():
    def turn(i):
        return all((doubled(value) == 2 * value).all() for value in range(i, i + 5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(turn, range(1, 65)))


OUTPUT = """
import os, torch
from glm4v_ext import _C, rms_norm

def output(mib):
    return rms_norm(torch.ones(mib * 256, 1024), torch.ones(1024), 0.0)
"""
FITS = """
outs = [output(mib) for mib in (41, 59, 90)]
of_41, of_59, of_90 = (out.data_ptr() // 2**20 for out in outs)
del outs
outs = [output(mib) for mib in (41, 40, 40)]
assert [out.data_ptr() // 2**20 for out in outs[:2]] == [of_41, of_59]
assert outs[2].data_ptr() // 2**20 != of_90  # more than twice what it takes
"""
KEPT = """
def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) // 256

output(33)
before, most = resident(), 256 + 130
def check():
    assert resident() - before < most + 50, (resident() - before, most)
for mib in (33, 43, 56, 73, 95, 124):  # none in another's memory
    output(mib)
check()
outs = [output(40) for _ in range(10)]
addresses = {out.data_ptr() for out in outs}
del outs
memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2**20
most = 256 + min(10 * 42, memory // 16)
check()
outs = [output(40) for _ in range(10)]
print(len({out.data_ptr() for out in outs} & addresses), min(10, most // 42))
del outs
for mib in (52, 66, 83, 104, 130, 163):
    output(mib)
check()
_C.release_kept_memory()
most = 0
check()
"""


def test_sizes_beyond_the_memory_are_an_error():
    # Bytes that come round to 1.8 MB, as a number of 64 bits.
    frames = torch.zeros(1, 28, 28, 3, dtype=torch.uint8).expand(2**64 // 9408 // 2 * 2 + 200, -1, -1, -1)
    with pytest.raises(RuntimeError):
        patchify(frames, [0.5] * 3, [0.5] * 3)


@needs_kept_memory
def test_memory_of_its_own_size_comes_first_and_then_up_to_twice_it():
    subprocess.run([sys.executable, "-c", OUTPUT + FITS], check=True)


@needs_kept_memory
def test_as_much_is_kept_as_was_alive_at_once():
    done = subprocess.run([sys.executable, "-c", OUTPUT + KEPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again, kept = map(int, done.stdout.split())
    assert again == kept


def test_is_a_tensor_like_others():
    out = doubled(1)
    assert out.untyped_storage().nbytes() == LARGE
    assert torch.equal(pickle.loads(pickle.dumps(out)), out)
    assert torch.equal(out.clone().share_memory_(), out)
    assert torch.equal(doubled(1).share_memory_(), out)
