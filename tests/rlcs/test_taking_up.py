"""What a run finds in its folder: rows, rollouts and checkpoints of one that was cut off, finished or started anew."""

import dataclasses
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from small_runs import groups_of, sft_config, tasks_of, train_config

from rlcs import checkpoint
from rlcs.config import EvalSettings, RunSettings
from rlcs.logs import Log, file_name, read_metrics
from rlcs.record import Record
from rlcs.rewards import Verdict
from rlcs.run import Run, load_model
from rlcs.supervised import sft
from rlcs.trainer import train

pytestmark = pytest.mark.long


def waves(folder, first, last, since=0):
    log, tasks = Log(folder, since), tasks_of()
    for wave in range(first, last + 1):
        log.rollouts(wave, groups_of(tasks, wave), [], [])
        log.write("wave", wave, wave, {"reward": 0.5})
    return log


def test_rows_and_rollouts_after_the_checkpoint_go(tmp_path):
    waves(tmp_path, 1, 5).close()
    waves(tmp_path, 3, 3, since=2).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert Record.read(tmp_path).steps_shown == [1, 2, 3]
    (mine := tmp_path / "rollouts" / "labelled-by-hand.jsonl").write_text("{}\n")
    (odd := tmp_path / "rollouts" / "²³.jsonl").write_text("{}\n")
    waves(tmp_path, 1, 1).close()
    assert Record.read(tmp_path).steps_shown == [1] and mine.exists() and odd.exists()


@pytest.mark.parametrize("line", [b"null", b"[1]", b'{"step": 1}', b'{"kind": "wave", "step": null}', b"\xff"])
def test_a_row_of_metrics_that_is_none_is_named(line, tmp_path):
    waves(tmp_path, 1, 2).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    for reader in (Record.read, lambda folder: Log(folder, since=2)):
        with pytest.raises(ValueError, match=r"^metrics: .*metrics\.jsonl, line 1: (must be an object|is not JSON)"):
            reader(tmp_path)


def test_an_evaluation_stands_once(tmp_path):
    for _ in range(2):
        log = Log(tmp_path, 4)
        log.write("eval", 4, 1.0, {"sampled/all": 0.5})
        log.close()
    assert len(read_metrics(tmp_path)) == 1


def test_line_ends_inside_a_text_end_no_row(tmp_path):
    odd = "a\u2028b\x85c"
    log, task = Log(tmp_path), dataclasses.replace(tasks_of()[0], truth=odd)
    log.write("alarm", 1, 0.0, {"alarm": odd})
    log.rollouts(1, groups_of([task], 1), [], [])
    log.close()
    record = Record.read(tmp_path)
    assert record.rows[0]["alarm"] == odd and record.groups(1)[0]["truth"] == odd


def test_half_a_pair_of_utf_16_in_a_verdict_ends_no_run(tmp_path):
    said = groups_of(tasks_of()[:1], 1)[0]
    verdict = Verdict("wrong", 0.0, "\ud83d is not wait")  # of an action that an answer has made up
    said = dataclasses.replace(said, rollouts=(dataclasses.replace(said.rollouts[0], verdict=verdict),))
    log = Log(tmp_path)
    log.rollouts(1, [said], [], [])
    log.write("alarm", 1, 0.0, {"alarm": "\ud83d"})
    log.close()
    assert Record.read(tmp_path).groups(1)[0]["answers"][0]["detail"] == verdict.detail


