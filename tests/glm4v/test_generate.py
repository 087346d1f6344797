"""The engine, on a mock model: what comes out, in which order, for whom. Against transformers: test_greedy."""

import math
from dataclasses import replace
from inspect import signature

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from glm4v import Generation, Glm4v
from glm4v.detokenize import TextStream
from glm4v.errors import InputError
from glm4v.generate import generate, stream
from glm4v.sampling import Sampling, cut, draw, penalized, streams
from tests.glm4v.mock_model import MockModel, byte_tokenizer

ANSWER = "<think>So it is.</think><answer>It is <|begin_of_box|>42<|end_of_box|>."


def say(text: str, prompt: str = "Q", **options) -> Generation:
    (generation,) = generate(MockModel({prompt: text}), [prompt], **options)
    return generation


def test_one_answer():
    model = MockModel({"Why?": ANSWER + "</answer>"})
    (g,) = generate(model, ["Why?"], logprobs=True)
    assert (g.thinking, g.answer, g.box) == ("So it is.", "It is 42.", "42")
    assert g.text == ANSWER  # without the stop token
    assert g.token_ids == model.encode(ANSWER + "</answer>")  # with it
    assert (g.prompt_tokens, g.finish_reason, g.forced) == (4, "stop", [])
    assert len(g.logprobs) == len(g.token_ids) and max(g.logprobs) <= 0
    names = ["text", "thinking", "answer", "box", "token_ids", "prompt_tokens", "finish_reason"]
    assert list(g.to_json()) == names


def test_arguments_in_order_are_those_of_stream():
    model = MockModel({"Q": ANSWER})
    assert generate(model, ["Q"], 5, 0.0) == generate(model, ["Q"], max_new_tokens=5, temperature=0.0)
    assert signature(generate).parameters == signature(stream).parameters


def test_length_ends_an_answer():
    for limit in (1, 5, 20):
        g = say(ANSWER, max_new_tokens=limit)
        assert (len(g.token_ids), g.finish_reason) == (limit, "length")
    model = MockModel({"Q": ANSWER}, max_positions=11)
    (g,) = generate(model, ["Q"])
    assert (len(g.token_ids), g.finish_reason) == (10, "length")


def test_ragged_rows_leave_the_batch_when_they_end():
    texts = {"a": "short", "bb": "a longer answer", "ccc": "", "d" * 13: "the longest answer of all"}
    model = MockModel(texts, position_gap=7)
    cache = []
    model.new_cache = lambda *a: cache.append(MockModel.new_cache(model, *a)) or cache[0]
    answers = generate(model, list(texts))
    assert [g.text for g in answers] == list(texts.values())
    assert cache[0].capacity == 13 + 4083  # the longest prompt, and the context's remainder
    sizes = cache[0].batch_sizes
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == sum(len(text) for text in texts.values())  # no step for a row that has ended


def test_pieces_make_up_the_text():
    texts = {"a": "naïve 数字 🌺 end", "b": ANSWER, "c": "x" * 50}
    model = MockModel(texts)
    said = {0: "", 1: "", 2: ""}
    done = {}
    for piece in stream(model, list(texts), stop=["zzz"]):
        assert piece.index not in done
        assert "\ufffd" not in piece.text
        said[piece.index] += piece.text
        if piece.generation:
            done[piece.index] = piece.generation
    assert [said[i] for i in range(3)] == list(texts.values()) == [done[i].text for i in range(3)]


def test_the_requests_take_turns():
    order = [piece.index for piece in stream(MockModel({"a": "1234", "b": "12"}), ["a", "b"])]
    assert order == [0, 1, 0, 1, 0, 1, 0, 0]


# Random streams


