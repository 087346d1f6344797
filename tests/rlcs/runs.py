"""Settings of small runs on the files of the fixture ``demo``."""

import dataclasses

from rlcs.config import ModelSettings, RunSettings, SftConfig, TrainConfig
from rlcs.curriculum import Settings as CurriculumSettings
from rlcs.optimizer import OptimizerSettings
from rlcs.rollout import RolloutSettings


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
