"""A run folder that a hand or a full disk has damaged: what reads it says which file, and it stays as it is."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small_runs import sft_config, train_config

from rlcs import checkpoint, evaluate
from rlcs.config import RunSettings
from rlcs.record import Record
from rlcs.report import headline, report
from rlcs.rewards import Verdict
from rlcs.supervised import sft
from rlcs.trainer import train

pytestmark = pytest.mark.long

START = {"sft": sft, "train": train}


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """A run of each kind, of two steps; of RL with groups that are carried, and others answered ahead."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"sft": {}, "train": {"overlap": 1, "groups": 2, "updates": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "verify", lambda domain, text, *_: Verdict("score", float(len(text) % 2)))
        for name, config in (("sft", sft_config), ("train", train_config)):
            run = RunSettings(out=folder / name, steps=3, save_every=2, keep=9)
            START[name](config(demo, run.out, run=run, **changes[name]))
            shutil.rmtree(run.out / "checkpoints" / "step-000003")  # as if it was cut off behind the one before
    return folder


@pytest.fixture
def refused(runs, demo, tmp_path):
    """``refused(kind, change)``: what is said where the run goes on from a state that ``change(state)`` has changed;
    nothing of the folder has changed by then."""

    def of(kind, change):
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(runs / kind, out)
        path = checkpoint.latest(out / "checkpoints").state_file
        state = json.loads(path.read_text())
        state = change(state) or state
        path.write_text(state if isinstance(state, str) else json.dumps(state))
        config = {"sft": sft_config, "train": train_config}[kind](demo, out, run=RunSettings(out=out, steps=4))
        before = contents(out)
        with pytest.raises(ValueError) as error:
            START[kind](config, lambda _: None)
        assert contents(out) == before
        said = str(error.value)
        assert said.startswith(f"checkpoint: {path}") and "\n" not in said
        return said

    return of


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def put(value, *where):
    """A change of a state: this value, or nothing, in this place."""

    def change(state):
        for name in where[:-1]:
            state = state[name]
        if value is None:
            del state[where[-1]]
        else:
            state[where[-1]] = value

    return change


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("seconds",), None, "seconds: Field required"),
        (("seconds",), math.nan, "seconds: Input should be a finite number"),
        (("seconds",), "1", "seconds: Input should be a valid number, got '1'"),
        (("config",), [], "config: Input should be a valid dictionary, got []"),
        (("curriculum",), None, "curriculum: Field required"),
        (("curriculum", "draws"), "2", "curriculum.draws: Input should be a valid integer, got '2'"),
        (("curriculum", "passed", 0), math.nan, "curriculum.passed.0: Input should be a finite number"),
        (("curriculum", "seen", 0), 2**63, "curriculum.seen.0: Input should be less than or equal to"),
        (("curriculum", "failed", 0), None, "failed must be one for each of the ids, got"),
        (("curriculum", "random"), {}, "random must be the state of numpy's generator, got another"),
        (("curriculum", "factors"), {"nowhere": "x"}, "curriculum.factors.nowhere: Input should be a valid number"),
        (("alarms", "standing"), {"ocr/errors": "x"}, "alarms.standing.ocr/errors: Input should be a valid integer"),
        (("alarms", "best"), {"ocr": [1]}, "alarms.best.ocr.1: Field required"),
        (("totals", "rollouts"), None, "totals.rollouts: Field required"),
        (("proxies",), {"ocr": 1}, "proxies.ocr: Input should be a valid tuple, got 1"),
        (("carried", 0, "rollouts", 0, "logprobs"), [], "logprobs must be as long as token_ids"),
        (
            ("carried", 0, "rollouts", 0, "token_ids", 0),
            -1,
            "carried.0.rollouts.0.token_ids.0: Input should be greater",
        ),
        (("carried", 0, "rollouts", 0, "verdict"), ["score", 2, ""], "score of 'score' must be in [0, 1], got 2"),
        (("ahead", "groups", 0, "rollouts"), "x", "ahead.groups.0.rollouts: Input should be a valid list, got 'x'"),
    ],
)
def test_a_state_of_rl_that_is_no_state(where, value, said, refused):
    assert said in refused("train", put(value, *where))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(None, "position"), "position: Field required"),
        (put(-1, "epoch"), "epoch: Input should be greater than or equal to 0, got -1"),
        (put("x", "row"), "row: Input should be a valid integer, got 'x'"),
        (lambda state: [state], "the whole: Input should be a dictionary"),
        (lambda state: 9999 * "[", "cannot be read: maximum recursion depth exceeded"),
        (lambda state: json.dumps(state)[:-1], "cannot be read: Expecting ',' delimiter"),
    ],
)
def test_a_state_of_sft_that_is_no_state(change, said, refused):
    assert said in refused("sft", change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, tensors: tensors.pop(f"exp_avg.{name}"), "exp_avg.NAME must be of shape SHAPE, got none"),
        (
            lambda name, tensors: tensors.update({f"exp_avg_sq.{name}": torch.zeros(1)}),
            "exp_avg_sq.NAME must be of shape SHAPE, got (1,)",
        ),
        (
            lambda name, tensors: tensors.update({f"step.{name}": torch.zeros(2)}),
            "step.NAME must be of shape (), got (2,)",
        ),
    ],
)
def test_moments_that_do_not_fit_their_parameter(change, said, runs, demo, tmp_path):
    out, name = tmp_path / "run", "model.language_model.norm.weight"
    shutil.copytree(runs / "sft", out)
    saved = checkpoint.latest(out / "checkpoints")
    tensors = saved.tensors()
    said = said.replace("NAME", name).replace("SHAPE", str(tuple(tensors[f"exp_avg.{name}"].shape)))
    change(name, tensors)
    save_file(tensors, saved.folder / "trainer.safetensors")
    before = contents(out)
    with pytest.raises(ValueError) as error:
        sft(sft_config(demo, out, run=RunSettings(out=out, steps=4)), lambda _: None)
    assert str(error.value) == f"checkpoint: {saved.folder}: optimizer: {said}" and contents(out) == before


