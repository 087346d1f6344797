"""Answers by servers: what is sent, what is read of a reply, forced answering, faults. The server is a fake on
loopback with a real tiny model behind it; `test_served` runs a real one."""

import dataclasses
import re
import threading
import time

import numpy as np
import pytest
import torch
from asked import BUDGET, GIVES_IDS, Asked
from fake_server import STYLES, fake, short_pauses  # noqa: F401 (a fixture)
from hypothesis import given
from hypothesis import strategies as st

from glm4v import Glm4v, Processor
from glm4v.answer import CLOSE_THINK, OPEN_ANSWER, OPEN_THINK
from glm4v.generate import Settings, ThinkingBudget
from rlcs.config import EngineSettings, TrainConfig, build
from rlcs.data import read_tasks
from rlcs.endpoint import Fault, request
from rlcs.engines import EngineFault
from rlcs.engines.reply import Reader, cut
from rlcs.failures import told
from rlcs.prompts import make
from rlcs.rollout import RolloutSettings

pytestmark = pytest.mark.long

# --- what it says ---


@pytest.mark.parametrize("style", STYLES)
def test_answers_are_tokens_of_the_model_and_their_log_probabilities(style, demo, tmp_path):
    with fake(demo / "model", style=style) as server:
        asked = Asked(demo, tmp_path, [server.url], style)
        groups = asked.rollouts()
        metrics = asked.engine.metrics()
    assert sorted(groups) == [0, 1, 2, 3] and all(len(group) == 3 for group in groups.values())
    answers = [answer for group in groups.values() for answer in group]
    for answer in answers:
        assert 1 <= len(answer.token_ids) <= BUDGET.max_new_tokens
        assert len(answer.logprobs) == len(answer.sampled) == len(answer.token_ids)
    if style in GIVES_IDS:  # the ids are those that were said
        assert asked.gaps(groups).max() < 1e-4 and metrics["read_again"] == metrics["unknown_logprobs"] == 0
    else:
        known = np.concatenate([answer.logprobs[answer.sampled] for answer in answers])
        assert np.isnan(known).all() and metrics["read_again"] == 1
    assert metrics["told"] == 1 and metrics["retries"] == 0 and metrics["requests"] >= len(answers)
    assert len({tuple(answer.token_ids) for answer in answers}) > 6  # seeds differ


@pytest.mark.parametrize("style", STYLES)
def test_thinking_is_cut_at_the_budget_and_the_answer_goes_on_behind_the_forced_tags(style, demo, tmp_path):
    with fake(demo / "model", style=style) as server:
        asked = Asked(demo, tmp_path, [server.url], style)
        groups = asked.rollouts(settings=RolloutSettings(max_new_tokens=30, thinking_budget=5))
        chats = server.chats()
    close, answer = (asked.processor.encode(tag) for tag in (CLOSE_THINK, OPEN_ANSWER))
    forced = [a for group in groups.values() for a in group if not a.sampled.all()]
    assert len(forced) >= 10  # an untrained model closes no tag
    for one in forced:
        at = int(np.flatnonzero(~one.sampled)[0])
        assert at <= 5 and one.token_ids[~one.sampled].tolist() == [*close, *answer]
        assert (one.logprobs[~one.sampled] == 0).all() and one.sampled[at + 2 :].all() and len(one.token_ids) > at + 2
        assert one.finish_reason in ("budget", "length") and CLOSE_THINK + OPEN_ANSWER in one.text
    first = [body for body in chats if body["max_tokens"] == 6]  # <think>, which needn't come, is not counted
    rest = [body for body in chats if body["max_tokens"] != 6]
    assert len(first) == 12 and len(rest) >= len(forced)
    if style in GIVES_IDS:
        assert asked.gaps(groups, 6).max() < 1e-4  # what came behind the tags was said behind them


@pytest.mark.parametrize("budget", [0, 3, 100])
def test_any_budget(budget, demo, tmp_path):
    with fake(demo / "model") as server:
        asked = Asked(demo, tmp_path, [server.url])
        groups = asked.rollouts(settings=RolloutSettings(max_new_tokens=12, thinking_budget=budget))
        chats = server.chats()
    answers = [a for group in groups.values() for a in group]
    tags = [asked.processor.encode(tag) for tag in (OPEN_THINK, CLOSE_THINK, OPEN_ANSWER)]
    assert all(len(a.token_ids) <= 12 for a in answers)
    if budget == 0:
        assert all(
            a.token_ids[:3].tolist() == [id for tag in tags for id in tag] and not a.sampled[:3].any() for a in answers
        )
        assert len(chats) == 12
    if budget == 100:
        assert len(chats) == 12 and all(a.sampled.all() for a in answers)


