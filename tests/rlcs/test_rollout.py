"""Rollouts against `Glm4v.generate` and the model's forward, on a tiny model with images, videos and texts."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images

from examples.make_checkpoint import make_checkpoint
from glm4v import Glm4v, InputError
from glm4v.generate import ThinkingBudget
from rlcs.budgets import Budgets
from rlcs.prompts import Prompts, packed
from rlcs.rollout import RolloutSettings, rollouts
from rlcs.tasks import make_tasks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32, vocab=300)


@pytest.fixture
def model(checkpoint):
    return Glm4v.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def messages():
    """Six prompts: digits to read, a film, a photograph, two pictures in one prompt, short and longer text."""
    tasks = {task.domain: task for task, _ in make_tasks(12, seed=3)}
    photo, other = (x[:96, :64] for x in load_sample_images().images)
    pictures = [{"type": "image", "image": one} for one in (photo, other)]
    return [
        tasks["ocr"].messages,
        tasks["video"].messages,
        [{"role": "user", "content": [pictures[0], {"type": "text", "text": "What is it?"}]}],
        [{"role": "user", "content": [*pictures, {"type": "text", "text": "Compare."}]}],
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "How many words are in this question, and which of them is the longest?"}],
    ]


@pytest.fixture
def prompts(model, messages):
    make = Prompts(model.processor)
    return [make(str(i), one) for i, one in enumerate(messages)]


def seeds(prompts):
    return [(11, i) for i in range(len(prompts))]


def answers_of(model, prompts, group=3, **settings):
    run = rollouts(model, prompts, group, seeds(prompts), RolloutSettings(**{"max_new_tokens": 24, **settings}))
    groups = list(run)
    assert Counter(i for i, _ in groups) == Counter(range(len(prompts)))
    assert all(len(group_) == group for _, group_ in groups)
    return dict(groups), run


def generations(model, messages, group, max_new_tokens=24, **options):
    """What `Glm4v.generate` says with the same random streams."""
    every = [one for one in messages for _ in range(group)]
    streams = [(11, i, g) for i in range(len(messages)) for g in range(group)]
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": max_new_tokens, **options}
    return model.generate(every, seed=streams, logprobs=True, **options)


def say(model, monkeypatch, token, times=30.0):
    """Makes the model say a token, whatever comes before."""

    def louder(method):
        def call(*arguments):
            logits = method(*arguments)
            logits[:, token] += times
            return logits

        return torch.inference_mode()(call)

    for name in ("prefill", "decode"):
        monkeypatch.setattr(model, name, louder(getattr(model, name)))


def same(ours, others):
    for one, other in zip(ours, others, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert np.array_equal(one.sampled, other.sampled)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


# What is said


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"thinking_budget": 5},
        {"thinking_budget": 0, "temperature": 0.0},
    ],
)
def test_same_tokens_as_generate(model, prompts, messages, options):
    groups, run = answers_of(model, prompts, group=3, **options)
    expected = generations(model, messages, 3, **options)
    for answer, g in zip([a for i in range(len(prompts)) for a in groups[i]], expected, strict=True):
        assert answer.token_ids.tolist() == g.token_ids
        assert (answer.text, answer.finish_reason) == (g.text, g.finish_reason)
        assert np.flatnonzero(~answer.sampled).tolist() == g.forced
        if options.get("temperature", 1) in (0, 1):  # generate's are of the untempered model
            np.testing.assert_allclose(answer.logprobs[answer.sampled], np.array(g.logprobs)[answer.sampled], atol=1e-5)
    assert run.statistics.tokens == sum(len(g.token_ids) for g in expected)
    assert run.statistics.forced == sum(bool(g.forced) for g in expected)
    assert run.statistics.forced_tokens == sum(len(g.forced) for g in expected)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_whole_forward(model, prompts, temperature):
    groups, _ = answers_of(model, prompts, temperature=temperature, top_p=0.9, thinking_budget=6)
    for i, prompt in enumerate(prompts):
        for answer in groups[i]:
            said = torch.from_numpy(answer.token_ids)
            batch = packed([prompt])
            batch["input_ids"] = torch.cat((batch["input_ids"], said))
            batch["cu_seqlens"] = torch.tensor([0, len(batch["input_ids"])], dtype=torch.int32)
            following = prompt.next_position + torch.arange(len(said)).repeat(3, 1)
            batch["position_ids"] = torch.cat((batch["position_ids"], following), 1)
            with torch.no_grad():
                logits = model(**batch)[len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, said[:, None])[:, 0].numpy()
            np.testing.assert_allclose(answer.logprobs, np.where(answer.sampled, expected, 0), atol=1e-4)
            assert answer.token_ids.dtype == np.int64 and answer.logprobs.dtype == np.float32


@pytest.mark.parametrize("rows", [1, 7, 17])
@pytest.mark.parametrize("options", [{}, {"thinking_budget": 4}, {"random_budgets": (0, 9)}])
def test_neighbours_change_nothing(model, prompts, rows, options):
    together, _ = answers_of(model, prompts, group=5, **options)
    apart, run = answers_of(model, prompts, group=5, rows=rows, **options)
    for i in together:
        same(apart[i], together[i])
    assert run.statistics.answers == 30 and run.statistics.row_steps <= rows * run.statistics.steps
    (alone,) = dict(rollouts(model, prompts[1:2], 2, [(11, 1)], RolloutSettings(24, **options))).values()
    same(alone, together[1][:2])


def test_short_answers_do_not_wait_for_long_ones(model, prompts):
    everyone, _ = answers_of(model, prompts, group=8, max_new_tokens=40)
    lengths = [len(a.token_ids) for group in everyone.values() for a in group]
    _, run = answers_of(model, prompts, group=8, max_new_tokens=40, rows=8)
    assert run.statistics.row_steps == sum(length - 1 for length in lengths)  # no step for who has ended
    assert run.statistics.steps < run.statistics.row_steps / 8 + 40  # full until the last ones run out


def test_a_small_cache_makes_fewer_rows(model, prompts):
    whole, run = answers_of(model, prompts)
    tokens = run._pages.cache.capacity * len(run._pages.cache.k[0])
    small, run = answers_of(model, prompts, cache_tokens=tokens // 3)
    assert run._pages.rows < 18 and run._pages.cache.k[0].shape[0] * 16 <= tokens // 3
    for i in whole:
        same(small[i], whole[i])
    with pytest.raises(ValueError, match=r"rollouts: cache_tokens must be at least \d+, for one answer, got 32"):
        answers_of(model, prompts, cache_tokens=32)


def test_every_page_comes_back(model, prompts):
    for rows in (4, 512):
        _, run = answers_of(model, prompts, rows=rows)
        assert sorted(run._pages._free) == list(range(len(run._pages.cache.k[0])))


def test_seeds_of_any_size(model, prompts):
    expected = model.generate([[{"role": "user", "content": "Hi"}]] * 2, seed=[(2**40, 0, 0), (2**40, 0, 1)],
                              temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8)  # fmt: skip
    ((_, answers),) = rollouts(model, [prompts[4]], 2, [(2**40, 0)], RolloutSettings(8))
    assert [a.token_ids.tolist() for a in answers] == [g.token_ids for g in expected]


# Prompts are read once


def test_prompts_are_read_once(model, prompts, monkeypatch):
    read, seen = [], []
    prefill, visual = model.prefill, model.visual.forward
    monkeypatch.setattr(
        model, "prefill", lambda batch, cache: read.append(len(batch["input_ids"])) or prefill(batch, cache)
    )
    monkeypatch.setattr(
        model.visual, "forward", lambda patches, grid: seen.append(len(patches)) or visual(patches, grid)
    )
    for rows in (512, 4):
        read.clear(), seen.clear()
        _, run = answers_of(model, prompts, group=6, rows=rows)
        assert sum(read) == sum(map(len, prompts)) == run.statistics.prefill_tokens
        assert sum(seen) == sum(prompt.patches for prompt in prompts)
        assert run.statistics.prefills == len(read)
        assert len(read) == 1 or rows == 4


# How answers end


def test_reasons(model, prompts, monkeypatch):
    stop = model.generation_config["eos_token_id"][0]
    silent = SimpleNamespace(**model.generation_config)
    model.generation_config = {"eos_token_id": None}
    groups, _ = answers_of(model, prompts, max_new_tokens=9)
    assert all(len(a.token_ids) == 9 and a.finish_reason == "length" for group in groups.values() for a in group)
    model.generation_config = vars(silent)
    say(model, monkeypatch, stop)
    groups, run = answers_of(model, prompts)
    for a in (a for group in groups.values() for a in group):
        assert (a.token_ids.tolist(), a.text, a.finish_reason) == ([stop], "", "stop")
    assert run.statistics.steps == 0 and run.statistics.tokens == 18
    groups, run = answers_of(model, prompts, thinking_budget=0)
    for a in (a for group in groups.values() for a in group):
        assert (a.text, a.finish_reason) == ("<think></think><answer>", "budget")
        assert a.sampled.tolist() == [False] * 3 + [True] and a.logprobs[:3].tolist() == [0] * 3
    assert run.statistics.forced == 18 and run.statistics.forced_tokens == 54


def test_the_context_ends_an_answer(model, prompts):
    object.__setattr__(model.config.text_config, "max_position_embeddings", max(map(len, prompts)) + 4)
    groups, _ = answers_of(model, prompts)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    assert max(len(a.token_ids) for a in groups[longest]) == 4
    with pytest.raises(ValueError, match=r"rollouts: prompt \d must be of 1 to \d+ tokens, for the context, got \d+"):
        object.__setattr__(model.config.text_config, "max_position_embeddings", max(map(len, prompts)))
        answers_of(model, prompts)


def test_random_budgets_differ_and_are_seeded(model, prompts):
    model.generation_config = {}
    groups, _ = answers_of(model, prompts, group=8, random_budgets=(2, 12))
    ends = [np.flatnonzero(~a.sampled)[0] for group in groups.values() for a in group if not a.sampled.all()]
    assert len(ends) > 40 and set(ends) <= set(range(2, 14)) and len(set(ends)) > 6
    again, _ = answers_of(model, prompts, group=8, random_budgets=(2, 12))
    for i in groups:
        same(groups[i], again[i])


def test_vision_ids_are_never_sampled(model, prompts, monkeypatch):
    say(model, monkeypatch, list(model.config.vision_token_ids), times=12.0)
    for temperature in (0.0, 1.0):
        groups, _ = answers_of(model, prompts, temperature=temperature)
        for a in (a for group in groups.values() for a in group):
            assert not set(a.token_ids.tolist()) & set(model.config.vision_token_ids)
            assert (a.logprobs < -4).all()  # what the banned ids would have had is not shared out


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_logits_are_an_error(model, prompts, monkeypatch, value):
    say(model, monkeypatch, 7, times=value)
    for temperature in (0.0, 1.0):
        with pytest.raises(
            RuntimeError, match=r"logits must be finite, got NaN or infinity \(prompt 0, rollout 0, token 0\)"
        ):
            answers_of(model, prompts, temperature=temperature)


def test_progress_counts_to_the_end(model, prompts):
    calls = []
    run = rollouts(model, prompts, 4, seeds(prompts), RolloutSettings(12, rows=5), lambda *call: calls.append(call))
    assert not calls  # nothing happens before the first answer is asked for
    first, answers = next(run)
    assert len(answers) == 4 and run.statistics.answers >= 4
    rest = dict(run)
    assert calls[-1] == (24, 24) and calls == sorted(calls) and {first, *rest} == set(range(6))
    assert run.statistics.prefill_s > 0 and run.statistics.decode_s > 0
    assert list(rollouts(model, [], 4, [])) == []


# The budget of many answers at once is that of one


@given(
    budget=st.none() | st.integers(0, 6),
    prompt=st.sampled_from(["Q", "Q[", "Q[\n"]),
    said=st.lists(st.lists(st.sampled_from("x[]<>(["), min_size=12, max_size=12), min_size=1, max_size=4),
)
def test_budgets_are_those_of_generate(budget, prompt, said):
    tags = {"<think>": "[", "</think>": "]>", "<answer>": "<("}  # of one token and of two

    def encode(tag, add_special_tokens=False):
        return SimpleNamespace(ids=list(map(ord, tags[tag])))

    model = SimpleNamespace(processor=SimpleNamespace(tokenizer=SimpleNamespace(encode=encode)))
    one = SimpleNamespace(input_ids=torch.tensor(list(map(ord, prompt))))
    many = Budgets(model, [one], len(said))
    if budget is not None:
        many.left[:] = budget
    alone = [ThinkingBudget(budget, list(map(ord, prompt)), lambda tag: encode(tag).ids) for _ in said]
    token_ids, answers = np.zeros((len(said), 12), dtype=np.int64), np.arange(len(said))
    for step in range(12):
        forced = many.forced(answers, token_ids, np.full(len(said), step))
        for row, (budget_, text) in enumerate(zip(alone, said, strict=True)):
            expected = budget_.forced_token(token_ids[row, :step].tolist())
            assert forced[row] == (-1 if expected is None else expected)
            token_ids[row, step] = ord(text[step]) if expected is None else expected


# Arguments


@pytest.mark.parametrize(
    "options, text",
    [
        ({"max_new_tokens": 0}, "rollouts: max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"max_new_tokens": 1.5}, "rollouts: max_new_tokens must be a whole number of 1 or more, got 1.5"),
        ({"rows": 0}, "rollouts: rows must be a whole number of 1 or more, got 0"),
        ({"thinking_budget": -1}, "rollouts: thinking_budget must be a whole number of 0 or more or None, got -1"),
        ({"random_budgets": (5, 3)}, r"rollouts: random_budgets must be \(least, most\), .* got \(5, 3\)"),
        ({"random_budgets": 5}, r"rollouts: random_budgets must be \(least, most\), .* got 5"),
        (
            {"random_budgets": (1, 2), "thinking_budget": 1},
            "rollouts: random_budgets must be None where thinking_budget",
        ),
        ({"cache_tokens": 0}, "rollouts: cache_tokens must be a whole number of 1 or more or None, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or from 1e-6 to 1e6, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
    ],
)
def test_bad_settings_are_named(options, text):
    with pytest.raises((ValueError, InputError), match=text):
        RolloutSettings(**options)


@pytest.mark.parametrize(
    "group, seeds, text",
    [
        (0, [(1,)], "rollouts: group must be a whole number of 1 or more, got 0"),
        (2, [], r"rollouts: seeds must be one per prompt \(1\), got 0 of them"),
        (2, [()], r"rollouts: seed 0 must be whole numbers of 0 or more, got \(\)"),
        (2, [(1, -1)], r"rollouts: seed 0 must be whole numbers of 0 or more, got \(1, -1\)"),
    ],
)
def test_bad_arguments_are_named_at_once(model, prompts, group, seeds, text):
    with pytest.raises(ValueError, match=text):
        rollouts(model, prompts[4:5], group, seeds)
