"""The counts of `rlcs.costs` against the model: parameters and state exactly, FLOPs and bytes at sizes that run here.

Tolerances: FLOPs 0.1 % (they come out equal), live bytes 2 % (indices, statistics of a number a token), of a rank in a
block 10 % (activations are most before gradients are), the process's memory 10 % (pages, libraries' workspace). Speed
is printed.
"""

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from worlds import in_worlds

from glm4v import Glm4v
from glm4v.cache import PagedCache
from glm4v.config import Config, TextConfig, VisionConfig
from glm4v.layers import Linear
from rlcs import fsdp, lora, parallel
from rlcs.config import ModelSettings, ParallelSettings
from rlcs.costs import (
    activation_bytes,
    adapters,
    gathered_bytes,
    gathered_together,
    kv_bytes,
    parameters,
    state_bytes,
    text_flops,
    vision_flops,
)
from rlcs.learner import Learner, sft_loss
from rlcs.optimizer import Optimizer, OptimizerSettings
from rlcs.prompts import Prompt
from rlcs.run import load_model
from rlcs.types import Sample

pytestmark = pytest.mark.long

T, SIDE = 512, 12  # tokens of a sample, patches of a picture's edge
PICTURE = SIDE * SIDE


def sizes(width=192, layers=4, inner=512, vocab=512):
    """Shaped like the release: grouped queries, an inner width of 2.7 C, a tower as deep as it is narrow."""
    ids = dict(zip(("image", "image_start", "image_end", "video", "video_start", "video_end"), range(500, 506)))  # noqa: B905
    return Config(
        VisionConfig(
            depth=3, hidden_size=128, num_heads=4, image_size=112, out_hidden_size=width, intermediate_size=320
        ),
        TextConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=2, mrope_section=(2, 3, 3),
        ),
        **{f"{name}_token_id": number for name, number in ids.items()},
    )  # fmt: skip


def with_adapters(model, lora_rank):
    lora.add(
        model,
        [name for name, layer in model.named_modules() if type(layer) is Linear and name != "lm_head"],
        lora_rank,
        1.0,
    )
    lora.begin(model, 0)
    return model


def step_of(config, samples=1, tokens=T, dtype=torch.float32, recompute=False, lora_rank=0):
    """A learner, and samples that each begin with a picture and learn the second half."""
    model = Glm4v(config, dtype).train()
    if lora_rank:
        with_adapters(model, lora_rank)
    model.recompute_activations(recompute)
    return (learner_of(model, samples * tokens), *samples_of(config, samples, tokens, dtype))


def learner_of(model, tokens):
    return Learner(model, Optimizer(model, OptimizerSettings(lr=1e-4)), tokens)