def test_random_budgets_differ_and_follow_the_seed(demo, tmp_path):
    with fake(demo / "model") as server:
        asked = Asked(demo, tmp_path, [server.url])
        how = RolloutSettings(max_new_tokens=20, random_budgets=(0, 12))
        once, again = (asked.rollouts(settings=how, version=version) for version in (0, 1))
    assert len({int(a.sampled.argmin()) for group in once.values() for a in group}) > 3
    # To the bit, as this server draws by the seed alone.
    assert all(np.array_equal(a.token_ids, b.token_ids) for i in once for a, b in zip(once[i], again[i], strict=True))


@given(
    st.lists(st.integers(0, 4), max_size=14),
    st.integers(0, 9),
    st.sampled_from([([0], [1], [2]), ([0, 1], [2, 3], [4]), ([0, 0], [0, 1], [0, 2]), ([1, 2, 3], [1], [2, 2])]),
)
def test_the_cut_is_where_the_thinking_budget_has_it(ids, budget, tags):
    def encode(tag):
        return tags[(OPEN_THINK, CLOSE_THINK, OPEN_ANSWER).index(tag)]

    thinking, expected = ThinkingBudget(budget, [9], encode), None
    for n in range(len(ids) + 1):
        if thinking.forced_token(ids[:n]) is not None:
            expected = n
            break
    assert cut(ids, budget, tags) == expected


# --- what is sent ---


def test_requests_say_all_that_a_server_would_have_defaults_for(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", "secret")
    with fake(demo / "model") as server:
        asked = Asked(demo, tmp_path, [server.url], key_variable="ENGINE_KEY", extra='{"priority": 1}')
        asked.rollouts(group=1, settings=RolloutSettings(max_new_tokens=4, temperature=0.7, top_p=0.9))
        requests = server.requests
    body = server.chats()[0]
    assert all(key == "Bearer secret" for _, key, _ in requests) and "secret" not in repr(asked.engine.settings)
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 0.9, 0, 0.0)
    assert body["repetition_penalty"] == 1.0 and body["priority"] == 1 and body["model"] == "tiny"
    assert set(map(str, asked.model.config.vision_token_ids)) == set(body["logit_bias"])
    assert body["stop_token_ids"] and body["return_token_ids"] and body["logprobs"]
    assert len({body["seed"] for body in server.chats()}) == len(server.chats())


# --- what is read ---


@pytest.fixture(scope="module")
def reader(demo):
    processor, model = Processor.from_pretrained(demo / "model"), Glm4v.from_pretrained(demo / "model")
    stops = Settings.read(model.generation_config, max_new_tokens=1).stop_ids
    config = model.config
    return Reader(processor, sorted(stops), config.vision_token_ids, config.text_config.vocab_size)


def reply(content="abc", reason="stop", **choice):
    return {"choices": [{"message": {"content": content}, "finish_reason": reason, **choice}]}


def test_a_stop_token_that_is_named_but_not_shown_is_part_of_the_answer(reader):
    stop = min(reader.stop_ids)
    for name in ("stop_reason", "matched_stop"):
        found = reader(reply(**{name: stop}), 9)
        assert found.token_ids[-1] == stop and found.ended and np.isnan(found.logprobs).all()
    assert stop not in reader(reply(), 9).token_ids  # which it was is not known


def test_what_was_not_asked_for_is_cut_off(reader):
    stop, picture = min(reader.stop_ids), min(reader.banned)
    logprobs = {"content": [{"token": "", "logprob": -1.0}] * 4}
    found = reader(reply(token_ids=[65, stop, 66, 67], logprobs=logprobs, reason="length"), 9)
    assert found.token_ids == [65, stop] and found.ended and found.logprobs == [-1.0, -1.0]
    found = reader(reply(token_ids=[65, picture, 66, 67], logprobs=logprobs), 9)
    assert found.token_ids == [65] and not found.ended


def test_a_log_probability_that_a_server_leaves_out_is_unknown(reader):
    found = reader(reply(token_ids=[65, 66], logprobs={"content": [{"logprob": None}, {"logprob": -1.5}]}), 9)
    assert np.isnan(found.logprobs[0]) and found.logprobs[1] == -1.5


def test_text_that_reads_like_a_control_token_is_characters(reader):
    ids = reader.encode("<think>a<|image|></think>")
    assert not reader.banned & set(ids) and ids[0] == reader.codec.specials[OPEN_THINK]
    assert reader.text(ids) == "<think>a<|image|></think>"


def test_half_a_character_is_held_back(reader):
    ids = reader.encode("aé")  # bytes are tokens here
    assert [reader.whole(ids[:n]) for n in range(len(ids) + 1)] == [0, 1, 1, 3][: len(ids) + 1]


