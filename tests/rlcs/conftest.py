"""Run folders as the trainer leaves them, in the small."""

import json

import numpy as np
import pytest

from rlcs.curriculum import Curriculum, is_valid
from rlcs.logs import Log
from rlcs.rewards import Verdict
from rlcs.tasks import make_tasks
from rlcs.tasks.files import write_tasks
from rlcs.tiny import make_checkpoint
from rlcs.types import Group, Rollout, Task

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
    video = {"type": "video", "video": np.stack([RED_OVER_BLUE, 255 - RED_OVER_BLUE])}
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


def scores(sampled, greedy):
    """A row of an evaluation: three domains, 200 tasks each, with an error of 0.02."""
    row = {}
    for mode, means in (("sampled", sampled), ("greedy", greedy)):
        for domain, mean in zip(("counting", "grounding", "video"), means, strict=True):
            row |= {f"{mode}/{domain}": mean, f"{mode}/{domain}/error": 0.02, f"{mode}/{domain}/tasks": 200.0}
        mean = float(np.mean(means))
        row |= {f"{mode}/all": mean, f"{mode}/all/error": 0.02 / 3**0.5, f"{mode}/all/tasks": 600.0}
    return row


def write_config(folder, **settings):
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML


@pytest.fixture(scope="session")
def rl_run(tmp_path_factory):
    """Four waves of RL with an evaluation before and after, an alarm, rollouts with pictures, and a ledger."""
    folder = tmp_path_factory.mktemp("runs") / "rl"
    log, tasks = Log(folder), tasks_of()
    run = {"out": str(folder), "steps": 4, "seconds": None, "seed": 0}
    write_config(
        folder, tasks="t.jsonl", model={"path": "m"}, run=run, groups=2, refill=False, curriculum={"weighting": True}
    )
    curriculum = Curriculum(tasks, 0)
    log.write("eval", 0, 0.0, scores((0.3, 0.4, 0.5), (0.4, 0.5, 0.6)))
    for wave in range(1, 5):
        curriculum.draw(2)
        groups = groups_of(tasks, wave)
        for group in groups:
            curriculum.observe(group.task.id, group.rewards)
        valid = [group for group in groups if is_valid(group.rewards)]
        values = {
            "reward": 0.2 * wave, "reward/counting": 0.1 * wave, "reward/grounding": 0.15 * wave, "pass_at_k": 1.0,
            "pass_at_k/counting": 1.0, "valid": len(valid), "valid_share": len(valid) / 3, "trained_groups": 2,
            "length": 5.0, "forced": 0.25, "unfinished": 0.0, "format": 0.25, "verifier_errors": 0.0, "entropy": 0.5,
            "reward_forced": 0.1,
            "clip_high": 0.01, "clip_low": 0.0, "grad_norm": float("nan") if wave == 2 else 1.0, "mismatch": 1e-6,
            "mismatch_first": 1e-7, "rate": 1e-4, "skipped": float(wave == 2), "trained_tokens": 40.0,
            "seconds/rollout": 1.0, "seconds/update": 0.5, "total/waves": wave, "total/rollouts": 12 * wave,
            "total/sampled_tokens": 60 * wave, "total/trained_tokens": 40 * wave, "total/optimizer_steps": wave,
            **{f"curriculum/{name}": value for name, value in curriculum.metrics().items()},
        }  # fmt: skip
        log.rollouts(wave, groups, valid[:2], valid[2:])
        log.write("wave", wave, 30.0 * wave, values)
        if wave > 2:
            log.write(
                "alarm", wave, 30.0 * wave, {"alarm": f"video: duplicates: {wave}0% of the answers are one (warn)"}
            )
    log.write("eval", 4, 120.0, scores((0.6, 0.6, 0.45), (0.5, 0.6, 0.6)))
    curriculum.ledger.export(folder / "ledger.jsonl")
    log.close()
    return folder


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """Six steps of SFT from the same model, evaluated at the end alone."""
    folder = tmp_path_factory.mktemp("runs") / "control"
    log = Log(folder)
    write_config(folder, data="d.jsonl", model={"path": "m"}, run={"out": str(folder), "steps": 6, "seed": 7}, batch=8)
    for step in range(1, 7):
        values = {
            "loss": 3.0 / step,
            "entropy": 1.0,
            "grad_norm": 1.0,
            "rate": 1e-3,
            "tokens": 99.0,
            "trained_tokens": 50.0,
        }
        log.write("sft", step, 20.0 * step, {**values, "skipped": 0.0, "samples": 8 * step, "epoch": step / 9})
    log.write("eval", 6, 120.0, scores((0.4, 0.4, 0.5), (0.5, 0.6, 0.6)))
    log.close()
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Model and tasks as the demo writes them, in the small."""
    folder = tmp_path_factory.mktemp("demo")
    made = list(make_tasks(48, 1, levels=range(1, 3)))
    write_tasks(folder, "train", made)
    write_tasks(folder, "test", make_tasks(12, 2, "test", levels=range(1, 3)))
    make_checkpoint(folder / "model", [text for task, response in made for text in (task.question, response)])
    return folder
