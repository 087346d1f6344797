"""What a wave does with its groups: one policy to compare with, alarms that come and go, nothing left to judge."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from small_runs import train_config

from rlcs.alarms import Facts
from rlcs.curriculum import Settings as CurriculumSettings
from rlcs.evaluate import Share, answer, flat, scores_of
from rlcs.loss import LossSettings
from rlcs.progress import Bar
from rlcs.rewards import DOMAINS, Verdict
from rlcs.trainer import FACTOR, Trainer, _samples


def judged(trainer, verdicts, count=4):
    """Groups whose rollouts get these verdicts in turn."""
    tasks = list(trainer.tasks.values())[:count]
    groups = answer(trainer.run_.model, tasks, trainer.run_.prompts, 4, (0,), trainer.config.rollout)
    cycle = [verdicts[i % len(verdicts)] for i in range(4)]
    return [
        dataclasses.replace(
            g, rollouts=tuple(dataclasses.replace(r, verdict=v) for r, v in zip(g.rollouts, cycle, strict=True))
        )
        for g in groups
    ]


HALF = (Verdict("score", 1.0), Verdict("wrong"))


def test_recomputed_ratios_are_to_the_policy_before_the_first_step(demo, tmp_path):
    trainer = Trainer(train_config(demo, tmp_path / "run", recompute=True, updates=4))
    facts = trainer._train(judged(trainer, HALF))
    assert facts["kl_old"] > 1e-6  # the later steps have moved away from it


def test_recomputed_log_probabilities_are_those_of_the_rollouts(demo, tmp_path):
    trainer = Trainer(train_config(demo, tmp_path / "run", tokens=300))
    groups = judged(trainer, HALF)
    prompts = [trainer.run_.prompts(g.task.id, g.task.messages) for g in groups]
    samples = [s for i, g in enumerate(groups) for s in _samples(g, prompts[i], i, True)]
    for sample in trainer.run_.learner.with_old(samples, prompts, 1.0):
        assert abs(sample.old - sample.logprobs)[sample.trained].max() < 1e-4


def test_a_wave_of_verifier_errors_has_no_reward(demo, tmp_path, monkeypatch):
    trainer = Trainer(train_config(demo, tmp_path / "run"))
    groups = judged(trainer, (Verdict("error"),))
    share = Share([g.task for g in groups], 0, {i: g.rollouts for i, g in enumerate(groups)})
    monkeypatch.setattr("rlcs.trainer.answer_share", lambda *_: share)
    with Bar("test") as bar:
        row = trainer.wave(bar)
    assert math.isnan(row["reward"]) and row["valid"] == row["trained_groups"] == 0 and row["verifier_errors"] == 1


def test_a_wave_that_teaches_nothing_says_why_once(demo, tmp_path, monkeypatch):
    """Answers that are cut off, for one, are all wrong: a run would go on with them for days."""
    trainer, notes = Trainer(train_config(demo, tmp_path / "run")), []
    monkeypatch.setattr(Bar, "note", lambda bar, line: notes.append(line))
    cut = [
        dataclasses.replace(g, rollouts=tuple(dataclasses.replace(r, finish_reason="length") for r in g.rollouts))
        for g in judged(trainer, (Verdict("format"), Verdict("format"), Verdict("format"), Verdict("error")))
    ]
    for groups in (cut, cut, judged(trainer, HALF), judged(trainer, (Verdict("score", 1.0),))):
        share = Share([g.task for g in groups], 0, {i: g.rollouts for i, g in enumerate(groups)})
        monkeypatch.setattr("rlcs.trainer.answer_share", lambda *_, share=share: share)
        with Bar("test") as bar:
            trainer.wave(bar)
    first, second = (note for note in notes if "nothing is learned" in note)
    causes = "100% of answers unfinished (--rollout.max-new-tokens), 75% of a bad format, 25% not judged"
    assert first == f"wave 1: nothing is learned, no group is valid: reward 0.000, {causes}"
    assert second.startswith("wave 4: nothing is learned, no group is valid: reward 1.000")


def test_held_out_answers_are_judged_by_the_verifier_they_stand_in_for(demo, tmp_path, monkeypatch):
    trainer = Trainer(train_config(demo, tmp_path / "run"))
    groups = [g for g in judged(trainer, HALF, 12) if g.task.domain == "counting"]
    lax = iter([1.0, 1.0, 1.0, None] * len(groups) * 2)
    verdict = {1.0: Verdict("score", 1.0), None: Verdict("error")}
    monkeypatch.setitem(DOMAINS, "lax", lambda *_: verdict[next(lax)])
    monkeypatch.setattr("rlcs.evaluate.verify", lambda domain, *_: DOMAINS[domain](*_))
    proxies = {"lax": "counting", "counting": "counting", "math": "ocr"}
    sampled = scores_of(groups, "sampled", proxies)
    # Lax beyond strict: 0, 1, 0, not known.
    assert [dict(score.lenience) for score in sampled] == [{"lax": (pytest.approx(1 / 3), 0.0)}, {}]
    assert flat(sampled)["sampled/counting/lenience/lax"] == pytest.approx(1 / 3)
    assert not any(score.lenience for score in scores_of(groups, "greedy"))
    monkeypatch.setitem(DOMAINS, "lax", lambda *_: Verdict("error"))
    assert all(map(math.isnan, scores_of(groups, "sampled", proxies)[0].lenience["lax"]))


def test_a_held_out_score_of_one_task_or_of_none_raises_no_alarm(demo, tmp_path, monkeypatch):
    """A judge's outage is no score, and what one task shows may be luck."""
    trainer = Trainer(train_config(demo, tmp_path / "run"))
    groups = [judged(trainer, verdicts) for verdicts in (HALF, (Verdict("wrong"),), (Verdict("error"),))]
    name, said = groups[0][0].task.domain, []
    for each in groups:
        scores = scores_of(each[:1], "sampled")
        monkeypatch.setattr(trainer.run_, "evaluate", lambda *_, scores=scores: scores)
        trainer._evaluate(None)
        said.append(trainer.proxies[name])
        assert not [alarm for alarm in trainer._watch(groups[0]) if alarm.signal == "forgetting"]
    assert said == [(0.5, 0.5), (0.0, 0.5), (0.0, 0.5)]


