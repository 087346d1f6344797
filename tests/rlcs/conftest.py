"""Run folders as the trainer leaves them, in the small."""

import json

import numpy as np
import pytest
from small_runs import groups_of, tasks_of

from rlcs.curriculum import Curriculum, is_valid
from rlcs.logs import Log
from rlcs.tasks import make_tasks
from rlcs.tasks.files import write_tasks
from rlcs.tiny import make_checkpoint


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
