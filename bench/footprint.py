"""What a rank holds while it trains, measured on gloo ranks against `rlcs.footprint`: `python bench/footprint.py`.

The model has the release's proportions at a quarter of its width and a few layers; resident memory is read from the
system, on Linux.
"""

import ctypes
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
from torch import multiprocessing

from glm4v import Glm4v
from glm4v.config import Config, TextConfig, VisionConfig
from rlcs import parallel
from rlcs.config import ModelSettings, ParallelSettings
from rlcs.footprint import footprint
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


def measure(rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel.join("cpu", ParallelSettings())
    pixels, grid = torch.zeros(16, 1176), torch.tensor([[1, 4, 4]])
    ids = torch.tensor([SMALL.image_token_id] * 4 + [7] * 4)
    prompt = Prompt(ids, torch.arange(8).expand(3, -1), 8, pixels, grid)
    trained = torch.arange(8) > 4
    sample = Sample(ids.numpy(), trained.numpy(), torch.zeros(8).numpy())
    start = resident()
    model = load_model(ModelSettings(path=folder, dtype="bfloat16"))
    loaded = resident() - start
    optimizer = Optimizer(model, OptimizerSettings())
    for _ in range(2):  # moments come with the first step
        target_logprobs(model, batch_of([sample], 1), [prompt])[0].sum().backward()
        optimizer.step(1e-6)
    between = resident() - start
    Path("/proc/self/clear_refs").write_text("5")
    target_logprobs(model, batch_of([sample], 1), [prompt])[0].sum().backward()
    peak = resident("VmHWM") - start
    optimizer.step(1e-6)
    before = resident()
    with parallel.whole(model):
        whole = resident() - before
    found = parallel.gather((loaded, between, peak, whole))
    if parallel.first():
        said = footprint(SMALL, size)
        expected = (said.weights, said.weights + said.moments, said.training, said.whole)
        print(
            f"{said.parameters / 1e6:.0f} M parameters on {size} ranks, bf16 over fp32; MB a rank: arithmetic, measured"
        )
        names = ("loaded", "between steps", "most in a step", "whole, for rollouts")
        for i, (name, value) in enumerate(zip(names, expected, strict=True)):
            print(f"{name:20} {value / 1e6:8.0f}   {', '.join(f'{of_rank[i] / 1e6:.0f}' for of_rank in found)}")
    parallel.leave()


def main(size: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        Glm4v(SMALL, torch.bfloat16).save_pretrained(name)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        multiprocessing.spawn(measure, (size, port, Path(name)), size)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