def test_a_domain_recovers_when_its_alarm_ends_and_an_empty_draw_is_an_error(demo, tmp_path):
    trainer = Trainer(train_config(demo, tmp_path / "run"))
    domains = dict.fromkeys(task.domain for task in trainer.tasks.values())
    bad = {name: Facts([("", 0.5)], 9, 9, ["a"], ["b"]) for name in domains}
    for _ in range(4):
        trainer.alarms.observe(bad)
    with Bar("test") as bar:
        groups = judged(trainer, HALF)
        trainer._watch(groups)
        factors = trainer.curriculum.state_dict()["factors"]
        assert all(factors[g.task.domain] == 1.0 for g in groups)
        away = set(domains) - {g.task.domain for g in groups}
        assert away and all(factors[name] == FACTOR["down-weight"] for name in away)
        for name in domains:
            trainer.curriculum.scale(name, 0.0)
        with pytest.raises(ValueError, match="a domain must be left to draw from, got all in quarantine"):
            trainer._collect(bar)


@pytest.mark.parametrize("acts", [True, False])
def test_a_run_whose_domains_are_all_in_quarantine_goes_on_where_alarms_only_warn(acts, demo, tmp_path):
    config = train_config(demo, tmp_path / "run")
    trainer = Trainer(config)
    domains = dict.fromkeys(task.domain for task in trainer.tasks.values())
    for _ in range(2 * config.alarms.patience + 1):
        trainer.alarms.observe({name: Facts([("", 0.5)], 9, 9, ["a"], ["b"]) for name in domains})
    trainer._act()
    assert trainer.curriculum.draw(4) == []
    trainer._save()
    trainer = Trainer(dataclasses.replace(config, act_on_alarms=acts))
    assert bool(trainer.curriculum.draw(4)) is not acts