@pytest.mark.parametrize("kind", START)
def test_what_a_newer_version_keeps_beside_it_is_passed_over(kind, runs, demo, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / kind, out)
    path = checkpoint.latest(out / "checkpoints").state_file
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    config = {"sft": sft_config, "train": train_config}[kind](demo, out, run=RunSettings(out=out, steps=3))
    START[kind](config, lambda _: None)
    assert checkpoint.latest(out / "checkpoints").step == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.yaml", "model: x", r"config\.yaml: model must be a mapping, got 'x'$"),
        ("config.yaml", "run: 3", r"config\.yaml: run must be a mapping, got 3$"),
        ("config.yaml", 9999 * "[", r"config\.yaml must be YAML, got maximum recursion depth exceeded"),
        ("config.yaml", "run: {steps: 2026-13-01}", r"config\.yaml must be YAML, got month must be in 1\.\.12"),
        ("metrics.jsonl", 9999 * "[" + "\n{}", r"metrics\.jsonl, line 1: is not JSON$"),
        ("rollouts/000004.jsonl", '{"answers": "x"}', r"000004\.jsonl, group 1: answers must be objects, got 'x'$"),
        ("rollouts/000004.jsonl", '{}\n{"prompt": [3]}', r"000004\.jsonl, group 2: prompt must be objects, got \[3\]$"),
        ("rollouts/000004.jsonl", 9999 * "[", r"000004\.jsonl must be JSON lines, got maximum recursion depth"),
    ],
)
def test_what_a_report_cannot_read_is_named(name, text, said, rl_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(rl_run, folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        report((folder,))
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("text", ["run: {steps: many}", "run: {seconds: {}, steps: -1}", "model: {path: 3}", "model:"])
def test_settings_of_another_kind_are_none_to_a_report(text, rl_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(rl_run, folder)
    (folder / "config.yaml").write_text(text)
    record = Record.read(folder)
    assert math.isnan(record.progress) and "trained" in headline(record) and record.origin != folder


def test_rows_of_another_kind_are_left_out_of_a_report(rl_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(rl_run, folder)
    good = (folder / "ledger.jsonl").read_text()
    for row in ({"category": None}, {"category": {}}, {}):
        (folder / "ledger.jsonl").write_text(good + json.dumps({"tier": "easy", "pass_rate": 0.5, **row}) + "\n")
        with open(folder / "rollouts" / "000004.jsonl", "a") as file:
            file.write(json.dumps({"task": {"x": 1}, "prompt": None, "answers": None, **row}) + "\n")
        assert report((folder,)).read_text().count("<svg") > 5


def test_what_does_not_fit_the_tasks_is_said_before_a_folder_is_made(demo, tmp_path):
    run = RunSettings(out=tmp_path / "run", eval_every=1)
    config = train_config(demo, run.out, run=run, proxies={"poetry": "ocr"})
    with pytest.raises(ValueError, match="proxies must join a domain of the tasks to one that is held out, got 'poet"):
        train(config)
    assert not (tmp_path / "run").exists()
