"""token_logprob against plain PyTorch and torch.compile of it: the demo's head, and GLM's at rollout sizes.

The peak of memory beyond what was there before goes to the JSON, as ``peak_mib``.
"""

import pytest
import torch

from bench.peers import AGREEMENT, compiled
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


def inputs_of(size, device, dtype):
    tokens, width, vocabulary = size
    hidden, weight = torch.randn(tokens, width, device=device), torch.randn(vocabulary, width, device=device)
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    return hidden.to(dtype), weight.mul_(width**-0.5).to(dtype), targets


def peers_of(call):
    fast = compiled(reference.token_logprob)
    return {
        "glm4v_ext": lambda: call(token_logprob),
        "plain": lambda: call(reference.token_logprob),
        "compiled": lambda: call(fast),
    }


def resident_mib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) >> 10


def peak_mib(peer, device):
    """Of a call, beyond what is allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer()
        return (torch.cuda.max_memory_allocated() - before) >> 20
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the highest so far is now
    before = resident_mib("VmRSS")
    peer()
    return resident_mib("VmHWM") - before


def note_peaks(benchmark, peers, device):
    benchmark.extra_info["peak_mib"] = {n: peak_mib(peers[n], device) for n in ("glm4v_ext", "plain")}


@pytest.mark.parametrize("size", cases(SIZES, QUICK))
def bench_token_logprob(race, benchmark, device, dtype, size):
    inputs = inputs_of(size, device, dtype)
    peers = peers_of(lambda function: function(*inputs))
    with torch.inference_mode():
        note_peaks(benchmark, peers, device)
    race(peers, flops=2 * size[0] * size[1] * size[2], slow=("compiled",), tolerance=AGREEMENT[dtype])


@pytest.mark.parametrize("size", cases(SIZES, QUICK))
def bench_token_logprob_backward(race, benchmark, device, dtype, size):
    hidden, weight, targets = inputs_of(size, device, dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    dlogprob = torch.randn(size[0], device=device)
    peers = peers_of(lambda function: torch.autograd.grad(function(*leaves, targets), leaves, dlogprob))
    note_peaks(benchmark, peers, device)
    flops = 8 * size[0] * size[1] * size[2]  # one product is made twice
    race(peers, flops=flops, grad=True, slow=("compiled",), tolerance=AGREEMENT[dtype])
