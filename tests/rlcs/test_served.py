"""Rollouts by a real ``transformers serve`` on loopback, with the tiny model: pictures, forced answering, new weights,
and a server that is killed in the middle of a wave and started again."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from glm4v import Glm4v, Processor
from glm4v.answer import CLOSE_THINK, OPEN_ANSWER
from glm4v.generate import Settings
from rlcs.config import EngineSettings
from rlcs.data import read_tasks
from rlcs.engines.http import Http
from rlcs.logs import read_metrics
from rlcs.prompts import make, packed
from rlcs.rollout import RolloutSettings
from rlcs.run import write_model
from rlcs.tasks import MAKERS, make_tasks
from rlcs.tasks.files import write_tasks
from rlcs.tiny import make_checkpoint

MISSING = [name for name in ("transformers", "fastapi", "uvicorn", "openai", "torchvision") if not find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)} (transformers[serving])"),
]
SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
START_S = 300  # a shared machine imports torch and transformers


class Served:
    """A server process that can be killed and started again at the same address."""

    def __init__(self, log):
        self.log = open(log, "ab")  # noqa: SIM115 (the process writes to it)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process = None

    def start(self):
        command = [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=self.log, stderr=self.log, env=environment, start_new_session=True
        )
        end = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/health", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server doesn't start"
                time.sleep(0.5)

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    makers = {name: maker for name, maker in MAKERS.items() if name != "video"}  # which this server doesn't read
    made = list(make_tasks(48, 1, levels=range(1, 3), makers=makers))
    write_tasks(folder, "train", made)
    make_checkpoint(folder / "model", [text for task, response in made for text in (task.question, response)])
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("server") / "log.txt")
    server.start()
    yield server
    server.kill()


def engine_of(demo, folder, url, model, **settings):
    processor = Processor.from_pretrained(demo / "model")
    how = EngineSettings("http", (url,), "transformers", **{"patience_s": 400.0, "timeout_s": 120.0, **settings})
    stops = Settings.read(model.generation_config, max_new_tokens=1).stop_ids
    return Http(how, folder, lambda to: write_model(model, demo / "model", to), processor, sorted(stops))


def asked(demo, domains):
    tasks = {task.domain: task for task in read_tasks(demo / "train.jsonl")}
    processor = Processor.from_pretrained(demo / "model")
    chosen = [tasks[domain] for domain in domains]
    return chosen, [make(task.messages, processor) for task in chosen]


def test_pictures_and_forced_answers(server, demo, tmp_path):
    """What a prompt weighs there is checked by the engine: each is read as the trainer reads it."""
    model = Glm4v.from_pretrained(demo / "model")
    engine = engine_of(demo, tmp_path / "weights", server.url, model)
    tasks, prompts = asked(demo, ("ocr", "grounding", "math", "chart"))
    engine.renew(0)
    seeds = [(7, i) for i in range(len(tasks))]
    how = RolloutSettings(max_new_tokens=20, thinking_budget=5)
    groups = dict(engine.rollouts(tasks, prompts, 3, seeds, how))
    metrics = engine.metrics()
    answers = [answer for group in groups.values() for answer in group]
    assert sorted(groups) == [0, 1, 2, 3] and len(answers) == 12 and metrics["read_again"] == 1
    forced = [answer for answer in answers if not answer.sampled.all()]
    assert len(forced) >= 6 and all(CLOSE_THINK + OPEN_ANSWER in answer.text for answer in forced)
    assert all(np.isnan(answer.logprobs[answer.sampled]).all() for answer in answers)
    assert len({answer.text for answer in answers}) > 8  # sampled, not greedy


def test_new_weights_answer(server, demo, tmp_path):
    """A model that says one token for certain, and then another."""
    model = Glm4v.from_pretrained(demo / "model")
    engine = engine_of(demo, tmp_path / "weights", server.url, model)
    tasks, prompts = asked(demo, ("math",))
    for version, letter in enumerate("kz"):
        with torch.no_grad():
            (token,) = engine.processor.encode(letter)
            batch = packed(prompts)
            hidden = model.hidden(**batch)[-1]
            model.lm_head.weight.zero_()
            model.lm_head.weight[token] = 50 * hidden / hidden.norm() ** 2
        engine.renew(version)
        ((_, answers),) = engine.rollouts(tasks, prompts, 2, [(1, 0)], RolloutSettings(max_new_tokens=1))
        assert [answer.text for answer in answers] == [letter, letter]


def test_killed_in_the_middle_of_a_wave_nothing_is_lost_and_nothing_counted_twice(server, demo, tmp_path):
    model = Glm4v.from_pretrained(demo / "model")
    engine = engine_of(demo, tmp_path / "weights", server.url, model, concurrency=4)
    tasks, prompts = asked(demo, ("ocr", "math", "counting", "chart"))
    engine.renew(0)
    ended, killed = [], threading.Event()

    def restart():
        server.kill()
        time.sleep(1)
        server.start()

    def progress(done, total):
        ended.append(done)
        if done == 5:
            killed.set()
            threading.Thread(target=restart).start()

    seeds = [(3, i) for i in range(len(tasks))]
    how = RolloutSettings(max_new_tokens=16, thinking_budget=6)
    found = list(engine.rollouts(tasks, prompts, 4, seeds, how, progress))
    metrics = engine.metrics()
    assert killed.is_set() and ended == list(range(1, 17))  # each answer once
    assert sorted(i for i, _ in found) == [0, 1, 2, 3] and all(len(group) == 4 for _, group in found)
    assert metrics["retries"] >= 1 and metrics["told"] >= 2  # it was told its weights again


def test_a_run_whose_server_is_killed(server, demo, tmp_path):
    """Training with a wave ahead goes on over the kill, and counts each rollout once."""
    from small_runs import train_config

    from rlcs.trainer import Trainer

    engine = EngineSettings("http", (server.url,), "transformers", patience_s=400.0, timeout_s=120.0, concurrency=4)
    trainer = Trainer(train_config(demo, tmp_path / "run", engine=engine, overlap=1, groups=2))
    begin, waves = trainer._begin, []

    def begin_and_kill(bar):
        begin(bar)
        waves.append(1)
        if len(waves) == 2:
            server.kill()
            threading.Thread(target=server.start).start()

    trainer._begin = begin_and_kill
    trainer.run()
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "wave"]
    assert [row["total/waves"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["total/rollouts"] == 4 * sum(row["prompts"] for row in rows)
    assert sum(row["engine/retries"] for row in rows) >= 1