@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"top_k": 5, "min_p": 0.1}, {"repetition_penalty": 1.3}])
def test_same_tokens_alone_and_in_a_batch(options):
    prompts = [f"{'prompt ' * (i % 4)}{i}" for i in range(17)]
    options = {"temperature": 1.0, "max_new_tokens": 12, **options}
    together = generate(MockModel(), prompts, seed=5, **options)
    for i in (0, 1, 8, 16):
        (alone,) = generate(MockModel(), [prompts[i]], seed=[(5, i)], **options)
        assert alone == together[i]
    assert together == generate(MockModel(), prompts, seed=5, **options)
    assert together != generate(MockModel(), prompts, seed=6, **options)


def test_each_request_has_its_own_stream():
    answers = generate(MockModel(), ["same prompt"] * 16, temperature=1.0, max_new_tokens=4, seed=1)
    assert len({tuple(g.token_ids) for g in answers}) == 16
    answers = generate(MockModel(), ["same prompt"] * 2, temperature=1.0, max_new_tokens=4, seed=[3, 3])
    assert answers[0] == answers[1]
    first, second = (generate(MockModel(), ["p"], temperature=1.0, max_new_tokens=8)[0] for _ in range(2))
    assert first.token_ids != second.token_ids


def test_a_draw_follows_the_distribution():
    scores = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log()
    draws = torch.tensor([s.random() for s in streams(0, 20_000)], dtype=torch.float64)
    counts = draw(scores.expand(20_000, -1), draws).bincount(minlength=5) / 20_000
    torch.testing.assert_close(counts, scores.exp(), atol=0.015, rtol=0)
    assert counts[2] == 0


def test_a_draw_at_the_ends_has_probability():
    scores = torch.tensor([-math.inf, 0.3, -math.inf, 2.0, -math.inf]).expand(2, -1)
    assert draw(scores, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 3]


def test_last_bits_of_the_logits_move_no_tokens():
    scores = torch.randn(2000, 300)
    noise = 1 + 1e-6 * torch.randn_like(scores)
    draws = torch.rand(2000, dtype=torch.float64)
    cuts = Sampling(temperature=1.0)
    assert (draw(cut(scores, cuts), draws) != draw(cut(scores * noise, cuts), draws)).sum() <= 1