@pytest.mark.parametrize(
    ("body", "passes", "said"),
    [
        ({"choices": []}, True, "expected a chat completion, got"),
        ({"object": "error", "message": "no"}, True, "expected a chat completion"),
        (reply(content=[{"type": "text", "text": "a"}]), True, "expected a chat completion"),
        (reply(content="\ud800"), True, "expected a chat completion"),
        (reply(token_ids=3), True, "expected a chat completion"),
        (reply(logprobs=[]) | {"usage": [3]}, True, "expected a chat completion"),
        (reply(logprobs={"content": [None]}), True, "expected a chat completion"),
        ("<html>", True, "expected a chat completion"),
        (None, True, "expected a chat completion"),
        (reply(reason="abort"), True, "finish_reason must be stop or length, got 'abort'"),
        (reply(reason=None), True, "finish_reason must be stop or length"),
        (reply(token_ids=[1, 2], logprobs={"content": [{"token": "", "logprob": 0.0}]}), False, r"as many as tokens"),
        (reply(token_ids=[10**6]), False, "must be below"),
        (reply(token_ids=[65] * 30), False, "at most 9 tokens were asked for, got 30"),
        (
            {"choices": [{"message": {"content": "a", "reasoning_content": "b"}, "finish_reason": "stop"}]},
            False,
            "apart",
        ),
    ],
)
def test_replies_of_another_form_are_named(body, passes, said, reader):
    with pytest.raises(Fault, match=said) as fault:
        reader(body, 9)
    assert fault.value.passes is passes


# --- faults ---


def test_videos_are_not_for_transformers(demo, tmp_path):
    with fake(demo / "model", style="transformers") as server:
        asked = Asked(demo, tmp_path, [server.url], "transformers")
        asked.tasks = [task for task in read_tasks(demo / "train.jsonl") if task.domain == "video"][:1]
        asked.prompts = [make(asked.tasks[0].messages, asked.processor)]
        with pytest.raises(EngineFault, match="reads no silent video"):
            asked.rollouts()


@pytest.mark.parametrize("kind", [429, 500, 503, "drop", "cut", b'{"choices": [', b"{}", "late"])
def test_what_passes_is_tried_again_and_each_answer_is_taken_once(kind, demo, tmp_path):
    """Four of the first completions fail; the answers are those of a server without faults."""
    count = iter(range(10**6))

    def fault(_, path, body):
        return kind if "chat" in path and next(count) in (1, 4, 7, 10) else None

    with fake(demo / "model") as well, fake(demo / "model", fault=fault, delay=6.0) as ill:
        expected = Asked(demo, tmp_path / "a", [well.url]).rollouts()
        asked = Asked(demo, tmp_path / "b", [ill.url], timeout_s=3.0 if kind == "late" else 60.0)
        found, metrics = asked.rollouts(), asked.engine.metrics()
    assert metrics["retries"] >= (1 if kind == "late" else 4)
    assert {i: [a.token_ids.tolist() for a in g] for i, g in found.items()} == {
        i: [a.token_ids.tolist() for a in g] for i, g in expected.items()
    }


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_ends_the_wave_at_once_in_one_line(status, demo, tmp_path):
    with fake(demo / "model", fault=lambda _, path, body: status if "chat" in path else None) as server:
        asked = Asked(demo, tmp_path, [server.url], concurrency=2)
        with pytest.raises(EngineFault, match=rf"engine: http://.*/v1: task '.*': HTTP {status}: .*on demand") as fault:
            asked.rollouts()
        assert len(server.chats()) <= 6
    assert "\n" not in str(fault.value) and "the same command goes on" in told("train", fault.value)


def test_patience_ends_in_one_line(demo, tmp_path):
    with fake(demo / "model", fault=lambda _, path, body: 503 if "chat" in path else None) as server:
        asked = Asked(demo, tmp_path, [server.url], patience_s=0.3)
        with pytest.raises(EngineFault, match=r"HTTP 503.*given up after \d+ tries in \d s"):
            asked.rollouts()


def test_nobody_there_is_said_with_what_was_expected(demo, tmp_path):
    with fake(demo / "model") as server:
        url = server.url
    asked = Asked(demo, tmp_path, [url], patience_s=0.3)
    with pytest.raises(
        EngineFault, match=r"engine: weights must be at most 1 waves old .* none are known there: .*refused"
    ):
        asked.rollouts()


@pytest.mark.parametrize("url", ["http://host:port/v1", "http:///v1", "http://[::1/v1"])
def test_a_request_that_cannot_be_made_is_not_tried_again(url):
    with pytest.raises(Fault, match=f"a request to {re.escape(url)} cannot be made: ") as fault:
        request(url)
    assert not (fault.value.passes or fault.value.lost)


