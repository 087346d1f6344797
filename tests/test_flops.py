"""torch's FlopCounterMode on the ops: what their definitions' products come to."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import glm4v_ext
from glm4v_ext import reference

VARLEN = ([0, 5, 5, 12, 20], [0, 9, 9, 16, 30])


def flops(function, *arguments, backward=False):
    with FlopCounterMode(display=False) as forward:
        out = function(*arguments)
    out = out[0] if isinstance(out, tuple) else out
    if not backward:
        return forward.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.float().sum().backward()
    return counter.get_total_flops()


def random(*shape):
    torch.manual_seed(0)
    return torch.randn(shape, requires_grad=True)


CASES = {
    "linear": lambda: (random(3, 7, 32), random(48, 32), random(48)),
    "patch_embed": lambda: (random(12, 1176), random(64, 3, 2, 14, 14), random(64)),
    "merge_patches": lambda: (random(16, 32), random(24, 32, 2, 2), random(24)),
    "token_logprob": lambda: (random(9, 32), random(300, 32), torch.arange(9)),
    "flash_attn_varlen_func": lambda: (
        *(random(tokens, heads, 16) for tokens, heads in ((20, 4), (30, 2), (30, 2))),
        *(torch.tensor(starts, dtype=torch.int32) for starts in VARLEN),
        8,
        14,
    ),
    "flash_attn_func": lambda: (random(2, 5, 4, 16), random(2, 9, 2, 16), random(2, 9, 2, 16)),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_definition(name):
    op, definition = getattr(glm4v_ext, name), getattr(reference, name)
    once = flops(definition, *CASES[name]())
    assert flops(op, *CASES[name]()) == once > 0
    again = {"token_logprob": once, "flash_attn_varlen_func": once // 2, "flash_attn_func": once // 2}.get(name, 0)
    assert flops(op, *CASES[name](), backward=True) == flops(definition, *CASES[name](), backward=True) + again


def test_a_weight_that_is_kept_costs_nothing():
    hidden, weight, targets = CASES["token_logprob"]()
    once = flops(glm4v_ext.token_logprob, hidden, weight, targets)
    assert flops(glm4v_ext.token_logprob, hidden, weight.detach(), targets, backward=True) == 2 * once


def test_still_patches_take_half():
    patches, weight, bias = (x.detach() for x in CASES["patch_embed"]())
    patches = patches.view(-1, 3, 2, 196)[:, :, :1].expand(-1, -1, 2, -1).reshape(-1, 1176)
    expected = flops(reference.patch_embed, patches, weight, bias, True)
    assert flops(glm4v_ext.patch_embed, patches, weight, bias, True) == expected


@torch.no_grad()
def test_decoding_reads_the_keys_that_are_there():
    q, k_cache, v_cache, new = random(2, 3, 4, 16), random(2, 32, 2, 16), random(2, 32, 2, 16), random(2, 3, 2, 16)
    lengths, leftpad = torch.tensor([5, 9], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    a_key = 4 * 3 * 4 * 16
    attend = glm4v_ext.flash_attn_with_kvcache
    assert flops(attend, q, k_cache, v_cache) == flops(reference.flash_attn_func, q, k_cache, v_cache) == 64 * a_key
    assert flops(lambda: attend(q, k_cache, v_cache, new, new, cache_seqlens=lengths)) == (5 + 9 + 6) * a_key
    assert flops(lambda: attend(q, k_cache, v_cache, cache_seqlens=lengths, cache_leftpad=leftpad)) == 13 * a_key
    pages, table = k_cache.reshape(4, 16, 2, 16), torch.arange(4, dtype=torch.int32).view(2, 2)
    assert flops(lambda: attend(q, pages, pages, cache_seqlens=lengths, block_table=table)) == 14 * a_key
    assert flops(lambda: attend(q, pages, pages, block_table=table)) == 64 * a_key


def test_traces_count_the_longest():
    arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in CASES["flash_attn_varlen_func"]()]
    assert flops(glm4v_ext.flash_attn_varlen_func, *arguments) == 4 * 4 * 4 * 16 * 8 * 14


@pytest.mark.parametrize("first", ["glm4v_ext", "torch.utils.flop_counter"])
def test_either_import_may_come_first(first):
    script = f"""
import torch, {first}, sys
early = "triton" in sys.modules
import glm4v_ext
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    glm4v_ext.linear(torch.ones(2, 3), torch.ones(4, 3))
print(counter.get_total_flops(), early and {first == "glm4v_ext"})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "48 False\n", done.stderr


def test_a_torch_without_the_module_says_so():
    script = "import glm4v_ext, torch; torch.utils.__path__ = []; import torch.utils.flop_counter"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'torch.utils.flop_counter'" in done.stderr