# Sampling as transformers does it


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.floats(0.05, 1),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_cuts_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    from transformers.generation import logits_process as hf

    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 3
    expected = hf.TemperatureLogitsWarper(temperature)(None, logits)
    expected = hf.TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = hf.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    expected = hf.MinPLogitsWarper(min_p)(None, expected) if min_p else expected
    actual = cut(logits / temperature, Sampling(temperature, top_p, top_k, min_p))
    assert torch.equal(actual, expected)


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids, logits = torch.tensor([[3, 5, 5, 9], [1, 1, 1, 1]]), torch.randn(2, 12)
    seen = torch.zeros(2, 12, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalized(logits, seen, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(ids, logits))


def test_the_penalty_counts_prompt_and_answer():
    model = MockModel()
    model.row_logits = lambda row: torch.linspace(1, 2, model.vocab)
    model.generation_config = {}
    last = model.vocab - 1
    (plain,) = generate(model, ["x"], max_new_tokens=3)
    (g,) = generate(model, ["x"], repetition_penalty=1.5, max_new_tokens=3)
    assert plain.token_ids == [last] * 3
    assert g.token_ids == [last, last - 1, last - 2]


def test_defaults_come_from_the_checkpoint():
    file = {"do_sample": True, "temperature": 0.8, "top_p": 0.6, "top_k": 2, "pad_token_id": 3}
    assert Sampling.from_defaults(file) == Sampling(0.8, 0.6, 2)
    assert Sampling.from_defaults(file, temperature=0.0) == Sampling(0.0, 0.6, 2)
    assert Sampling.from_defaults(file, top_k=0, top_p=None) == Sampling(0.8, 0.6, 0)
    assert Sampling.from_defaults({"do_sample": False, "temperature": 0.8}) == Sampling()
    unsaid = transformers.GenerationConfig._get_default_generation_params()
    expected = Sampling(unsaid["temperature"], unsaid["top_p"], unsaid["top_k"])
    assert Sampling.from_defaults({"do_sample": True}) == expected == Sampling(1.0, 1.0, 50)
    assert Sampling.from_defaults({"do_sample": True, "top_k": 0}) == Sampling(1.0)
    assert Sampling.from_defaults({}, temperature=0.7) == Sampling(0.7)
    with pytest.raises(
        InputError, match=r"top_p must be above 0 .*, got 3 \(the checkpoint's generation_config.json\)"
    ):
        Sampling.from_defaults({"top_p": 3}, temperature=0.7)
    with pytest.raises(InputError, match=r"top_k must be 0 or more, got -1$"):
        Sampling.from_defaults({"top_p": 3}, top_k=-1)
    with pytest.raises(InputError, match=r"the checkpoint's do_sample must be true or false, got 'no'$"):
        Sampling.from_defaults({"do_sample": "no"})


def test_vision_ids_are_banned_also_in_greedy():
    model = MockModel()
    picture = model.id("<|image|>")
    model.row_logits = lambda row: torch.nn.functional.one_hot(torch.tensor(picture), model.vocab) * 9.0
    for temperature in (0, 1):
        (banned,) = generate(model, ["x"], max_new_tokens=20, temperature=temperature, seed=0)
        assert not {picture, model.id("<|video|>")} & set(banned.token_ids)
    (allowed,) = generate(model, ["x"], max_new_tokens=2, temperature=0, allow_vision_ids=True)
    assert allowed.token_ids == [picture, picture]


def test_logprobs_are_the_models_own():
    model = MockModel()
    options = {"max_new_tokens": 6, "temperature": 2.0, "top_k": 3, "repetition_penalty": 1.5, "seed": 0}
    (g,) = generate(model, ["x"], logprobs=True, **options)
    row = model.encode("x")
    for token, logprob in zip(g.token_ids, g.logprobs, strict=True):
        assert math.isclose(model.row_logits(row).log_softmax(-1)[token], logprob, abs_tol=1e-5)
        row.append(token)
    assert generate(model, ["x"], **options)[0].logprobs is None


def test_broken_logits_are_an_error():
    model = MockModel()
    broken = [torch.full((model.vocab,), math.nan), torch.zeros(model.vocab), torch.zeros(model.vocab)]
    broken[1][7], broken[2][7] = math.nan, math.inf
    for logits in broken:
        model.row_logits = lambda row, logits=logits: logits
        for options in (
            {"temperature": 0},
            {"temperature": 1},
            {"temperature": 1, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        ):
            with pytest.raises(
                RuntimeError, match=r"logits must be finite, got NaN or infinity \(request 0, token 0\)"
            ):
                generate(model, ["x"], **options)


# Stops


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one two three", "two", "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["o"], ""),
        ("aab", "ab", "a"),
        ("ananas", "nas", "ana"),
        ("数字 42", "字", "数"),
        ("no stop here", "herring", "no stop here"),
        ("almost her", "here", "almost her"),
    ],
)
def test_stop_strings(text, stop, expected):
    model = MockModel({"Q": text})
    pieces = list(stream(model, ["Q"], stop=stop))
    g = pieces[-1].generation
    assert g.text == expected == "".join(piece.text for piece in pieces)
    assert g.finish_reason == "stop"
    assert model.encode(text)[: len(g.token_ids)] == g.token_ids[: len(model.encode(text))]


def test_stop_ids():
    model = MockModel({"Q": "one two"})
    for stop in (model.encode("t")[0], [model.encode("t")[0], "zzz"]):
        (g,) = generate(model, ["Q"], stop=stop)
        assert (g.text, g.finish_reason) == ("one ", "stop")
        assert g.token_ids == model.encode("one t")


