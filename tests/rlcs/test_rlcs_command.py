"""`rlcs sft|train|eval` as a user meets it: every fault is one line that names what is wrong, and nothing is lost."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import sft_config, train_config, with_damaged_pictures

from glm4v import Glm4v, Processor
from glm4v_ext import __version__
from rlcs import checkpoint, parallel, rewards
from rlcs.admission import check_tasks
from rlcs.cli import COMMANDS, main
from rlcs.config import EvalSettings, JudgeSettings, ModelSettings, RunSettings, plain
from rlcs.data import read_tasks
from rlcs.logs import read_metrics
from rlcs.rewards import Judge
from rlcs.rollout import RolloutSettings
from rlcs.run import Run, load_model

pytestmark = pytest.mark.long

LONG, PICTURE = ([{"role": "user", "content": content}] for content in ("word " * 3000, "<image>"))


@pytest.fixture
def refused(capfd):
    """Runs a command that must end with exit code 2 and one line, which it gives back."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(one) for one in arguments])
        said = capfd.readouterr().err.strip()
        assert end.value.code == 2 and len(said.splitlines()) == 1 and said.startswith("rlcs: "), said
        return said

    return run


def write(config, tmp_path, name="config"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain(config)))
    return path


def start(command, config, tmp_path, **how):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "rlcs.cli", command, "--config", str(write(config, tmp_path))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def rows_with(demo, tmp_path, **changes):
    """The demo's first task and the same one changed, as a file."""
    row = json.loads((demo / "train.jsonl").read_text().splitlines()[0])
    row = json.loads(json.dumps(row).replace("train/", f"{demo}/train/"))
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, {**row, "id": "changed", **changes})))
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: rlcs {name}" in said
    if name == "eval":
        assert "--rollout.max-new-tokens" in said and "--judge.urls" in said


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")


# --- what is refused before anything is computed ---


def test_paths_that_lead_nowhere(demo, tmp_path, refused):
    none = tmp_path / "none"
    good = ["--model.path", demo / "model", "--run.out", tmp_path / "run"]
    assert f"config: {none}: cannot be read: No such file" in refused("train", "--config", none)
    assert str(none) in refused("train", *good, "--tasks", none)
    assert str(none) in refused("sft", *good, "--data", none)
    assert str(none) in refused("train", "--model.path", none, "--tasks", demo / "train.jsonl")
    assert str(none) in refused("eval", "--model", none, "--tasks", demo / "test.jsonl")
    assert str(none) in refused("eval", "--model", demo / "model", "--tasks", none)
    (tmp_path / "file").write_text("")
    out = ["--run.out", tmp_path / "file" / "run"]
    assert "file" in refused("train", "--model.path", demo / "model", "--tasks", demo / "train.jsonl", *out)