def samples_of(config, samples, tokens=T, dtype=torch.float32):
    pixels = torch.randn(PICTURE, 1176, dtype=dtype)
    made, prompts = [], []
    for i in range(samples):
        ids = np.random.default_rng(i).integers(0, 400, tokens)
        ids[4 : 4 + PICTURE // 4] = config.image_token_id
        ids = torch.from_numpy(ids)
        half = tokens // 2
        positions = torch.arange(half).expand(3, -1)
        prompts.append(Prompt(ids[:half], positions, half, pixels, torch.tensor([[1, SIDE, SIDE]])))
        trained = np.arange(tokens) >= half
        made.append(Sample(ids.numpy(), trained, np.zeros(tokens, np.float32), source=i))
    return made, prompts


def causal(tokens):
    return tokens * (tokens + 1) / 2


def flops_of(config, samples=1, tokens=T, lora_rank=0):
    text = text_flops(config, samples * tokens, samples * causal(tokens), samples * tokens / 2, lora_rank)
    return text + vision_flops(config, samples * PICTURE, samples * PICTURE**2, lora_rank)


# --- counts ---


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_models(tied):
    config = replace(Config(), tie_word_embeddings=tied)
    model = Glm4v(config, device="meta")
    assert sum(parameters(config).values()) == sum(p.numel() for p in model.parameters())
    assert parameters(config)["vision"] == sum(p.numel() for p in model.visual.parameters())


def test_adapters_are_on_all_linear_layers_but_the_head():
    model = with_adapters(Glm4v(Config(), device="meta"), 16)
    assert adapters(Config(), 16) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_what_the_optimizer_holds(dtype, lora_rank):
    learner, samples, prompts = step_of(sizes(), dtype=getattr(torch, dtype), lora_rank=lora_rank)
    learner.update(samples, prompts, sft_loss, 1e-4)
    expected, held = state_bytes(sizes(), dtype, lora_rank=lora_rank), learner.optimizer.state_dict()
    assert expected["weights"] == sum(p.nbytes for p in learner.model.parameters())
    assert expected["gradients"] == sum(p.nbytes for p in learner.model.parameters() if p.requires_grad)
    assert expected["moments"] == sum(x.nbytes for name, x in held.items() if name.startswith("exp_avg"))
    masters = [m for m, w in zip(learner.optimizer.masters, learner.optimizer.weights, strict=True) if m is not w]
    assert expected["masters"] == sum(x.nbytes for x in masters)


@pytest.mark.parametrize("tied", [False, True])
def test_what_ranks_gather_together_is_as_the_trainer_shards_it(tied):
    model = Glm4v(replace(Config(), tie_word_embeddings=tied), device="meta")
    table, blocks = fsdp.embedding_of(model), [set(block.parameters()) for block in fsdp.blocks_of(model)]
    apart = set().union(*blocks, () if table is None else table.parameters())
    assert gathered_together(model.config) == {
        "block": max(sum(p.numel() for p in block) for block in blocks),
        "embedding": 0 if table is None else table.weight.numel(),
        "root": sum(p.numel() for p in model.parameters() if p not in apart),
    }


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
def test_a_rank_has_the_meta_model_s_rows(ranks):
    """Exactly the first rank's where rows divide; it has up to one more of each weight where they don't."""
    weights = list(Glm4v(Config(), device="meta").parameters())
    rows = sum(-(-len(p) // ranks) * p[0].numel() for p in weights)
    uneven = sum(p[0].numel() for p in weights if len(p) % ranks)
    assert rows - uneven <= state_bytes(Config(), shards=ranks)["weights"] / 4 <= rows
    assert state_bytes(Config(), shards=ranks)["weights"] == pytest.approx(4 * rows, rel=0.013)


def test_the_cache_is_as_large_as_said():
    config = sizes()
    cache = PagedCache(config.text_config, 3, 16, torch.bfloat16, torch.device("cpu"))
    held = sum(x.nbytes for x in (*cache.k, *cache.v))
    assert held == 3 * 16 * kv_bytes(config)


# --- FLOPs ---


def test_flops_of_a_forward_pass_are_those_that_torch_counts():
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    config = sizes()
    theirs = Glm4vForConditionalGeneration(Glm4vConfig(**config.to_dict(), attn_implementation="eager")).eval()
    ids = torch.arange(T)[None] % 400
    with torch.no_grad(), FlopCounterMode(display=False) as text:
        theirs(input_ids=ids)
    with torch.no_grad(), FlopCounterMode(display=False) as vision:
        theirs.model.visual(torch.randn(PICTURE, 1176), torch.tensor([[1, SIDE, SIDE]]))
    # What is masked is computed too, and counted, there.
    assert text_flops(config, T, T * T, T).forward == pytest.approx(text.get_total_flops(), rel=1e-3)
    assert vision_flops(config, PICTURE, PICTURE**2).forward == pytest.approx(vision.get_total_flops(), rel=1e-3)


def raw(formula):
    formula._get_raw = True  # the counter hands over tensors, not their shapes
    return formula


@raw
def attention(q, k, v, cu_seqlens, *rest, out_val):
    return 4 * q[0, 0].numel() * q.shape[1] * seen_pairs(cu_seqlens, causal=rest[5])


@raw
def attention_backward(dout, q, k, v, out, statistics, cu_seqlens, *rest, out_val):
    return 10 * q[0, 0].numel() * q.shape[1] * seen_pairs(cu_seqlens, causal=rest[4])


def seen_pairs(cu_seqlens, causal):
    return sum(n * (n + 1) / 2 if causal else n * n for n in cu_seqlens.diff().tolist())


OURS = {
    torch.ops.glm4v_ext.linear: raw(lambda x, weight, bias, out_val: 2 * len(x) * weight.numel()),
    torch.ops.glm4v_ext.patch_embed: raw(lambda x, weight, *rest, out_val: 2 * len(x) * weight.numel()),
    torch.ops.glm4v_ext.merge_patches: raw(lambda x, weight, *rest, out_val: 2 * len(x) / 4 * weight.numel()),
    torch.ops.glm4v_ext.token_logprob: raw(lambda x, weight, *rest, out_val: 2 * len(x) * weight.numel()),
    # Logits again, and a gradient of each.
    torch.ops.glm4v_ext.token_logprob_backward: raw(
        lambda dout, dentropy, x, weight, *rest, out_val: 6 * len(x) * weight.numel()
    ),
    torch.ops.aten.addmm_: lambda out, a, b, out_val=None, **_: 2 * a[0] * a[1] * b[1],  # of adapters
    torch.ops.glm4v_ext.flash_attn_varlen: attention,
    torch.ops.glm4v_ext.flash_attn_varlen_backward: attention_backward,
}
"""What our ops multiply, by their definitions; the rest of a backward pass is torch's products, which it counts."""


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_of_an_update_are_those_of_its_ops(recompute):
    config = sizes()
    learner, samples, prompts = step_of(config, samples=2, recompute=recompute)
    with FlopCounterMode(display=False, custom_mapping=OURS) as counted:
        learner.update(samples, prompts, sft_loss, 1e-4)
    assert flops_of(config, 2).update(recompute) == pytest.approx(counted.get_total_flops(), rel=1e-3)


def test_flops_of_an_update_with_adapters_are_those_of_its_ops():
    """But for the gradient of what the tower's first block reads, for which nobody asks."""
    config, rank = sizes(), 8
    learner, samples, prompts = step_of(config, samples=2, lora_rank=rank)
    frozen_head = raw(lambda dout, dentropy, x, weight, *rest, out_val: 4 * len(x) * weight.numel())
    ours = {**OURS, torch.ops.glm4v_ext.token_logprob_backward: frozen_head}
    with FlopCounterMode(display=False, custom_mapping=ours) as counted:
        learner.update(samples, prompts, sft_loss, 1e-4)
    c = config.vision_config.hidden_size
    spared = 2 * 2 * PICTURE * (c * 3 * c + rank * c)
    said = flops_of(config, 2, lora_rank=rank).update(False) - spared
    assert said == pytest.approx(counted.get_total_flops(), rel=1e-3)


# --- bytes ---


class Live(TorchDispatchMode):
    """The most bytes that live at once, of tensors that are made in here."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self._see((args, kwargs), foreign=True)  # one that is seen first as an argument was there before
        out = op(*args, **(kwargs or {}))
        self._see(out, foreign=False)
        self.storages = {key: one for key, one in self.storages.items() if not one[0].expired()}
        self.most = max(self.most, sum(storage_bytes(one) for one, foreign in self.storages.values() if not foreign))
        return out

    def _see(self, tree, foreign):
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor):
                storage = getattr(x, "_local_tensor", x).untyped_storage()
                known = self.storages.get(storage._cdata)
                if known is None or known[0].expired():
                    self.storages[storage._cdata] = (StorageWeakRef(storage), foreign)


def storage_bytes(weak):
    """As it is now: sharding frees a storage and fills it again."""
    storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
    return 0 if storage is None else storage.nbytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_most_live_bytes_of_a_micro_step_are_as_said(recompute, dtype):
    config = sizes()
    learner, samples, prompts = step_of(config, 3, dtype=getattr(torch, dtype), recompute=recompute)
    learner.optimizer.step = lambda rate: 0.0
    for weight in learner.model.parameters():
        weight.grad = torch.zeros_like(weight)
    gc.collect()
    with Live() as live:
        learner.update(samples, prompts, sft_loss, 1e-4)
    value = 4 if dtype == "float32" else 2
    tokens = 3 * T
    said = activation_bytes(config, tokens, tokens / 2, 3 * PICTURE, recompute, value)
    said += 3 * PICTURE * 1176 * value  # the micro-step's own copy of the pictures
    assert said == pytest.approx(live.most, rel=0.02)


RANKS, SHORT = 2, 64  # tokens of a rank's sample
CASES = [(vocab, dtype, 0) for vocab in (512, 16384) for dtype in ("float32", "bfloat16")] + [
    (512, "float32", 1),
    (16384, "bfloat16", 1),
]


def micro_steps_of(vocab, dtype, lora_rank, *, folder):
    """What a rank of several holds at most in its second micro-step, in a file."""
    parallel.join("cpu", ParallelSettings(timeout_s=60.0))
    model = load_model(ModelSettings(path=folder / str(vocab), dtype=dtype, lora_rank=lora_rank))
    learner = learner_of(model, SHORT)
    learner.optimizer.step = lambda rate: 0.0
    made, prompts = samples_of(model.config, RANKS, SHORT, getattr(torch, dtype))
    with Live() as live:
        learner.update(made, prompts, sft_loss, 1e-4)
        gc.collect()
        live.most = 0
        learner.update(made, prompts, sft_loss, 1e-4)
    torch.save(live.most, folder / f"{vocab}-{dtype}-{lora_rank}-{parallel.rank()}")


@pytest.fixture(scope="module")
def most_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for vocab in (512, 16384):
        Glm4v(sizes(vocab=vocab)).save_pretrained(folder / str(vocab))
    in_worlds([(RANKS, micro_steps_of, case) for case in CASES], folder)
    names = {case: "-".join(map(str, case)) for case in CASES}
    return {case: [torch.load(folder / f"{names[case]}-{rank}") for rank in range(RANKS)] for case in CASES}


@pytest.mark.parametrize(("vocab", "dtype", "lora_rank"), CASES)
def test_the_most_live_bytes_of_a_rank_are_as_said(vocab, dtype, lora_rank, most_of_ranks):
    """The most is in a block with a small vocabulary, and outside of blocks with a large one. In a block, activations
    and gradients are not at their most in the same moment: the plan is above."""
    config, value = sizes(vocab=vocab), 4 if dtype == "float32" else 2
    activations = activation_bytes(config, SHORT, SHORT / 2, PICTURE, False, value)
    in_block, outside = gathered_bytes(config, RANKS, value, lora_rank)
    pictures = PICTURE * 1176 * value
    said = state_bytes(config, dtype, RANKS, lora_rank)["gradients"] + pictures + max(in_block + activations, outside)
    assert (in_block + activations > outside) == (vocab == 512)
    for most in most_of_ranks[vocab, dtype, lora_rank]:
        assert said == pytest.approx(most, rel=0.1 if vocab == 512 else 0.02)


# --- at a size that takes memory and time ---


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_and_speed_of_a_process(recompute, capsys):
    """In a process of its own, whose allocator gives back what is freed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(int(recompute))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print(found)
    assert found["said_bytes"] == pytest.approx(found["bytes"], rel=0.1)


def measured(recompute):
    """The most memory of a step over what torch and its libraries take, and its tokens a second; both as said."""
    torch.set_num_threads(1)
    config = sizes(width=512, layers=8, inner=1408, vocab=8192)
    samples, tokens = 2, 768
    learner, made, prompts = step_of(sizes(), recompute=recompute)
    learner.update(made, prompts, sft_loss, 1e-4)  # libraries are loaded, and have their workspace
    before = memory("VmRSS")
    learner, made, prompts = step_of(config, samples, tokens, recompute=recompute)
    learner.update(made, prompts, sft_loss, 1e-4)
    learner.update(made, prompts, sft_loss, 1e-4)  # the first one's gradients were fresh
    grown = memory("VmHWM") - before
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        learner.update(made, prompts, sft_loss, 1e-4)
        seconds.append(time.perf_counter() - start)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        a @ b
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    rows = samples * tokens
    said = sum(state_bytes(config, "float32").values())
    said += activation_bytes(config, rows, rows / 2, samples * PICTURE, recompute, 4)
    work = flops_of(config, samples, tokens).update(recompute)
    return {
        "bytes": grown, "said_bytes": said, "gflops_of_a_product": max(rates) / 1e9,
        "tokens_per_s": rows / min(seconds), "said_tokens_per_s": rows * max(rates) / work,
    }  # fmt: skip


def memory(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(measured(bool(int(sys.argv[1])))))