HOLD = """
import pathlib, sys
from rlcs.files import held
file = held(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_one_process_s_at_a_time(there, demo, tmp_path, monkeypatch):
    """Two would write the same checkpoints, and take each other's half-written ones away."""
    config = train_config(demo, tmp_path / "run", run=RunSettings(out=tmp_path / "run", steps=1))
    others = []

    def begin():
        config.run.out.mkdir()
        command, environment = (
            [sys.executable, "-c", HOLD, str(config.run.out)],
            {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        others.append(subprocess.Popen(command, env=environment, **pipes))
        assert others[0].stdout.readline() == "held\n"

    if there:
        begin()
    else:  # both have found none, and begin
        monkeypatch.setattr("rlcs.run.load_model", lambda *arguments: [begin(), load_model(*arguments)][1])
    with pytest.raises(ValueError, match=r"run must be one run's alone, got another process that trains in it"):
        train(config)
    assert [path.name for path in config.run.out.iterdir()] == [".lock"]
    others[0].kill()
    others[0].communicate()
    monkeypatch.undo()
    train(config)
    assert checkpoint.latest(config.run.out / "checkpoints").step == 1


@pytest.mark.parametrize("start", [sft, train])
def test_an_evaluation_that_a_stop_has_left_out_is_made_up_for(start, demo, tmp_path, monkeypatch):
    """Alarms and curriculum hang on it: the end is that of a run which was never stopped."""

    def config(name):
        made = (sft_config if start is sft else train_config)(demo, tmp_path / name)
        run = dataclasses.replace(made.run, eval_every=2)
        return dataclasses.replace(made, run=run, eval=EvalSettings(tasks=demo / "test.jsonl"))

    start(config("whole"))
    due = Run.due

    def stopped(run, every):
        run.asked = signal.SIGTERM if run.step == 2 else 0
        return due(run, every)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "due", stopped)
        with pytest.raises(SystemExit):
            start(config("stopped"))
    start(config("stopped"))
    rows = [read_metrics(tmp_path / name) for name in ("whole", "stopped")]
    evals = [[{**row, "seconds": 0} for row in each if row["kind"] == "eval"] for each in rows]
    assert evals[0] == evals[1] and 2 in [row["step"] for row in evals[1]]
    states = [checkpoint.latest(tmp_path / name / "checkpoints").state() for name in ("whole", "stopped")]
    assert states[0].get("alarms") == states[1].get("alarms") and states[0].get("proxies") == states[1].get("proxies")


def test_ids_that_are_no_file_names_have_different_ones():
    ids = ["a/b", "a_b", "a:b", "../x", "x" * 300, "x" * 301, "plain-1"]
    names = [file_name(one) for one in ids]
    assert len(set(names)) == len(ids) and all(len(name) < 100 and "/" not in name for name in names)
    assert names[-1] == "plain-1"


def test_wandb_goes_on_with_the_run_that_is_taken_up(tmp_path, monkeypatch):
    opened = []

    def init(**settings):
        opened.append(settings)
        nothing = {"log": lambda row: None, "finish": lambda: None}
        return types.SimpleNamespace(id=settings["id"] or f"new-{len(opened)}", **nothing)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for since in (0, 4, 4, 0, 2):
        log = Log(tmp_path, since, "project")
        log.write("wave", since + 1, 1.0, {"reward": 0.5})
        log.close()
    assert [one["id"] for one in opened] == [None, "new-1", "new-1", None, "new-4"]
    assert all(one["resume"] == "allow" and one["project"] == "project" for one in opened)


@pytest.mark.parametrize("renames", [1, 2])
def test_killed_while_a_checkpoint_is_replaced_one_is_there(renames, tmp_path, monkeypatch):
    def save():
        checkpoint.save(tmp_path, 1, lambda _: None, {"a": torch.ones(1)}, {}, keep=1)

    save()
    real, done = checkpoint.os.rename, []

    def rename(source, target):
        done.append(target)
        if len(done) > renames:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.os, "rename", rename)
        save()
    assert checkpoint.latest(tmp_path).tensors()["a"].tolist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_held_out_tasks_that_are_trained_on_are_told(demo, tmp_path):
    """Also by another path, and among others."""
    (tmp_path / "tasks").mkdir()
    (again := tmp_path / "tasks" / "train.jsonl").symlink_to(demo / "train.jsonl")
    (tmp_path / "tasks" / "train").symlink_to(demo / "train")
    for tasks, told in ((again, [again]), (tmp_path / "tasks", [again]), (demo / "test.jsonl", [])):
        notes = []
        Run(train_config(demo, tmp_path / "run", eval=EvalSettings(tasks)), notes.append)
        said = [f"eval: tasks must be held out to say what is learned, {file} is trained on" for file in told]
        assert notes == said