@given(st.lists(st.integers(0, 270), max_size=40))
def test_text_is_what_the_tokenizer_says(ids):
    tokenizer = byte_tokenizer()
    text = TextStream(tokenizer)
    assert "".join([*map(text.push, ids), text.finish()]) == tokenizer.decode(ids, skip_special_tokens=False)


@given(st.text(alphabet="ab<é", max_size=30), st.lists(st.text(alphabet="ab<é", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_before_the_first_stop(text, stop):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    reader, said = TextStream(tokenizer, stop), ""
    for token in ids:
        said += reader.push(token)
        if reader.stopped:
            break
    said += reader.finish()
    first_end = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    if first_end is None:
        assert said == text
    else:
        assert reader.stopped and not any(s in said for s in stop)
        ending_there = [s for s in stop if text[:first_end].endswith(s)]
        assert said == text[: first_end - max(map(len, ending_there))]


# Thinking


def test_the_budget_ends_the_thinking():
    model = MockModel({"Q": "<think>" + "x" * 50})
    forced = model.encode("</think><answer>")
    (g,) = generate(model, ["Q"], thinking_budget=10, max_new_tokens=30)
    assert (g.thinking, g.answer, g.finish_reason) == ("x" * 10, "x" * 17, "length")
    assert g.forced == [11, 12]
    assert [g.token_ids[i] for i in g.forced] == forced
    (g,) = generate(model, ["Q"], thinking_budget=10)
    assert g.finish_reason == "budget"


@pytest.mark.parametrize("text", ["<think>abc</think><answer>long enough", "<think>abc<answer>long enough"])
def test_the_budget_leaves_an_ended_thinking_alone(text):
    for budget in (3, 4, 5):
        g = say(text, thinking_budget=budget)
        assert (g.forced, g.finish_reason) == ([], "stop") if budget > 3 else (g.forced, "budget")
        assert g.answer.endswith("enough")


def test_no_thinking_at_all():
    g = say("0123456789abcdefghijklmnopqrstuvwxyz", thinking_budget=0)
    assert g.text.startswith("<think></think><answer>")
    assert (g.thinking, g.forced, g.finish_reason) == ("", [0, 1, 2], "budget")
    g = say("0123456789", prompt="Q<think>\n", thinking_budget=0)
    assert g.text.startswith("</think><answer>")
    assert (g.thinking, g.answer) == ("", "23456789")


def test_a_template_may_open_the_thinking():
    g = say("thoughts</think>answer", prompt="Q<think>")
    assert (g.thinking, g.answer) == ("thoughts", "answer")
    g = say("thoughts and", prompt="Q<think>", max_new_tokens=8)
    assert (g.thinking, g.answer) == ("thoughts", "")


def test_forced_tokens_draw_nothing_and_count():
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 9}
    (free,) = generate(MockModel(), ["Q"], **options)
    (forced,) = generate(MockModel(), ["Q"], thinking_budget=4, **options)
    assert len(forced.token_ids) == 9
    assert forced.token_ids[:4] == free.token_ids[:4]
    assert forced.forced == [4, 5]


# Arguments


@pytest.mark.parametrize(
    "options, text",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"temperature": -1}, "temperature must be 0 or from 1e-6 to 1e6, got -1"),
        ({"temperature": math.nan}, "temperature must be 0 or from 1e-6 to 1e6, got nan"),
        ({"temperature": 1e-300}, "temperature must be 0 or from 1e-6 to 1e6, got 1e-300"),
        ({"temperature": "hot"}, "temperature must be a number, got hot"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"min_p": 2}, "min_p must be between 0 and 1, got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 1e-6 to 1e6, got 0"),
        ({"thinking_budget": -1}, "thinking_budget must be 0 or more, got -1"),
        ({"thinking_budget": 1.5}, "thinking_budget must be a whole number or None, got 1.5"),
        ({"stop": ["a", ""]}, "stop must be strings of one character or more and token ids"),
        ({"stop": 5.5}, "stop must be strings of one character or more and token ids, got .5.5."),
        ({"stop": [b"x"]}, "stop must be strings of one character or more and token ids, got .b'x'."),
        ({"logprobs": 3}, "logprobs must be True or False, got 3"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"seed": "x"}, "seed must be whole numbers of 0 or more, got 'x'"),
        ({"seed": [(1, -1)]}, "seed must be whole numbers of 0 or more, got .*-1"),
        ({"seed": [None]}, "seed must be whole numbers of 0 or more, got .None."),
        ({"seed": [1, 2]}, "seed must be an int or one per request .1., got 2 of them"),
    ],
)
def test_bad_settings_are_named_at_once(options, text):
    with pytest.raises(ValueError, match=f"generate: {text}"):
        stream(MockModel(), ["Q"], **options)