def test_another_reference_is_none_to_go_on_with(demo, tmp_path):
    config = train_config(demo, tmp_path / "run", loss=LossSettings(kl=0.1))
    Trainer(config)._save()
    moved = dataclasses.replace(config.model, path=shutil.copytree(demo / "model", tmp_path / "moved"))
    with pytest.raises(ValueError, match=r"model\.path must be as in .*step-000000 .* to go on from it, got .*moved"):
        Trainer(dataclasses.replace(config, model=moved))
    Trainer(dataclasses.replace(config, model=moved, loss=LossSettings()))


def test_weights_that_leave_no_task_to_draw_are_named(demo, tmp_path):
    curriculum = CurriculumSettings(group_size=4, tier_weights=(0, 0, 0, 0, 1))
    trainer = Trainer(train_config(demo, tmp_path / "run", curriculum=curriculum))
    said = r"curriculum: tier_weights must be above 0 for a tier that tasks are in \(very easy, easy\), got \(0, 0"
    with pytest.raises(ValueError, match=said):
        trainer._drawn()


def test_refill_switches_expansion_off(demo, tmp_path):
    trainer = Trainer(train_config(demo, tmp_path / "run", refill=True))
    assert trainer.config.curriculum.expansion == "expected"
    for _ in range(3):
        ids = trainer.curriculum.draw(4)
        assert len(ids) == 4
        for name in ids:  # nothing is valid: expansion would draw more
            trainer.curriculum.observe(name, [0.0] * 4)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_two_random_streams_are_one(seed, demo, tmp_path, monkeypatch):
    """numpy takes a seed of fewer words for the same with zeros behind it."""
    seen, make = [], np.random.default_rng

    def watched(words):
        seen.append(tuple(np.random.SeedSequence(words).generate_state(4).tolist()))
        return make(words)

    monkeypatch.setattr(np.random, "default_rng", watched)
    config = train_config(demo, tmp_path / "run", refill=True)
    held_out = dataclasses.replace(config.eval, tasks=demo / "test.jsonl", greedy=False, samples=2)
    config = dataclasses.replace(config, eval=held_out, run=dataclasses.replace(config.run, seed=seed, steps=3))
    trainer = Trainer(config)
    with Bar("test") as bar:
        trainer.run_.evaluate(bar)
        for _ in range(3):
            trainer.wave(bar)
    assert len(seen) > 24 + 3 * 16 and len(set(seen)) == len(seen)


def test_held_out_tasks_may_have_the_ids_of_others(demo, tmp_path):
    lines = (demo / "test.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in (demo / "train.jsonl").read_text().splitlines()]
    rows = [json.loads(line) | {"id": name} for line, name in zip(lines, ids, strict=False)]
    for row in rows:
        for part in row["messages"][0]["content"]:
            for kind in ("image", "video"):
                if kind in part:
                    places = part[kind] if isinstance(part[kind], list) else [part[kind]]
                    places = [str(demo / place) for place in places]
                    part[kind] = places if isinstance(part[kind], list) else places[0]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = train_config(demo, tmp_path / "run")
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tasks=tmp_path / "test.jsonl"))
    trainer = Trainer(config)
    run, task = trainer.run_, trainer.run_.eval_tasks[0]
    trained = run.prompts(task.id, trainer.tasks[task.id].messages)
    with Bar("test") as bar:
        run.evaluate(bar)
    held_out = run.eval_prompts(task.id, task.messages)
    assert trained.pixel_values.shape != held_out.pixel_values.shape or not torch.equal(
        trained.pixel_values, held_out.pixel_values
    )
