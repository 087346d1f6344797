"""Small runs: settings on the files of the fixture ``demo``, and groups as a trainer leaves them."""

import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from glm4v import Glm4v, Processor
from rlcs import checkpoint
from rlcs.config import ModelSettings, RunSettings, SftConfig, TrainConfig
from rlcs.curriculum import Settings as CurriculumSettings
from rlcs.optimizer import OptimizerSettings
from rlcs.prompts import Prompts
from rlcs.rewards import Verdict
from rlcs.rollout import RolloutSettings
from rlcs.shards import BadRows
from rlcs.supervised import Samples, read_lessons
from rlcs.types import Group, Rollout, Task


def sft_config(demo, out, **changes):
    config = SftConfig(
        data=demo / "train-answers.jsonl",
        model=ModelSettings(path=demo / "model"),
        run=RunSettings(out=out, steps=4, save_every=1, keep=9),
        optimizer=OptimizerSettings(lr=1e-3),
        batch=6,
    )
    return dataclasses.replace(config, **changes)


def train_config(demo, out, **changes):
    config = TrainConfig(
        tasks=demo / "train.jsonl",
        model=ModelSettings(path=demo / "model"),
        run=RunSettings(out=out, steps=4, save_every=1, keep=9),
        optimizer=OptimizerSettings(lr=1e-3, decay="constant"),
        curriculum=CurriculumSettings(group_size=4),
        rollout=RolloutSettings(max_new_tokens=12, thinking_budget=4),
        groups=4,
        updates=2,
    )
    return dataclasses.replace(config, **changes)


def lessons(demo, **changes):
    """Samples and prompts of some of the demo's answers, pictures and videos among them."""
    config = sft_config(demo, demo / "unused", **changes)
    processor = Processor.from_pretrained(demo / "model")
    stop = Glm4v.from_pretrained(demo / "model").generation_config["eos_token_id"]
    make, prompts = Samples(processor, config.thinking, stop), Prompts(processor)
    found = read_lessons(config, BadRows("fatal", 0, print))[:12]
    made = [prompts(one.id, one.messages, make.prompt_processor(one)) for one in found]
    return [make(one, prompt, i) for i, (one, prompt) in enumerate(zip(found, made, strict=True))], made


def weights(folder):
    saved = checkpoint.latest(folder / "checkpoints")
    return {**load_file(saved.folder / "model.safetensors"), **saved.tensors()}


def table(path, rows, group=8):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def with_damaged_pictures(demo, folder):
    """The demo's tasks in another folder: of each third picture the end is missing, which its header doesn't tell."""
    shutil.copytree(demo / "train", folder / "train")
    shutil.copy(demo / "train.jsonl", folder / "train.jsonl")
    for path in sorted((folder / "train").glob("*.png"))[::3]:
        path.write_bytes(path.read_bytes()[:-30])
    return folder / "train.jsonl"


RED_OVER_BLUE = np.zeros((4, 6, 3), np.uint8)
RED_OVER_BLUE[0::2, :, 0] = 255
RED_OVER_BLUE[1::2, :, 2] = 255
OUTCOMES = (Verdict("score", 1.0), Verdict("wrong", 0.0, "not 3"), Verdict("format", 0.0, "no box"), Verdict("error"))


def answer(text, verdict, forced=False, tokens=5):
    sampled = np.ones(tokens, bool)
    sampled[tokens // 2] = not forced
    return Rollout(np.arange(tokens), np.zeros(tokens, np.float32), sampled, text, "stop", verdict)


def boxed(text):
    return f"<think>so & so</think><answer><|begin_of_box|>{text}<|end_of_box|></answer>"


def tasks_of():
    """One task of counting, one of grounding, one with a video."""
    image = {"type": "image", "image": RED_OVER_BLUE}
    video = {"type": "video", "video": np.stack([RED_OVER_BLUE, 255 - RED_OVER_BLUE]), "fps": 24}
    made = (
        ("count", "counting", image, "3"),
        ("box", "grounding", image, "[0,0,500,500]"),
        ("film", "video", video, "1"),
    )
    return [
        Task(
            name, domain, [{"role": "user", "content": [part, {"type": "text", "text": f"Say {name}."}]}], truth, "easy"
        )
        for name, domain, part, truth in made
    ]


def groups_of(tasks, wave):
    """Four answers to each task; more of them are right in later waves."""
    groups = []
    for task in tasks:
        wrong = "[0,0,100,100]" if task.domain == "grounding" else "<script>alert(4)</script>\x1b[2J"
        right = min(wave, 3)
        made = [answer(boxed(task.truth), OUTCOMES[0]) for _ in range(right)]
        made += [answer(boxed(wrong), OUTCOMES[1], forced=True)] * (3 - right)
        made.append(answer("no box at all", OUTCOMES[2 if wave < 4 else 3]))
        groups.append(Group(task, tuple(made), wave))
    return groups


def wait_for_the_end_of(process: Path) -> None:
    """Of a process in /proc, a minute at most; one that nobody has asked after is at its end, too."""
    deadline = time.monotonic() + 60
    while process.exists() and (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
