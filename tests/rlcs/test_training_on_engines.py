"""Training on answers by servers, and on a wave that is answered ahead: the same run each time, taken up anywhere."""

import dataclasses
import json
import threading
from collections import Counter

import pytest
import torch
from fake_server import STYLES, fake, short_pauses  # noqa: F401 (a fixture)
from small_runs import train_config

from glm4v import Glm4v
from rlcs import rewards
from rlcs.config import EngineSettings, TrainConfig
from rlcs.engines import EngineFault
from rlcs.logs import read_metrics
from rlcs.progress import Bar
from rlcs.trainer import Trainer, train

pytestmark = pytest.mark.long


@pytest.fixture
def lively(monkeypatch):
    """An untrained model gets rewards that differ, so that it is trained."""
    for gate in ("open_answer", "boxed_answer"):
        monkeypatch.setattr(rewards, gate, lambda text: text)
    kinds = dict.fromkeys(rewards.DOMAINS, lambda answer, *_: rewards.graded(len(answer) % 3 / 2))
    monkeypatch.setattr(rewards, "DOMAINS", kinds)


def served(demo, out, server, style="vllm", **changes):
    engine = EngineSettings(
        "http", (server.url,), STYLES[style], model="tiny", patience_s=30.0, **changes.pop("engine", {})
    )
    if style == "transformers":  # it reads no videos
        rows = [row for row in (demo / "train.jsonl").read_text().splitlines() if json.loads(row)["domain"] != "video"]
        (demo / "still.jsonl").write_text("\n".join(rows))
        changes["tasks"] = demo / "still.jsonl"
    return train_config(demo, out, engine=engine, **changes)


@pytest.mark.parametrize("style", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("overlap", [0, 1])
def test_training_on_served_rollouts(style, overlap, demo, tmp_path, lively):
    with fake(demo / "model", style=style) as server:
        config = served(demo, tmp_path / "run", server, style, overlap=overlap)
        assert config.recomputes
        train(config)
    waves = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "wave"]
    assert len(waves) == 4 and [row["total/waves"] for row in waves] == [1, 2, 3, 4]
    assert waves[-1]["total/rollouts"] == 4 * sum(row["prompts"] for row in waves)
    assert all(row["engine/requests"] > 0 for row in waves[: 4 - overlap])
    trained = [row for row in waves if row["trained_groups"] and not row["trained_carried"]]
    if style != "transformers" and not overlap:
        assert all(row["mismatch_first"] < 1e-4 for row in trained if not row["engine/seams"])
    if overlap:
        assert waves[0]["lag"] == 0 and max(row["lag"] for row in waves) >= 1
    assert waves[0]["engine/unknown_logprobs"] == (0 if style != "transformers" else pytest.approx(0.9, abs=0.1))


def test_log_probabilities_that_nobody_knows_need_the_trainers(demo, tmp_path, lively):
    with fake(demo / "model", style="text") as server:
        config = served(demo, tmp_path / "run", server, "text", recompute=False, engine={"update_path": "/mine"})
        with pytest.raises(ValueError, match="recompute must be on"):
            train(config)
    with pytest.raises(ValueError, match="recompute must be on"):
        served(demo, tmp_path / "b", server, "transformers", recompute=False)


def test_a_run_that_lost_its_server_goes_on_where_it_was(demo, tmp_path, lively):
    """The server goes for longer than patience lasts: one line, and the same command goes on to the same end."""
    with fake(demo / "model") as server:
        train(served(demo, tmp_path / "whole", server))
    gone = threading.Event()

    def fault(number, path, body):
        if body and "chat" in path and Counter(p for p, *_ in server.requests)["/finish_weight_update"] == 3:
            gone.set()
        return 503 if gone.is_set() else None

    with fake(demo / "model", fault=fault) as server:
        config = served(demo, tmp_path / "cut", server)
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, patience_s=0.2))
        with pytest.raises(EngineFault, match="HTTP 503"):
            train(config)
    with fake(demo / "model") as server:
        train(served(demo, tmp_path / "cut", server))
    whole, cut = (read_metrics(tmp_path / name) for name in ("whole", "cut"))
    drop = ("seconds", "tokens_per_s", "engine/")
    clean = [[{k: v for k, v in r.items() if not k.startswith(drop)} for r in rows] for rows in (whole, cut)]
    assert clean[0] == clean[1]


# --- ahead ---


def weights(run):
    return Glm4v.from_pretrained(run / "checkpoints" / "step-000004").state_dict()


def test_overlap_is_the_same_each_time_and_one_wave_behind(demo, tmp_path, lively):
    for name in ("a", "b"):
        train(train_config(demo, tmp_path / name, overlap=1, surplus="record"))
    rows = [row for row in read_metrics(tmp_path / "a") if row["kind"] == "wave"]
    assert all(torch.equal(x, weights(tmp_path / "b")[n]) for n, x in weights(tmp_path / "a").items())
    fresh = [row for row in rows if row["trained_groups"] and not row["trained_carried"]]
    assert rows[0]["lag"] == 0 and all(row["lag"] == (row["step"] > 1) for row in fresh)
    assert all("seconds/wait" in row and row["seconds/rollout"] > 0 for row in rows[1:])
    moved = [row["mismatch_first"] for row in fresh if row["step"] > 1]
    assert moved and min(moved) > 1e-6  # the weights had moved on; the ratio is to those who answered


def test_a_wave_ahead_is_kept_in_the_checkpoint(demo, tmp_path, lively):
    """Taken up at any wave, a run with overlap ends with the same weights."""
    train(train_config(demo, tmp_path / "whole", overlap=1))
    config = train_config(demo, tmp_path / "cut", overlap=1)
    trainer = Trainer(config)
    with Bar("test") as bar:
        for _ in range(2):
            trainer.wave(bar)
            trainer._save()
    train(config)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name


def test_what_goes_wrong_ahead_is_told_by_the_trainer(demo, tmp_path, lively):
    trainer = Trainer(train_config(demo, tmp_path / "run", overlap=1))
    with Bar("test") as bar:
        trainer.wave(bar)
        trainer.ahead.result()

        def fails(*_):
            raise EngineFault("engine: gone")

        trainer.engine.rollouts = fails
        trainer.wave(bar)
        with pytest.raises(EngineFault, match="gone"):
            trainer.wave(bar)


def test_overlap_and_refill_exclude_each_other():
    with pytest.raises(ValueError, match="overlap must be 0 where waves are refilled"):
        TrainConfig(overlap=1, refill=True)
