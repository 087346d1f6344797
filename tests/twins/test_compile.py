"""Every kernel compiled for GPUs that are not here, by the launches of its twin: a driver stands in that names the
architecture and launches nothing. What ptxas made of it is read from the cubin.
"""

import importlib
import pathlib
import re
import subprocess

import pytest
import torch
from torch import bfloat16, float16, float32

from glm4v_ext import triton as twins

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = 99 * 1024  # of a block, on every GPU from sm_80 on


class NoGpu:
    """A driver as far as compiling needs one; each architecture is a device of its own in triton's caches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(op, inputs, capability, monkeypatch):
    """The kernels that the twin launches."""
    module = importlib.import_module(f"glm4v_ext.triton.{op.removesuffix('_backward').removesuffix('_')}")
    kernels, run = [], triton.JITFunction.run

    def compile_alone(self, *arguments, grid, warmup, **options):
        assert "enable_fp_fusion" in options, "its default differs between versions of triton"
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    with monkeypatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_alone)
        patch.setattr(triton.runtime.driver, "_active", NoGpu(capability))
        patch.setattr(module, "capability_of", lambda q: capability // 10, raising=False)
        getattr(module, op)(*inputs)
    return kernels


def resources(kernel, folder):
    """Registers and bytes of stack, which is where spills go."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    (use,) = (line for line in done.stdout.splitlines() if "REG:" in line)
    return {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", use)}


def tensors(*shapes, dtype=bfloat16):
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


GRID, CU = torch.tensor([[1, 24, 24]]), torch.tensor([0, 64], dtype=torch.int32)
NORM, TABLE = [(64, 4096), (4096,)], [(576, 1536), (576, 1536)]
PAIRS, TRIPLES = torch.zeros(64, 2, dtype=torch.int64), torch.zeros(3, 64, dtype=torch.int64)
PICTURE = torch.empty(1, 336, 336, 3, dtype=torch.uint8)
HEAD, ROWS, TARGETS = tensors((64, 64), (5000, 64)), tensors((2, 64), (64,), dtype=float32), PAIRS[:, 0]
TEXT = (8, 12, 12, 1e4, 64, True)


def attention(heads, kv_heads, dim, dtype=bfloat16, causal=False, left=-1, softcap=0.0, pages=None):
    cache = (64, kv_heads, dim) if pages is None else (4, 16, kv_heads, dim)
    qkv = tensors((64, heads, dim), cache, cache, dtype=dtype)
    return [*qkv, CU, CU, 64, 64, 0.0, None, causal, left, -1, softcap, None, pages]


def decode(heads, kv_heads, dim, dtype=bfloat16, queries=1, capacity=4096, new=True, softcap=0.0):
    q, cache, fresh = (2, queries, heads, dim), (2, capacity, kv_heads, dim), (2, queries, kv_heads, dim)
    q, k_cache, v_cache, k, v = tensors(q, cache, cache, fresh, fresh, dtype=dtype)
    lengths = torch.zeros(2, dtype=torch.int32)
    new_tokens = [k, v] if new else [None, None]
    rest = [None, None, lengths, None, None, None, None, True, -1, -1, softcap, None, 0]
    return [q, k_cache, v_cache, *new_tokens, *rest]


# What the model launches, then other branches of the kernels.
LAUNCHES = {
    "rms_norm": ("rms_norm", [*tensors(*NORM), 1e-5]),
    "rms_norm_backward": ("rms_norm_backward", [*tensors(NORM[0], *NORM), 1e-5]),
    "add_rms_norm": ("add_rms_norm", [*tensors((64, 1536), (64, 1536), (1536,)), 1e-5]),
    "add_rms_norm_backward": ("add_rms_norm_backward", [*tensors(*[(64, 1536)] * 3, (1536,)), 1e-5]),
    "rms_norm_add": ("rms_norm_add", [*tensors(NORM[0], *NORM), 1e-5]),
    "swiglu": ("swiglu", tensors((64, 2 * 13696))),
    "swiglu_backward": ("swiglu_backward", tensors((64, 13696), (64, 2 * 13696))),
    "token_logprob": ("token_logprob", [*HEAD, TARGETS, 1.0, True]),
    "token_logprob_backward": (
        "token_logprob_backward",
        [*tensors((64,), (64,), dtype=float32), *HEAD, TARGETS, *ROWS, 1.0, True, True],
    ),
    "patchify": ("patchify", [PICTURE, [0.5] * 3, [0.3] * 3, 2, 14, 2, bfloat16]),
    "interpolate_pos_embed": ("interpolate_pos_embed", [*tensors(*TABLE), GRID]),
    "interpolate_pos_embed_backward": ("interpolate_pos_embed_backward", [*tensors(TABLE[0]), GRID, 576]),
    "rope_2d": ("rope_2d", [*tensors((64, 12, 128), (64, 12, 128)), PAIRS, 1e4]),
    "rope_2d_": ("rope_2d_", [*tensors((64, 12, 128), (64, 12, 128)), PAIRS, 1e4]),
    "rope_3d": ("rope_3d", [*tensors((64, 32, 128), (64, 2, 128)), TRIPLES, *TEXT]),
    "rope_3d_": ("rope_3d_", [*tensors((64, 32, 128), (64, 2, 128)), TRIPLES, *TEXT]),
    "flash_attn_varlen tower": ("flash_attn_varlen", attention(12, 12, 128)),
    "flash_attn_varlen text": ("flash_attn_varlen", attention(32, 2, 128, causal=True)),
    "flash_attn_with_kvcache": ("flash_attn_with_kvcache", decode(32, 2, 128)),
}
OTHERS = {
    "rms_norm narrow": ("rms_norm", [*tensors((64, 1), (1,)), 1e-5]),
    "rms_norm wide": ("rms_norm", [*tensors((64, 20000), (20000,)), 1e-5]),
    "rms_norm_backward wide": ("rms_norm_backward", [*tensors(*[(64, 16384)] * 2, (16384,)), 1e-5]),
    "rms_norm_backward fp32": ("rms_norm_backward", [*tensors(NORM[0], *NORM, dtype=float32), 1e-5]),
    "swiglu odd": ("swiglu", tensors((3, 14), dtype=float16)),
    "rope_3d halves": ("rope_3d", [*tensors((64, 4, 80), (64, 2, 80)), TRIPLES, 5, 8, 7, 1e4, 40, False]),
    "flash_attn_varlen fp16, 64": ("flash_attn_varlen", attention(4, 2, 64, float16, causal=True)),
    "flash_attn_varlen 80": ("flash_attn_varlen", attention(4, 2, 80)),
    "flash_attn_varlen 256": ("flash_attn_varlen", attention(4, 2, 256, causal=True)),
    "flash_attn_varlen window": ("flash_attn_varlen", attention(4, 2, 128, left=20)),
    "flash_attn_varlen softcap": ("flash_attn_varlen", attention(4, 2, 128, softcap=5.0)),
    "flash_attn_varlen fp32, 64": ("flash_attn_varlen", attention(4, 2, 64, float32)),
    "flash_attn_varlen fp32, 128": ("flash_attn_varlen", attention(4, 2, 128, float32)),
    "flash_attn_varlen fp32, 256": ("flash_attn_varlen", attention(4, 2, 256, float32)),
    "flash_attn_varlen pages": ("flash_attn_varlen", attention(4, 2, 128, pages=torch.zeros(1, 4, dtype=torch.int32))),
    "flash_attn_with_kvcache 256": ("flash_attn_with_kvcache", decode(4, 2, 256, new=False, softcap=5.0)),
    "flash_attn_with_kvcache fp32": ("flash_attn_with_kvcache", decode(4, 2, 128, float32, queries=100)),
    "flash_attn_with_kvcache prefill": ("flash_attn_with_kvcache", decode(32, 2, 128, queries=512)),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", [*LAUNCHES, *OTHERS])
def test_kernels_keep_to_registers(name, capability, monkeypatch, tmp_path):
    op, inputs = {**LAUNCHES, **OTHERS}[name]
    kernels = compiled(op, inputs, capability, monkeypatch)
    assert kernels
    for kernel in kernels:
        use = resources(kernel, tmp_path)
        print(f"\nsm_{capability} {kernel.name}: {use['REG']} registers, {kernel.metadata.shared} B shared")
        assert use["STACK"] == use["LOCAL"] == 0, f"{kernel.name} has a stack: {use}"
        assert kernel.metadata.shared <= SHARED, kernel.name
        if kernel.name == "flash_attn_varlen_kernel" and inputs[0].dtype != float32:
            assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in kernel.asm["ptx"]


def test_every_kernel_is_compiled(monkeypatch):
    names = {kernel.name for op, inputs in LAUNCHES.values() for kernel in compiled(op, inputs, 90, monkeypatch)}
    texts = [path.read_text() for path in pathlib.Path(twins.__file__).parent.glob("*.py")]
    assert names == {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
