"""Training end to end on a tiny model: what is learned from, packing, files, and a crash at any moment."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small_runs import lessons, sft_config, train_config, weights

from glm4v import Glm4v, Processor
from rlcs import checkpoint
from rlcs.config import EvalSettings, ModelSettings, RunSettings, plain
from rlcs.curriculum import Settings as CurriculumSettings
from rlcs.data import conversation_of
from rlcs.evaluate import answer
from rlcs.learner import Learner, sft_loss
from rlcs.logs import read_metrics
from rlcs.loss import LossSettings, policy_loss
from rlcs.optimizer import Optimizer, OptimizerSettings
from rlcs.prompts import Prompts
from rlcs.run import load_model
from rlcs.supervised import Samples, lessons_of, sft
from rlcs.trainer import Trainer, train
from rlcs.types import Sample

pytestmark = pytest.mark.long


def comparable(folder):
    """Metrics without times."""
    rows = []
    for row in read_metrics(folder):
        rows.append({k: v for k, v in row.items() if "seconds" not in k and "per_s" not in k})
    return rows


# --- a crash and what follows ---


def start(command, config, tmp_path):
    """A run in a process of its own."""
    file = tmp_path / f"{config.run.out.name}.yaml"
    file.write_text(json.dumps(plain(config)))  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlcs.cli", command, "--config", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("command", ["sft", "train"])
def test_killed_and_taken_up_it_makes_the_same_steps(command, demo, tmp_path):
    make = {"sft": sft_config, "train": train_config}[command]
    done = start(command, make(demo, tmp_path / "whole"), tmp_path)
    assert done.wait() == 0, done.stderr.read().decode()
    cut = make(demo, tmp_path / "cut")
    process = start(command, cut, tmp_path)
    while process.poll() is None and len(checkpoint.every(cut.run.out / "checkpoints")) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = checkpoint.every(cut.run.out / "checkpoints")
    for later in kept[2:]:  # it was quicker than the signal
        for file in later.folder.iterdir():
            file.unlink()
        later.folder.rmdir()
    assert len(kept) >= 2
    again = start(command, cut, tmp_path)
    assert again.wait() == 0, again.stderr.read().decode()
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path):
    def broken(folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError("no space left")

    checkpoint.save(tmp_path, 1, lambda _: None, {"a": torch.ones(2)}, {"x": 1}, keep=2)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, 2, broken, {}, {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    (tmp_path / "step-000003.part").mkdir()  # of a process that was killed
    saved = checkpoint.latest(tmp_path)
    assert saved.step == 1 and saved.state() == {"x": 1} and saved.tensors()["a"].tolist() == [1, 1]
    assert not (tmp_path / "step-000003.part").exists()
    for step in (4, 5, 5):
        checkpoint.save(tmp_path, step, lambda _: None, {}, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_a_run_without_resume_does_not_write_over_another(demo, tmp_path):
    config = sft_config(demo, tmp_path / "run")
    sft(config)
    with pytest.raises(ValueError, match=r"must be empty without --run\.resume"):
        sft(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False)))


# --- the step ---


def gradients(demo, samples, prompts, loss, tokens, **settings):
    """What a step would move by, without moving."""
    model = load_model(ModelSettings(path=demo / "model", **settings))
    learner = Learner(model, Optimizer(model, OptimizerSettings(lr=1e-3)), tokens)
    kept = {}

    def step(rate):
        kept.update({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
        return 0.0

    learner.optimizer.step = step
    facts = learner.update(samples, prompts, loss, 1e-3)
    return kept, facts


@pytest.mark.parametrize("kind", ["sft", "policy"])
def test_packed_or_one_by_one_the_gradients_are_equal(kind, demo):
    samples, prompts = lessons(demo)
    samples = [dataclasses.replace(s, advantage=(-1.0) ** i) for i, s in enumerate(samples)]
    # Answers of one prompt, of several lengths and one empty, share it; in one micro-step or in several.
    for place, ends in ((0, (-2, -5)), (5, (-1, -3, -4))):
        whole = samples[place]
        for end in (*ends, len(prompts[place])):
            cut = {name: getattr(whole, name)[:end] for name in ("token_ids", "trained", "logprobs")}
            samples.append(dataclasses.replace(whole, **cut, advantage=-0.5))

    def on_policy(micro):
        value, facts = policy_loss(
            micro.new,
            micro.new.detach(),
            torch.from_numpy(micro.batch.advantages),
            micro.trained,
            torch.from_numpy(micro.batch.cu_seqlens),
            LossSettings(),
        )
        return value * micro.batch.weight, facts

    loss = sft_loss if kind == "sft" else on_policy
    packed, facts = gradients(demo, samples, prompts, loss, 1 << 20)
    assert facts["micro_steps"] == 1
    assert facts["tokens"] == sum(map(len, samples)) - 3 * len(prompts[0]) - 4 * len(prompts[5])
    alone, facts = gradients(demo, samples, prompts, loss, max(map(len, samples)))
    assert facts["micro_steps"] > 5
    unshared = [dataclasses.replace(sample, source=i) for i, sample in enumerate(samples)]
    apart, facts = gradients(demo, unshared, [prompts[s.source] for s in samples], loss, 1 << 20)
    assert facts["tokens"] == sum(map(len, samples))
    recomputed, _ = gradients(demo, samples, prompts, loss, 1 << 20, activation_checkpointing=True)
    scale = max(float(g.abs().max()) for g in packed.values())
    assert packed.keys() == alone.keys() == apart.keys() == recomputed.keys()
    for name, expected in packed.items():
        assert torch.allclose(alone[name], expected, rtol=0, atol=1e-5 * scale), name
        assert torch.allclose(apart[name], expected, rtol=0, atol=1e-5 * scale), name
        assert torch.allclose(recomputed[name], expected, rtol=0, atol=1e-6 * scale), name


def test_the_loss_is_the_plain_one(demo):
    samples, prompts = lessons(demo)
    _, facts = gradients(demo, samples, prompts, sft_loss, 1 << 20)
    model = Glm4v.from_pretrained(demo / "model")
    total, count = 0.0, 0
    for sample, prompt in zip(samples, prompts, strict=True):
        length = len(sample)
        answer_positions = torch.arange(prompt.next_position, prompt.next_position + length - len(prompt))
        logits = model(
            input_ids=torch.from_numpy(sample.token_ids),
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            position_ids=torch.cat([prompt.position_ids, answer_positions.expand(3, -1)], dim=1),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            pixel_values_videos=prompt.pixel_values_videos,
            video_grid_thw=prompt.video_grid_thw,
        ).log_softmax(-1)
        at = np.flatnonzero(sample.trained)
        total -= float(logits[at - 1, sample.token_ids[at]].sum().detach())
        count += len(at)
    assert facts["loss"] == pytest.approx(total / count, rel=1e-5)
    assert facts["trained_tokens"] == count


@pytest.mark.parametrize("part", ["vision", "merger", "language"])
def test_frozen_parts_stay(part, demo):
    samples, prompts = lessons(demo)
    found, _ = gradients(demo, samples, prompts, sft_loss, 1 << 20, freeze=(part,))
    names = {"vision": "model.visual.blocks", "merger": "model.visual.merger", "language": "model.language_model"}
    assert not any(name.startswith(names[part]) for name in found)
    assert all(any(name.startswith(other) for name in found) for key, other in names.items() if key != part)


def test_learning_rates():
    tail = OptimizerSettings(lr=1.0, warmup=0.1, decay="tail", tail=0.5, final=0.0)
    assert [round(tail.rate(p), 3) for p in (0, 0.05, 0.1, 0.5, 0.75, 1)] == [0.1, 0.55, 1, 1, 0.5, 0]
    cosine = OptimizerSettings(lr=1.0, warmup=0.0, final=0.1)
    assert [round(cosine.rate(p), 3) for p in (0, 0.5, 1)] == [1, 0.55, 0.1]
    with pytest.raises(ValueError, match="optimizer: lr must be from 0 to 1, got 2"):
        OptimizerSettings(lr=2)


# --- SFT ---


def test_sft_learns_and_transformers_reads_the_checkpoint(demo, tmp_path):
    run = RunSettings(out=tmp_path / "run", steps=60, save_every=0)
    config = sft_config(demo, tmp_path / "run", run=run, batch=16, eval=EvalSettings(demo / "test.jsonl"))
    scores = sft(config)
    losses = [row["loss"] for row in read_metrics(run.out) if row["kind"] == "sft"]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    assert {score.mode for score in scores} == {"sampled", "greedy"} and scores[-1].tasks == 12
    from transformers import Glm4vForConditionalGeneration

    folder = checkpoint.latest(run.out / "checkpoints").folder
    theirs, ours = Glm4vForConditionalGeneration.from_pretrained(folder), Glm4v.from_pretrained(folder)
    ids = torch.arange(20)
    mine = ours(ids, torch.tensor([0, 20], dtype=torch.int32), ids.expand(3, -1))
    assert torch.allclose(mine, theirs(input_ids=ids[None]).logits[0], atol=1e-4)


def test_thinking_and_turns_that_are_learned(demo):
    processor = Processor.from_pretrained(demo / "model")
    stop = [processor.codec.id(token) for token in ("</answer>", "<|user|>")]
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>why</think><answer>1</answer>"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]

    def learned(lesson, thinking=True):
        make = Samples(processor, thinking, stop)
        prompt = Prompts(processor)(lesson.id, lesson.messages)
        sample = make(lesson, prompt, 0)
        ids = sample.token_ids
        return processor.decode(ids[sample.trained], False), processor.decode(ids[~sample.trained], False)

    first, second = lessons_of(messages, "all", "line 1")
    assert lessons_of(messages, "last", "line 1") == [second]
    assert learned(first)[0] == "<think>why</think><answer>1</answer>"
    said, given = learned(first, thinking=False)
    assert said == "<answer>1</answer>" and given.endswith("<think>why</think>")
    said, given = learned(second)
    assert said == "2<|user|>" and "why" not in given and "1" in given  # earlier thinking is gone, as at inference
    with pytest.raises(ValueError, match="must hold an assistant's turn after a user's"):
        lessons_of(messages[:1], "all", "line 1")


def test_documents_teach_every_token_but_pictures(demo, tmp_path):
    picture = next((demo / "train").glob("*.png"))
    row = {"text": "before <image> after", "images": [str(picture)]}
    (tmp_path / "documents.jsonl").write_text(json.dumps(row) + "\n")
    samples, _ = lessons(demo, data=tmp_path / "documents.jsonl", all_tokens=True)
    processor = Processor.from_pretrained(demo / "model")
    assert processor.decode(samples[0].token_ids[samples[0].trained], False) == "<sop>before  after<|endoftext|>"
    config = sft_config(demo, tmp_path / "run", data=tmp_path / "documents.jsonl", all_tokens=True)
    sft(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2)))
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


BAD = [
    ("{", "is not JSON|Expecting"),
    ('{"messages": 3}', "messages must be a list of objects"),
    (
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]}',
        "must be without tools and tool_calls",
    ),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{}]}',
        "must be without tools and tool_calls",
    ),
    ('{"messages": [{"role": "user", "content": "a"}]}', "must hold an assistant's turn"),
    ('{"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}]}', "got fewer"),
    (
        '{"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}], '
        '"images": ["none.png"]}',
        "none.png",
    ),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "' + "1 " * 1100 + '"}]}',
        "at most the 2048 tokens of the model's context, got 2",
    ),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_bad_rows_are_named_or_left_out(row, said, demo, tmp_path):
    good = (demo / "train-answers.jsonl").read_text().splitlines()[0].replace("train/", f"{demo}/train/")
    (tmp_path / "data.jsonl").write_text(f"{good}\n{row}\n")
    config = sft_config(demo, tmp_path / "run", data=tmp_path / "data.jsonl", batch=2)
    with pytest.raises(ValueError, match=rf"data: .*data.jsonl, line 2: .*({said})"):
        sft(config)
    assert not config.run.out.exists()  # before anything is computed
    notes = []
    changed = dataclasses.replace(config, bad_rows="skip", run=dataclasses.replace(config.run, out=tmp_path / "skip"))
    sft(changed, notes.append)
    assert read_metrics(tmp_path / "skip")[-1]["step"] == 4
    assert sum("data.jsonl, line 2: " in note for note in notes) == 1


def test_what_is_too_long_is_met_before_the_run_or_on_the_way(demo, tmp_path, capsys):
    """Of prompt and answer, as a micro-step has room; where no row has a place, that is said."""
    lines = [json.loads(line) for line in (demo / "train-answers.jsonl").read_text().splitlines()[:4]]
    for row, count in zip(lines, (1, 400, 1, 1), strict=True):
        row["messages"][-1]["content"] += " 1" * count
    text = "".join(json.dumps(row) + "\n" for row in lines).replace("train/", f"{demo}/train/")
    (tmp_path / "data.jsonl").write_text(text)
    config = sft_config(demo, tmp_path / "run", data=tmp_path / "data.jsonl", batch=2, tokens=512)
    said = r"data: .*data.jsonl, line 2: prompt and answer must be at most the 512 tokens of a micro-step, got \d+$"
    with pytest.raises(ValueError, match=said):
        sft(config)
    assert not config.run.out.exists()
    for buffer in (None, 4):
        run = dataclasses.replace(config.run, out=tmp_path / f"run-{buffer}")
        notes = []
        sft(dataclasses.replace(config, run=run, bad_rows="skip", buffer=buffer), notes.append)
        found = notes if buffer is None else capsys.readouterr().err.splitlines()
        assert [bool(re.match(said, line)) for line in found if line.startswith("data: ")] == [True]
    with pytest.raises(ValueError, match="must hold a good row, got none"):
        sft(dataclasses.replace(config, bad_rows="skip", tokens=8), notes.append)
    assert not config.run.out.exists()


# --- RL ---


def test_a_wave_counts_what_it_does(demo, tmp_path):
    train(train_config(demo, tmp_path / "run", eval=EvalSettings(demo / "test.jsonl", samples=1, greedy=False)))
    rows = read_metrics(tmp_path / "run")
    waves = [row for row in rows if row["kind"] == "wave"]
    assert [row["step"] for row in waves] == [1, 2, 3, 4]
    assert [row["total/waves"] for row in waves] == [1, 2, 3, 4]
    assert all(row["prompts"] >= row["trained_groups"] for row in waves)
    last = waves[-1]
    assert last["total/rollouts"] == 4 * sum(row["prompts"] for row in waves)
    assert last["total/optimizer_steps"] == sum(2 for row in waves if row["trained_groups"])
    trained = [row for row in waves if row["trained_groups"] and not row["trained_carried"]]
    assert all(row["mismatch_first"] < 1e-4 for row in trained)  # the same weights have said it
    assert rows[-1]["kind"] == "eval" and "sampled/all" in rows[-1]
    assert (tmp_path / "run" / "ledger.jsonl").exists() and (tmp_path / "run" / "rollouts" / "000004.jsonl").exists()


def test_surplus_is_carried_one_wave(demo, tmp_path):
    trainer = Trainer(train_config(demo, tmp_path / "run", groups=1))
    prompts, tasks = trainer.run_.prompts, list(trainer.tasks.values())[:6]
    groups = answer(trainer.run_.model, tasks, prompts, 4, (0,), trainer.config.rollout)
    verdicts = [dataclasses.replace(r.verdict, outcome="score", score=1.0) for r in groups[0].rollouts[:2]]

    def valid(group, wave):
        rollouts = [dataclasses.replace(r, verdict=v) for r, v in zip(group.rollouts[:2], verdicts, strict=True)]
        rest = [dataclasses.replace(r, verdict=dataclasses.replace(r.verdict, outcome="wrong", score=0.0))
                for r in group.rollouts[2:]]  # fmt: skip
        return dataclasses.replace(group, rollouts=(*rollouts, *rest), wave=wave)

    collected = [valid(group, 0) for group in groups]
    from rlcs.progress import Bar

    trainer._collect = lambda bar: (collected, 1)
    with Bar("test") as bar:
        trainer.wave(bar)
        assert len(trainer.carried) == 5
        kept = trainer.carried
        trainer._collect = lambda bar: (collected[:1], 1)
        trainer.wave(bar)
    assert not {id(group) for group in trainer.carried} & {id(group) for group in kept}


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": True},
        {"loss": LossSettings(kl=0.1, mean="token")},
        {"refill": True, "curriculum": CurriculumSettings(group_size=2, expansion="off", weighting=False)},
        {"surplus": "record", "normalise": False, "updates": 1},
    ],
)
def test_other_ways_run(changes, demo, tmp_path):
    config = train_config(demo, tmp_path / "run", **changes)
    train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2)))
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "wave"]
    assert len(rows) == 2
    if changes.get("refill"):
        assert rows[-1]["total/waves"] > 2


def test_the_alarms_see_the_proxy_of_a_domain(demo, tmp_path, monkeypatch):
    eval = EvalSettings(demo / "test.jsonl", samples=1, greedy=False)
    run = RunSettings(out=tmp_path / "run", eval_every=1)
    trainer = Trainer(train_config(demo, run.out, run=run, eval=eval, proxies={"math": "ocr"}))
    trainer.proxies = {"ocr": (0.25, 0.1), "math": (0.5, 0.2), "counting": (0.75, 0.3)}
    trainer.lenience = {"math": (0.125, 0.05)}
    tasks = [next(t for t in trainer.tasks.values() if t.domain == domain) for domain in ("math", "counting")]
    groups = answer(trainer.run_.model, tasks, trainer.run_.prompts, 4, (0,), trainer.config.rollout)
    seen = {}
    monkeypatch.setattr(trainer.alarms, "observe", lambda facts: seen.update(facts) or [])
    trainer._watch(groups)
    found = {d: (f.proxy, f.proxy_error, f.lenience, f.lenience_error) for d, f in seen.items()}
    assert found == {"math": (0.25, 0.1, 0.125, 0.05), "counting": (0.75, 0.3, None, 0.0)}


@pytest.mark.parametrize("proxies", [{"maths": "ocr"}, {"ocr": "maths"}])
def test_a_proxy_joins_domains_that_are_there(proxies, demo, tmp_path):
    eval, run = EvalSettings(demo / "test.jsonl"), RunSettings(out=tmp_path / "run", eval_every=1)
    with pytest.raises(ValueError, match=r"train: proxies must join .* held out, got 'maths'"):
        Trainer(train_config(demo, run.out, run=run, eval=eval, proxies=proxies))


def test_samples_of_one_prompt_share_its_pictures(demo, monkeypatch):
    samples, prompts = lessons(demo)
    twice = [samples[0], dataclasses.replace(samples[0], advantage=-1.0), samples[1]]
    model = load_model(ModelSettings(path=demo / "model"))
    seen = []
    monkeypatch.setattr(model.visual, "forward", lambda x, grid: seen.append(len(x)) or torch.zeros(len(x) // 4, 96))
    Learner(model, Optimizer(model, OptimizerSettings()), 1 << 20).update(twice, prompts, sft_loss, 0.0)
    pictures = [p.pixel_values for p in prompts[:2] if p.pixel_values is not None]
    assert seen == [sum(map(len, pictures))]


def test_the_first_token_of_a_sample_is_not_trained():
    with pytest.raises(ValueError, match="the first token"):
        Sample(np.arange(2), np.ones(2, bool), np.zeros(2, np.float32))


def test_a_mark_in_an_answer_is_text(demo, tmp_path):
    row = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "<image>"}]}
    assert conversation_of(row, tmp_path)[1]["content"] == "<image>"


def test_answers_that_may_not_fit_a_micro_step_are_refused(demo, tmp_path):
    with pytest.raises(ValueError, match=r"data: task .*: prompt and answer must fit the 16 tokens of a micro-step"):
        Trainer(train_config(demo, tmp_path / "run", tokens=16))
