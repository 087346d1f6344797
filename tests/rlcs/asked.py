"""An engine of servers with tasks to ask it, for the tests of engines and of their weights."""

import numpy as np
from fake_server import STYLES

from glm4v import Glm4v, Processor
from glm4v.generate import Settings
from rlcs.config import EngineSettings
from rlcs.data import read_tasks
from rlcs.engines.http import Http
from rlcs.learner import Learner
from rlcs.optimizer import Optimizer, OptimizerSettings
from rlcs.prompts import make
from rlcs.rewards import Verdict
from rlcs.rollout import RolloutSettings
from rlcs.run import write_model
from rlcs.types import Rollout, Sample

GIVES_IDS = ("vllm", "older vllm", "sglang", "bytes")
BUDGET = RolloutSettings(max_new_tokens=24, thinking_budget=6)


class Asked:
    """An engine, and what is asked of it."""

    def __init__(self, demo, folder, urls, style="vllm", **settings):
        self.checkpoint = demo / "model"
        self.model = Glm4v.from_pretrained(demo / "model")
        self.processor = Processor.from_pretrained(demo / "model")
        self.notes = []
        if STYLES[style] == "openai":
            settings = {"update_path": "/mine", **settings}
        made = EngineSettings(
            "http", tuple(urls), STYLES[style], model="tiny", **{"patience_s": 30.0, "timeout_s": 60.0, **settings}
        )
        stops = Settings.read(self.model.generation_config, max_new_tokens=1).stop_ids
        self.engine = Http(made, folder / "weights", self.write, self.processor, sorted(stops), self.notes.append)
        kinds = {task.domain: task for task in read_tasks(demo / "train.jsonl")}
        second = "chart" if style == "transformers" else "video"
        self.tasks = [kinds[name] for name in ("ocr", second, "math", "counting")]
        self.prompts = [make(task.messages, self.processor) for task in self.tasks]

    def write(self, folder):
        write_model(self.model, self.checkpoint, folder)

    def rollouts(self, group=3, settings=BUDGET, version=0, seed=5):
        self.engine.renew(version)
        seeds = [(seed, i) for i in range(len(self.tasks))]
        return dict(self.engine.rollouts(self.tasks, self.prompts, group, seeds, settings))

    def exact(self, answer, first=7):
        """Whether the answer's first part is what the tokenizer makes of its text, which is how a server goes on."""
        seam = first if answer.sampled.all() else int(np.flatnonzero(~answer.sampled)[-1]) + 1
        ids = answer.token_ids[:seam].tolist()
        return len(answer.token_ids) <= seam or self.processor.encode(self.engine.read.text(ids)) == ids

    def gaps(self, groups, first=7):
        """The most that the trainer's own log-probabilities differ, of tokens that were sampled."""
        groups = {i: [a for a in answers if self.exact(a, first)] for i, answers in groups.items()}
        assert sum(map(len, groups.values())) >= 4
        learner = Learner(self.model, Optimizer(self.model, OptimizerSettings()), 1 << 14)
        samples = [
            Sample.of_rollout(self.prompts[i].input_ids.numpy(), Rollout(a.token_ids, a.logprobs, a.sampled, a.text,
                              a.finish_reason, Verdict("wrong")), 1.0, i)
            for i, answers in groups.items() for a in answers
        ]  # fmt: skip
        old = learner.with_old(samples, self.prompts, 1.0)
        return np.array([np.abs(s.old - s.logprobs)[s.trained].max() for s in old if s.trained.any()])