def test_a_server_that_is_killed_and_comes_back_is_told_its_weights_again(demo, tmp_path):
    """In the middle of a wave the server goes, and another begins at its address with other weights."""
    gone, started = threading.Event(), []
    other = tmp_path / "other"
    model = Glm4v.from_pretrained(demo / "model")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(other)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
                 "video_preprocessor_config.json"):  # fmt: skip
        (other / file).write_bytes((demo / "model" / file).read_bytes())

    def fault(number, path, body):
        if len(first.answered) >= 6:
            gone.set()
        return "drop" if gone.is_set() else None

    with fake(demo / "model") as well:
        expected = Asked(demo, tmp_path / "a", [well.url]).rollouts()
    with fake(demo / "model", fault=fault) as first:
        asked = Asked(demo, tmp_path / "b", [first.url], concurrency=3)

        def restart():
            gone.wait(20)
            first.stop()
            time.sleep(0.3)
            with fake(other, port=first.port) as second:
                started.append(second)
                done.wait(30)

        done = threading.Event()
        thread = threading.Thread(target=restart)
        thread.start()
        try:
            found, metrics = asked.rollouts(), asked.engine.metrics()
        finally:
            done.set()
            thread.join()
    assert started[0].answered and first.answered and metrics["told"] >= 2
    assert all(
        np.array_equal(a.token_ids, b.token_ids) for i in expected for a, b in zip(expected[i], found[i], strict=True)
    )
    assert asked.gaps(found).max() < 1e-4  # not one answer of the weights that it began with


def test_one_of_two_servers_is_enough(demo, tmp_path):
    dead = threading.Event()
    with (
        fake(demo / "model") as one,
        fake(demo / "model", fault=lambda *_: "drop" if dead.is_set() else None) as two,
    ):
        asked = Asked(demo, tmp_path, [one.url, two.url])
        asked.rollouts()
        both = len(one.answered), len(two.answered)
        dead.set()
        groups = asked.rollouts(version=1)
        assert min(both) > 0 and len(two.answered) == both[1] and len(groups) == 4
        assert asked.gaps(groups).max() < 1e-4


def test_no_more_requests_at_once_than_allowed(demo, tmp_path):
    with fake(demo / "model", fault=lambda _, path, body: "late" if "chat" in path else None, delay=0.02) as server:
        Asked(demo, tmp_path, [server.url], concurrency=3).rollouts()
        assert server.most_busy == 3


def test_a_prompt_that_the_server_reads_in_another_way_is_an_error(demo, tmp_path):
    with fake(demo / "model") as server:
        server.processor.template = type(server.processor.template)("[gMASK]<sop><|assistant|>\nOh. ")
        server.processor.config = dataclasses.replace(server.processor.config)
        asked = Asked(demo, tmp_path, [server.url])
        asked.tasks, asked.prompts = asked.tasks[2:3], asked.prompts[2:3]
        task = dataclasses.replace(asked.tasks[0], messages=[{"role": "user", "content": "Hi, who are you?"}])
        asked.tasks, asked.prompts = [task], [make(task.messages, asked.processor)]
        with pytest.raises(EngineFault, match=r"the prompt must have \d+ tokens, got \d+ there: another chat template"):
            asked.rollouts()


def test_closed_it_waits_for_no_request(demo, tmp_path):
    begun, ended = threading.Event(), []

    def fault(_, path, body):
        if "chat" in path:
            begun.set()
            return "late"

    with fake(demo / "model", fault=fault, delay=40.0) as server:
        asked = Asked(demo, tmp_path, [server.url])

        def ask():
            with pytest.raises(EngineFault, match="the wave was given up"):
                asked.rollouts()
            ended.append(1)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        assert begun.wait(30)
        asked.engine.close()
        thread.join(30)  # before a reply could come
    assert ended


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "http"}, "urls must begin with http"),
        ({"urls": ["http://x/v1"]}, "kind must be http where there are urls, got native with http://x/v1"),
        ({"kind": "http", "urls": ["localhost:8000"], "model": "m"}, "urls must begin with http.*got 'localhost"),
        ({"kind": "http", "urls": ["http://a/v1"]}, "model must be the name"),
        ({"kind": "http", "urls": ["http://a/v1"], "server": "openai", "model": "m"}, "update_path or update_command"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
        ({"timeout_s": 0}, "timeout_s must be above 0"),
        ({"refresh_every": 4}, "refresh_every must be at most 2 with a staleness of 1, got 4"),
        ({"extra": "[1]"}, "extra must be a JSON object"),
        ({"update_body": "{"}, "update_body must be a JSON object"),
        ({"update_path": "update"}, "update_path must begin with /, got 'update'"),
        ({"update_command": " "}, "update_command must be a command, got ' '"),
        ({"update_command": "tell 'them"}, "update_command must be a command, got"),
        ({"kind": "grpc"}, "native"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        build(TrainConfig, {"engine": changes}, "x.yaml")


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ValueError, match="engine: key_variable must name a variable that is set, got NOT_SET"):
        _ = EngineSettings(key_variable="NOT_SET").key
