"""token_logprob against plain PyTorch, torch.compile of it, and Liger on a GPU: the demo's head, and GLM's."""

import pytest
import torch

from bench.peers import AGREEMENT, compiled, gpu_package
from bench.shapes import TEXT_WIDTH, cases
from glm4v_ext import reference, token_logprob

VOCABULARY = 151552
# Name -> (T, C, V)
SIZES = {
    "demo-T4000": (4000, 96, 128),
    "middle-T1024": (1024, 1024, 8192),
    "rollout-T256": (256, TEXT_WIDTH, VOCABULARY),
    "rollout-T2048": (2048, TEXT_WIDTH, VOCABULARY),
}
QUICK = ["demo-T4000", "middle-T1024"]


@pytest.mark.parametrize("size", cases(SIZES, QUICK))
def bench_token_logprob(race, device, dtype, size, backward):
    tokens, width, vocabulary = size
    hidden, weight = torch.randn(tokens, width, device=device), torch.randn(vocabulary, width, device=device)
    hidden, weight = hidden.to(dtype), weight.mul_(width**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    fast = compiled(reference.token_logprob)
    peers = {
        "glm4v_ext": lambda: token_logprob(hidden, weight, targets),
        "plain": lambda: reference.token_logprob(hidden, weight, targets),
        "compiled": lambda: fast(hidden, weight, targets),
    }
    liger = gpu_package("liger_kernel.transformers.functional", device)
    if liger and not backward:  # its gradients are of the mean alone
        peers["liger-kernel"] = lambda: (
            -liger.liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
        )
    products = 4 if backward else 1  # one is made twice
    race(
        peers,
        flops=products * 2 * tokens * width * vocabulary,
        bytes=products * (hidden.nbytes + weight.nbytes),
        leaves=(hidden, weight) if backward else (),
        slow=("compiled",),
        tolerance=AGREEMENT[dtype],
    )