def test_a_prompt_must_fit():
    with pytest.raises(ValueError, match="generate: prompt 1 must be of 1 to 3 tokens, for the context, got 4"):
        stream(MockModel(max_positions=4), ["Q", "long"])
    empty = {name: torch.zeros(n, dtype=torch.int32) for name, n in (("input_ids", 0), ("cu_seqlens", 1))}
    with pytest.raises(ValueError, match="generate: prompt must be one request or more, got 0"):
        stream(MockModel(), {**empty, "position_ids": torch.zeros(3, 0)})


def test_the_context_ends_each_answer_by_itself(tiny_checkpoint):
    model = Glm4v.from_pretrained(tiny_checkpoint)
    model.config = replace(model.config, text_config=replace(model.config.text_config, max_position_embeddings=24))
    model.generation_config = {}
    prompts = [[{"role": "user", "content": "x" * length}] for length in (1, 12, 5)]
    answers = model.generate(prompts)
    assert [answer.prompt_tokens + len(answer.token_ids) for answer in answers] == [24] * 3
    assert len({answer.prompt_tokens for answer in answers}) == 3
    assert [answer.token_ids for answer in answers] == [model.generate(prompt)[0].token_ids for prompt in prompts]


def test_what_is_neither_a_batch_nor_messages(tiny_checkpoint):
    model = Glm4v.from_pretrained(tiny_checkpoint)
    for prompt in (None, "Hi", {"role": "user", "content": "Hi"}, torch.tensor([1])):
        with pytest.raises(InputError, match=r"prompt: messages must be a list of messages or a list of such lists"):
            model.generate(prompt)
    with pytest.raises(InputError, match=r"generate: a batch must be one with cu_seqlens, got \['input_ids'\]"):
        model.generate({"input_ids": torch.tensor([1])})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"top_p": 1e-300},
        {"min_p": 1, "top_p": 1e-300, "top_k": 1},
        {"top_k": 10**12},
        {"repetition_penalty": 1e-6, "temperature": 1e-6},
        {"repetition_penalty": 1e6, "temperature": 1e6},
    ],
)
def test_extreme_settings_still_choose_by_the_logits(options):
    model = MockModel()
    cold = options.get("temperature") == 1e-6 or "top_p" in options
    (g,) = generate(model, ["x"], **{"temperature": 1.0, "seed": 0, "max_new_tokens": 4, **options})
    assert max(g.token_ids) < model.vocab and g.token_ids != [model.vocab - 1] * 4
    if cold and "repetition_penalty" not in options:
        assert g.token_ids == generate(model, ["x"], temperature=0, max_new_tokens=4)[0].token_ids


def test_stop_ids_of_the_checkpoint():
    model = MockModel({"Q": "ab!c"})
    model.generation_config = {"eos_token_id": model.id("!")}
    assert model.id("!") == 0  # an id like any other
    (g,) = generate(model, ["Q"])
    assert (g.text, g.finish_reason) == ("ab", "stop")
    for wrong in ("a", [None], {}):
        model.generation_config = {"eos_token_id": wrong}
        with pytest.raises(InputError, match="eos_token_id must be a token id or a list of them, got"):
            generate(model, ["Q"])
