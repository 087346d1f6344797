"""What goes wrong in the middle of a run: a gradient, memory, a verifier, a picture."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from small_runs import sft_config, train_config, with_damaged_pictures

from rlcs import checkpoint, evaluate, learner, rewards
from rlcs.curriculum import Curriculum
from rlcs.failures import told
from rlcs.learner import Learner
from rlcs.logs import read_metrics
from rlcs.rewards import Verdict
from rlcs.rollout import NotFinite
from rlcs.supervised import sft
from rlcs.trainer import train

pytestmark = pytest.mark.long


def with_run(config, **changes):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))


@pytest.fixture
def rewarded(monkeypatch):
    """Every other answer is right: a model that knows nothing has groups to learn from."""
    monkeypatch.setattr(evaluate, "verify", lambda domain, text, *_: Verdict("score", float(len(text) % 2)))


# --- gradients ---


def nan_at(monkeypatch, steps):
    """Losses of these steps, counted from 1, are NaN."""
    update, done = Learner.update, []

    def update_nan(self, samples, prompts, loss, *rest):
        done.append(1)

        def nan(micro):
            value, facts = loss(micro)
            return value * torch.nan, facts

        return update(self, samples, prompts, nan if len(done) in steps else loss, *rest)

    monkeypatch.setattr(Learner, "update", update_nan)
    return done


def test_a_step_without_a_finite_gradient_moves_nothing_and_is_told(demo, tmp_path, monkeypatch):
    nan_at(monkeypatch, {2, 3})
    notes = []
    sft(dataclasses.replace(sft_config(demo, tmp_path / "run"), max_skipped=3), notes.append)
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0]
    assert [note for note in notes if "not finite" in note] == [
        f"step {i + 2}: the gradient is not finite, so nothing moves ({i + 1} in a row)" for i in range(2)
    ]
    weights = [
        load_file(saved.folder / "model.safetensors") for saved in checkpoint.every(tmp_path / "run/checkpoints")
    ]
    assert all(torch.equal(weights[0][name], x) and torch.equal(weights[0][name], weights[2][name])
               for name, x in weights[1].items())  # fmt: skip
    assert any(not torch.equal(weights[2][name], x) for name, x in weights[3].items())


@pytest.mark.parametrize("command", ["sft", "train"])
def test_so_many_in_a_row_end_the_run(command, demo, tmp_path, monkeypatch, rewarded):
    config = {"sft": sft_config, "train": train_config}[command](demo, tmp_path / "run")
    config = with_run(dataclasses.replace(config, max_skipped=3), steps=40, save_every=0)
    done = nan_at(monkeypatch, {2, 3, 5, 6, 7})
    with pytest.raises(NotFinite, match="gradients must be finite, got 3 steps without") as error:
        {"sft": sft, "train": train}[command](config, lambda _: None)
    assert len(done) == 7 and "lower --optimizer.lr" in told(command, error.value)


# --- memory ---


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_a_micro_step_without_memory_says_what_it_held(error, demo, tmp_path, monkeypatch):
    real, calls = learner.target_logprobs, []

    def broken(model, batch, prompts, *rest):
        calls.append((batch, prompts))
        if len(calls) > 2:
            raise error
        return real(model, batch, prompts, *rest)

    monkeypatch.setattr(learner, "target_logprobs", broken)
    with pytest.raises(MemoryError) as found:
        sft(sft_config(demo, tmp_path / "run", tokens=512))
    batch, prompts = calls[-1]
    said = told("sft", found.value)
    patches = sum(prompts[i].patches for i in set(batch.sources.tolist()))
    assert (
        f"its micro-step held {len(batch.input_ids)} tokens (--tokens allows 512) in {len(batch.sources)} samp" in said
    )
    assert f"pictures of {patches} patches; lower --tokens (of a micro-step)" in said and "\n" not in said


def test_other_errors_of_a_micro_step_stay_as_they_are(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "target_logprobs", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size") as error:
        sft(sft_config(demo, tmp_path / "run"))
    assert not isinstance(error.value, MemoryError)


# --- verifiers and pictures ---


def test_training_goes_on_beside_a_verifier_that_hangs(demo, tmp_path, monkeypatch):
    (tmp_path / "hanging_verifier.py").write_text(
        "import time\n"
        "def verify(answer, truth, question):\n"
        "    if truth == 'hang': time.sleep(1000)\n"
        "    return float(len(answer) % 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards.worker._forget()  # workers of before don't know the new path
    domain = "hanging_verifier:verify"
    monkeypatch.setattr(rewards.Remote, "__call__", _short(rewards.Remote.__call__))
    lines = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()[:6]]
    os.symlink(demo / "train", tmp_path / "train")
    rows = [{**row, "domain": domain, "truth": "hang" if i == 0 else "x"} for i, row in enumerate(lines)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = train_config(demo, tmp_path / "run", tasks=tmp_path / "tasks.jsonl", act_on_alarms=False)
    monkeypatch.setattr(rewards, "boxed_answer", lambda response: response)  # a model that knows nothing has no form
    train(with_run(config, steps=3))
    waves = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "wave"]
    assert len(waves) == 3 and any(row["verifier_errors"] > 0 for row in waves)


def _short(call):
    def with_deadline(self, *arguments):
        self.deadline_s = 0.3
        return call(self, *arguments)

    return with_deadline


@pytest.mark.parametrize("rule", ["skip", "fatal"])
def test_a_task_whose_picture_is_damaged_is_left_out_when_it_is_drawn(rule, demo, tmp_path, monkeypatch):
    tasks = with_damaged_pictures(demo, tmp_path)
    config = with_run(train_config(demo, tmp_path / "run", tasks=tasks, bad_rows=rule), steps=6)
    notes = []
    if rule == "fatal":
        with pytest.raises(ValueError, match=r"data: task '.*': image: .*\.png"):
            train(config)
        return
    drawn, draw = [], Curriculum.draw
    monkeypatch.setattr(Curriculum, "draw", lambda self, n: drawn.append(draw(self, n)) or drawn[-1])
    train(config, notes.append)
    damaged = {note.split("'")[1] for note in notes if note.startswith("data: task '")}
    assert all(sum(name in ids for ids in drawn) == 1 for name in damaged)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "wave"]
    assert len(rows) == 6 and any(note.startswith("data: task '") and ".png" in note for note in notes)
    assert len(notes) == len(set(notes))
    with pytest.raises(ValueError, match="bad rows must be at most 0"):
        train(with_run(dataclasses.replace(config, max_bad_rows=0), out=tmp_path / "none"), notes.append)


@pytest.mark.parametrize("changes", [{}, {"overlap": 1}], ids=["in turn", "ahead"])
def test_workers_change_nothing(changes, demo, tmp_path, rewarded):
    """Waves, weights and what is told, to the bit, with damaged pictures among those that workers decode."""
    tasks, told_of = with_damaged_pictures(demo, tmp_path), {}
    for workers in (0, 2):
        out = tmp_path / f"{workers}"
        config = train_config(demo, out, tasks=tasks, bad_rows="skip", workers=workers, ahead=1, **changes)
        train(with_run(config, steps=2), (notes := []).append)
        told_of[workers] = [note for note in notes if note.startswith("data: ")]
    assert told_of[0] == told_of[2] and told_of[0]
    for path in sorted((tmp_path / "0/rollouts").glob("*.jsonl")):
        assert path.read_text() == (tmp_path / "2/rollouts" / path.name).read_text()
    saved = [checkpoint.latest(tmp_path / name / "checkpoints") for name in ("0", "2")]
    weights = [load_file(one.folder / "model.safetensors") | one.tensors() for one in saved]
    assert weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[1][name], x) for name, x in weights[0].items()
    )
