"""Which ops Triton serves, and what is said where it cannot."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

import glm4v_ext
from glm4v_ext import build_info

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
INFO = build_info()
OPS = INFO["ops"]
WITHOUT_TWIN = {"flash_attn_varlen_backward"}

needs_twins = pytest.mark.skipif(INFO["cuda"], reason="the CUDA kernels serve every op")


def on_cuda(op, *arguments):
    """The op's CUDA backend, given tensors of the CPU."""
    return getattr(torch.ops.glm4v_ext, op).default.redispatch(CUDA, *arguments)


def test_every_op_has_one_cuda_backend():
    expected = dict.fromkeys(OPS, "C++") if INFO["cuda"] else {op: "Triton" for op in OPS if op not in WITHOUT_TWIN}
    assert {op: backends["cuda"] for op, backends in OPS.items() if "cuda" in backends} == expected


def test_what_no_gpu_has_passed_says_so():
    assert all(("cuda" in backends) == ("gpu_verified" in backends) for backends in OPS.values())
    records = (pathlib.Path(__file__).resolve().parents[2] / "bench/results").glob("check-cuda-*.json")
    steps = [step for path in records for step in json.loads(path.read_text())["steps"]]

    def passed(op, backend):
        name = {"C++": "tests of", "Triton": "Triton twin of"}[backend] + f" {op}"
        ran = [step for step in steps if step["name"] == name or step["name"].startswith(f"{name}:")]
        if backend == "C++":
            group = op if op.startswith("flash_attn") else "the other ops"
            ran += [step for step in steps if step["name"] in (f"racecheck of {group}", f"memcheck of {group}")]
        ran = [step for step in ran if "exit code is 5" not in step["said"]]  # none of its tests is for a GPU
        return bool(ran) and all(step["ok"] for step in ran)

    for op, backends in OPS.items():
        if backends.get("gpu_verified"):
            assert passed(op.removesuffix("_backward").removesuffix("_"), backends["cuda"]), op


@needs_twins
def test_products_are_torchs():
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    assert torch.equal(on_cuda("linear", x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@needs_twins
def test_a_twin_checks_by_the_words_of_the_op():
    with pytest.raises(RuntimeError, match=r"^linear: weight must be \[N, K\] = \[\*, 8\], got \[4, 7\]"):
        on_cuda("linear", torch.zeros(3, 8), torch.zeros(4, 7), None)


@needs_twins
def test_attention_has_no_backward():
    x, cu = torch.zeros(4, 2, 8), torch.tensor([0, 4])
    arguments = (x, x, x, x, x, torch.zeros(2, 2, 4), cu, cu, 4, 4, None, False, -1, -1, 0.0, None)
    with pytest.raises(RuntimeError, match="must be on the CPU, or build the package with nvcc"):
        on_cuda("flash_attn_varlen_backward", *arguments)


@needs_twins
def test_decoding_takes_no_pages():
    pytest.importorskip("triton")
    q, cache, table = torch.zeros(1, 1, 2, 16), torch.zeros(2, 16, 2, 16), torch.zeros(1, 2, dtype=torch.int32)
    rest = (None, None, None, None, None, None, None, table, None, True, -1, -1, 0.0, None, 0)
    text = r"block_table must be None for Triton \(build the package with nvcc for others\), got a"
    with pytest.raises(RuntimeError, match="^flash_attn_with_kvcache: " + text):
        on_cuda("flash_attn_with_kvcache", q, cache, cache, *rest)


@needs_twins
def test_without_triton_a_call_says_what_to_install():
    program = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch, glm4v_ext
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.glm4v_ext.rms_norm.default.redispatch(keys, torch.zeros(2, 4), torch.zeros(4), 1e-5)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "rms_norm: a GPU must have triton (install it, or build the package with" in done.stdout, done.stderr


def test_an_import_leaves_triton_alone():
    program = "import sys, glm4v_ext; glm4v_ext.build_info(); print([m for m in sys.modules if m.startswith('triton')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_package_has_a_twin_file_per_op():
    pytest.importorskip("triton")
    for op in OPS.keys() - WITHOUT_TWIN:
        assert callable(glm4v_ext.triton._twin(op)), op