def test_a_checkpoint_without_a_tokenizer(demo, tmp_path, refused):
    shutil.copytree(demo / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert "tokenizer.json" in refused("eval", "--model", tmp_path / "model", "--tasks", demo / "test.jsonl")
    config = sft_config(demo, tmp_path / "run", model=ModelSettings(path=tmp_path / "model"))
    assert "tokenizer.json" in refused("sft", "--config", write(config, tmp_path))


def test_torchrun_hears_one_of_its_processes(capfd, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert "torchrun must start one of sft, train, got plan" in refused("plan")
    monkeypatch.setenv("RANK", "1")
    for arguments, code in ((["--help"], 0), (["nothing"], 2), (["plan"], 2)):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == code
    said = capfd.readouterr()
    assert said.out == said.err == ""


TWICE = """
import atexit, signal
from rlcs import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
atexit.register(signal.raise_signal, signal.SIGINT)
cli.COMMANDS["train"] = lambda arguments: signal.raise_signal(signal.SIGINT)
cli.main(["train"])
"""

ONE_OF_TWO = """
import atexit, os
from rlcs import cli, parallel

class Kept:
    def __del__(self):
        print("dropped")

os.environ.update(RANK="0", WORLD_SIZE="2")
kept, parallel.meet, cli.COMMANDS["train"] = Kept(), lambda: None, lambda arguments: print("done")
atexit.register(print, "the end")
cli.main(["train"])
"""


def test_one_of_several_processes_ends_before_what_it_kept_is_dropped():
    """Threads of gloo's that are still at work there would abort it."""
    ended = subprocess.run([sys.executable, "-c", ONE_OF_TWO], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\nthe end\n", "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domain": "poetry"}, "line 2: domain must be one of math, physics"),
        ({"domain": "nowhere:verifier"}, "verifier nowhere:verifier cannot be loaded"),
        ({"domain": "general"}, "domain 'general' needs a judge"),
        ({"messages": LONG, "images": []}, "task 'changed': the prompt must be below 2048 tokens"),
        ({"messages": PICTURE, "images": ["none.png"]}, "line 2: none.png must be a file"),
        ({"messages": PICTURE, "images": [__file__]}, "task 'changed': image: "),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_answered_or_judged(changes, said, demo, tmp_path, refused):
    tasks = rows_with(demo, tmp_path, **changes)
    config = train_config(demo, tmp_path / "run", tasks=tasks)
    assert said in refused("train", "--config", write(config, tmp_path))
    assert said in refused("eval", "--model", demo / "model", "--tasks", tasks)
    config = sft_config(demo, tmp_path / "run", eval=EvalSettings(tasks))
    assert said in refused("sft", "--config", write(config, tmp_path))
    assert not (tmp_path / "run").exists()


def test_tasks_that_are_too_long_are_left_out_if_asked(demo, tmp_path):
    tasks = rows_with(demo, tmp_path, messages=LONG, images=[])
    notes = []
    run = Run(train_config(demo, tmp_path / "run", tasks=tasks, bad_rows="skip"), notes.append)
    assert len(run.tasks) == 1 and "task 'changed'" in notes[0]


def test_many_tasks_are_checked_behind_a_bar(demo, monkeypatch, capfd):
    tasks = read_tasks(demo / "train.jsonl")
    processor = Processor.from_pretrained(demo / "model")
    assert check_tasks(tasks, RolloutSettings(), processor) == tasks and not capfd.readouterr().err
    monkeypatch.setattr("rlcs.admission.MANY", len(tasks))
    monkeypatch.setattr("rlcs.admission.STRIDE", 16)
    assert check_tasks(tasks, RolloutSettings(), processor) == tasks
    assert "checking tasks: 33%" in (said := capfd.readouterr().err) and "checking tasks: 100%" in said


def test_settings_that_do_not_fit(demo, tmp_path, refused, monkeypatch):
    train = ["train", "--config", write(train_config(demo, tmp_path / "run"), tmp_path)]
    assert "max_new_tokens must be below 2048, the model's context, got 4096" in refused(
        *train, "--rollout.max-new-tokens", 4096
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl must hold a row, got none" in refused(*train, "--eval.tasks", tmp_path / "empty.jsonl")
    url = ["--judge.urls", "http://127.0.0.1/v1"]
    assert "models must be one for each url (1), got 0 (see rlcs train --help)" in refused(*train, *url)
    assert "--groups" in refused(*train, "--groups", "many") and "--grups" in refused(*train, "--grups", 3)
    assert "--model" in refused("eval") and "--steps" in refused("show", demo, "--steps", 3)
    judge = [*url, "--judge.models", "m", "--judge.key-variable", "NO_SUCH_KEY"]
    assert "key_variable must name a variable that is set, got NO_SUCH_KEY" in refused(*train, *judge)
    if not torch.cuda.is_available():
        assert "device must be one that torch has here, got 'cuda'" in refused(*train, "--model.device", "cuda")
    answers = ["eval", "--model", demo / "model", "--tasks", demo / "test.jsonl"]
    for device, why in (("gpu", "Expected one of cpu, cuda"), ("meta", "Tensor.item() cannot be called on meta")):
        for options in ([*train, "--model.device", device], [*answers, "--device", device]):
            assert f"device must be one that torch has here, got {device!r}: {why}" in refused(*options)
    monkeypatch.setattr("rlcs.run.find_spec", lambda _: None)
    assert "wandb must be installed" in refused(*train, "--run.wandb", "project")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoding", ["ascii", "UTF-8", "utf-8", "latin-1"])
def test_what_is_wrong_with_a_flag_is_said_in_any_encoding(encoding, refused, monkeypatch):
    """The parser draws its frame with other signs in some."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for flag, value, said in (
        ("--optimizer.lr", "nan", "Error parsing optimizer: optimizer: lr must be from 0 to 1, got nan"),
        ("--groups", "many", "Error parsing --groups: invalid literal for int() with base 10: 'many'"),
        ("--grups", 3, "Unrecognized options: --grups, 3"),
    ):
        assert refused("train", flag, value) == f"rlcs: {said} (see rlcs train --help)"


def test_an_evaluation_leaves_bad_tasks_out_where_it_may(demo, tmp_path, refused, capfd):
    """Those that cannot be read, asked or decoded, each of which is told; a damaged picture before the first answer."""
    tasks, out = with_damaged_pictures(demo, tmp_path), tmp_path / "scores.json"
    rows = [json.loads(line) for line in tasks.read_text().splitlines()]
    bad = [
        rows[0],
        {**rows[1], "id": "long", "messages": LONG, "images": []},
        {**rows[1], "id": "x", "domain": "poetry"},
    ]
    with tasks.open("a") as more:
        more.write("".join(f"{json.dumps(row)}\n" for row in bad) + "{\n")
    command = ["eval", "--model", demo / "model", "--tasks", tasks, "--out", out, "--threads", 1, "--samples", 0]
    command += ["--rollout.max-new-tokens", 2]
    assert "line 49: id must be another than that of line 1" in refused(*command)
    assert "bad rows must be at most 0" in refused(*command, "--bad-rows", "skip", "--max-bad-rows", 0)
    with pytest.raises(SystemExit) as end:
        main([*map(str, command), "--bad-rows", "skip"])
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("data: ")]
    assert end.value.code == 0 and len(notes) == len(set(notes))
    damaged = [note for note in notes if ".png: cannot be read: image file is truncated" in note]
    assert damaged and len(notes) == len(damaged) + len(bad) + 1
    (whole,) = (score for score in json.loads(out.read_text()) if score["domain"] == "all")
    assert whole["tasks"] == len(rows) - len(damaged)


def test_settings_of_an_evaluation_that_do_not_fit(demo, refused):
    for flag, value, said in (
        ("--threads", 0, "threads must be 1 or more, got 0"),
        ("--threads", 30000, "threads must be at most 1024, got 30000"),
        ("--seed", -1, "seed must be 0 or more, got -1"),
        ("--rollout.temperature", 0.5, "rollout.temperature must be 1, as sampled answers have it, got 0.5"),
        ("--rollout.top-p", 0.9, "rollout.top_p must be 1, as sampled answers have it, got 0.9"),
    ):
        found = refused("eval", "--model", demo / "model", "--tasks", demo / "test.jsonl", flag, value)
        assert found == f"rlcs: eval: {said}"


def test_an_evaluation_goes_where_it_is_told(demo, monkeypatch):
    devices = []
    monkeypatch.setattr(parallel, "device", torch.device)  # meta stands for another one, though it has no values
    monkeypatch.setattr("rlcs.evaluate.evaluate", lambda model, *_: devices.append(model.device.type) or [])
    for device in ([], ["--device", "meta"]):
        with pytest.raises(SystemExit) as end:
            main(["eval", "--model", str(demo / "model"), "--tasks", str(demo / "test.jsonl"), *device])
        assert end.value.code == 0
    assert devices == ["cpu", "meta"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_copied_out_of_the_file_once(device, demo, monkeypatch):
    """On the CPU here; elsewhere they have been, to places that count."""
    model = Glm4v.from_pretrained(demo / "model")
    before = [weight.data_ptr() for weight in model.parameters()]
    monkeypatch.setattr(parallel, "device", torch.device)
    monkeypatch.setattr(Glm4v, "from_pretrained", lambda *_: model)
    load_model(ModelSettings(path=demo / "model", device=device))
    stayed = {weight.data_ptr() == at for weight, at in zip(model.parameters(), before, strict=True)}
    assert stayed == {device != "cpu"}


# --- runs that are taken up ---


@pytest.fixture(scope="module")
def two_steps(demo, tmp_path_factory):
    """A run of two steps, each saved."""
    out = tmp_path_factory.mktemp("runs") / "two"
    config = sft_config(demo, out, run=RunSettings(out=out, steps=2, save_every=1, keep=9))
    with pytest.raises(SystemExit) as end:
        main(["sft", "--config", str(write(config, out.parent))])
    assert end.value.code == 0
    return out


def taken_up(demo, two_steps, tmp_path, **changes):
    """Settings of three steps that go on from a copy of them."""
    out = tmp_path / "run"
    shutil.copytree(two_steps, out)
    return sft_config(demo, out, run=RunSettings(out=out, steps=3, save_every=1, keep=9), **changes)


def test_changed_settings_are_told(demo, two_steps, tmp_path):
    notes = []
    Run(taken_up(demo, two_steps, tmp_path, batch=5), notes.append).log.close()
    (said,) = notes
    assert "step-000002, with changed settings: " in said and "batch 6 -> 5" in said and "run.steps 2 -> 3" in said


def test_weights_stay_the_checkpoint_s_where_the_model_s_path_changes(demo, two_steps, tmp_path):
    notes = []
    moved = shutil.copytree(demo / "model", tmp_path / "moved")
    Run(taken_up(demo, two_steps, tmp_path, model=ModelSettings(path=moved)), notes.append).log.close()
    (said,) = notes
    assert f"model.path {demo / 'model'} -> {moved}" in said and said.endswith("; the weights stay the checkpoint's")


def test_settings_that_weights_hang_on_must_stay(demo, two_steps, tmp_path, refused):
    config = taken_up(demo, two_steps, tmp_path)
    path = write(config, tmp_path)
    assert "model.lora_rank must be as in" in refused("sft", "--config", path, "--model.lora-rank", 4)
    assert "model.freeze must be as in" in refused("sft", "--config", path, "--model.freeze", "vision")
    train = train_config(demo, config.run.out)
    assert "must be a folder of `rlcs train`, got one of `rlcs sft`" in refused(
        "train", "--config", write(train, tmp_path, "train")
    )


def test_a_damaged_checkpoint_is_named(demo, two_steps, tmp_path, refused):
    config = taken_up(demo, two_steps, tmp_path)
    folder = config.run.out / "checkpoints" / "step-000002"
    path = write(config, tmp_path)
    (folder.parent / "step-by-step").mkdir()  # somebody's notes
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name, content in (
        ("state.json", b"{}"), ("state.json", b'{"se'), ("trainer.safetensors", b"\0" * 9),
        ("trainer.safetensors", None), ("model.safetensors", whole["model.safetensors"][:-9]), ("config.json", None),
    ):  # fmt: skip
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        said = refused("sft", "--config", path)
        assert "step-000002" in said and name in said, said
        (folder / name).write_bytes(whole[name])


# --- runs that are stopped ---


@pytest.mark.parametrize(("command", "number"), [("sft", signal.SIGINT), ("train", signal.SIGTERM)])
def test_a_stopped_run_is_saved(command, number, demo, tmp_path):
    make = {"sft": sft_config, "train": train_config}[command]
    run = RunSettings(out=tmp_path / "cut", steps=400, save_every=0)
    cut = make(demo, run.out, run=run)
    process = start(command, cut, tmp_path)
    while process.poll() is None and len(read_metrics(run.out)) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate()
    step = checkpoint.latest(run.out / "checkpoints").step
    assert "stops after this step" in out, err
    saved = f"step {step} is saved in {run.out / 'checkpoints'}; the same command goes on from it"
    if number == signal.SIGTERM:  # a scheduler's: all is well
        assert process.returncode == 0 and out.splitlines()[-1] == saved and "Traceback" not in err
    else:
        assert process.returncode == 130 and err.splitlines()[-1] == f"rlcs {command}: interrupted: {saved}"
    assert read_metrics(run.out)[-1]["step"] == step < 400
    again = Run(cut, lambda _: None)
    assert again.step == step
    again.log.close()


def test_an_interrupted_command_ends_in_one_line_however_often_it_is_interrupted():
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (130, "rlcs train: interrupted\n")


def test_a_log_without_room_is_one_line(demo, tmp_path):
    """Though TensorBoard writes in a thread, whose end Python tells in its own way."""
    config = sft_config(demo, tmp_path / "run")
    process = start("sft", config, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    _, err = process.communicate()
    assert process.returncode == 2 and len(err.splitlines()) == 1, err
    assert err.startswith(f"rlcs: [Errno 27] File too large: '{config.run.out}/")


def test_a_full_disk_leaves_the_older_checkpoint(demo, two_steps, tmp_path):
    config = taken_up(demo, two_steps, tmp_path)
    before = checkpoint.latest(config.run.out / "checkpoints").tensors()
    largest = (config.run.out / "checkpoints" / "step-000002" / "model.safetensors").stat().st_size
    for room in (largest // 2, largest + 1000):  # in the model; in the optimizer's state, which is larger

        def limit(room=room):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        process = start("sft", config, tmp_path, preexec_fn=limit)
        _, err = process.communicate()
        assert process.returncode == 2, err
        said = err.strip().splitlines()[-1]
        assert "step-000003 cannot be written" in said and "older ones are as they were" in said
        kept = checkpoint.latest(config.run.out / "checkpoints")
        assert kept.step == 2 and kept.tensors().keys() == before.keys()
        assert {path.name for path in kept.folder.parent.iterdir()} == {"step-000001", "step-000002"}
        assert load_file(kept.folder / "model.safetensors")


# --- judges and workers ---


def test_a_judge_from_the_settings(monkeypatch):
    monkeypatch.setattr(rewards, "DOMAINS", dict(rewards.DOMAINS))
    monkeypatch.setenv("A_KEY", "secret")
    judge = JudgeSettings(("http://127.0.0.1/v1",) * 2, ("one", "two"), "A_KEY", concurrency=5)
    judge.use()
    assert rewards.DOMAINS["general"].judge.concurrency == rewards.concurrency("general") == 5
    assert "secret" not in json.dumps(plain(judge))
    rewards.check("general")


@pytest.mark.parametrize(("processes", "concurrency", "pause_s"), [(1, 5, 0.5), (2, 2, 1.0), (8, 1, 4.0)])
def test_processes_share_a_judge_s_limits(processes, concurrency, pause_s, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "DOMAINS", dict(rewards.DOMAINS))
    monkeypatch.setattr(parallel, "started_as", lambda: (0, processes))
    monkeypatch.setattr(parallel, "join", lambda *_: None)
    used = []
    monkeypatch.setattr("rlcs.config.Judge", lambda endpoints: used.extend(endpoints) or Judge(endpoints))
    judge = JudgeSettings(("http://127.0.0.1/v1",), ("one",), concurrency=5, requests_per_minute=120)
    Run(sft_config(demo, tmp_path, judge=judge), lambda _: None).log.close()
    assert [(one.concurrency, one._pace._step_s) for one in used] == [(concurrency, pause_s)]
