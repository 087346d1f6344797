"""What a rank holds while it trains, measured on gloo ranks against `rlcs.costs`: `python bench/footprint.py [ranks]`.

The model has the release's proportions at a quarter of its width and a few layers; resident memory is read from the
system, on Linux. A first model, a small one, brings in libraries and their workspace; glibc maps each tensor by itself,
so that what is freed is gone: by default it keeps some, which is no tensor's.
"""

import ctypes
import os
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import multiprocessing

from glm4v import Glm4v
from glm4v.config import Config, TextConfig, VisionConfig
from rlcs import fsdp, parallel
from rlcs.config import ModelSettings, ParallelSettings
from rlcs.costs import gathered_bytes, gathered_together, parameters, state_bytes
from rlcs.learner import target_logprobs
from rlcs.optimizer import Optimizer, OptimizerSettings
from rlcs.packing import batch_of
from rlcs.prompts import Prompt
from rlcs.run import load_model
from rlcs.types import Sample

SMALL = Config(
    vision_config=VisionConfig(depth=6, hidden_size=384, num_heads=3, out_hidden_size=1024, intermediate_size=3424),
    text_config=TextConfig(
        vocab_size=37888,
        hidden_size=1024,
        intermediate_size=3424,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=1,
        mrope_section=(8, 12, 12),
    ),
    image_start_token_id=1,
    image_end_token_id=2,
    video_start_token_id=3,
    video_end_token_id=4,
    image_token_id=5,
    video_token_id=6,
)


def resident(field: str = "VmRSS") -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what dead tensors leave behind would count
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


TINY = replace(
    SMALL,
    vision_config=replace(SMALL.vision_config, depth=1, out_hidden_size=128),
    text_config=replace(SMALL.text_config, vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=1),
)


def expected(size: int) -> dict[str, float]:
    """Bytes of a rank by arithmetic. Activations of so few tokens don't count."""
    state, (in_block, outside) = state_bytes(SMALL, shards=size), gathered_bytes(SMALL, size)
    loaded, between = state["weights"], state["weights"] + state["moments"]
    training = between + state["gradients"] + max(in_block, outside)
    gloo = 4 * gathered_together(SMALL)["root"]  # sums up in a copy, which NCCL doesn't make
    return {
        "loaded": loaded, "between steps": between, "most in a step": training, "the same with gloo": training + gloo,
        "whole, for rollouts": 2 * sum(parameters(SMALL).values()),
    }  # fmt: skip


def measured(folder: Path) -> list[int]:
    """The same of this rank, in bytes more than before."""
    pixels, grid = torch.zeros(16, 1176), torch.tensor([[1, 4, 4]])
    ids = torch.tensor([SMALL.image_token_id] * 4 + [7] * 4)
    prompt = Prompt(ids, torch.arange(8).expand(3, -1), 8, pixels, grid)
    sample = Sample(ids.numpy(), (torch.arange(8) > 4).numpy(), torch.zeros(8).numpy())

    def backward() -> None:
        target_logprobs(model, batch_of([sample], 1), [prompt])[0].sum().backward()

    start = resident()
    model = load_model(ModelSettings(path=folder, dtype="bfloat16"))
    loaded = resident() - start
    optimizer = Optimizer(model, OptimizerSettings())
    for _ in range(2):  # moments come with the first step
        backward()
        optimizer.step(1e-6)
    between = resident() - start
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        backward()
    peak = resident("VmHWM") - start
    optimizer.step(1e-6)
    before = resident()
    with fsdp.whole(model):
        whole = resident() - before
    return [loaded, between, peak, peak, whole]


def rank_of(rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel.join("cpu", ParallelSettings())
    measured(folder / "tiny")
    found = parallel.gather(measured(folder / "small"))
    if parallel.first():
        count = sum(parameters(SMALL).values())
        print(f"{count / 1e6:.0f} M parameters on {size} ranks, bf16 over fp32; MB a rank: arithmetic, measured")
        for i, (name, value) in enumerate(expected(size).items()):
            print(f"{name:20} {value / 1e6:8.0f}   {', '.join(f'{of_rank[i] / 1e6:.0f}' for of_rank in found)}")
    parallel.leave()


def main(size: int) -> None:
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    with tempfile.TemporaryDirectory() as name:
        for folder, config in (("tiny", TINY), ("small", SMALL)):
            Glm4v(config, torch.bfloat16).save_pretrained(Path(name) / folder)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        multiprocessing.spawn(rank_of, (size, port, Path(name)), size)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
