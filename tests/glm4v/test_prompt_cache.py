"""Prompts that begin alike are read once: the tokens are those of a call without a cache, and the work is less."""

import numpy as np
import pytest
import torch
from PIL import Image

from glm4v import Glm4v, InputError, PromptCache


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return Glm4v.from_pretrained(tiny_checkpoint)


@pytest.fixture
def read(model, monkeypatch):
    """Tokens and patches that the model reads in prefills, a pair each."""
    calls = []
    hidden = Glm4v.hidden

    def counted(self, input_ids, cu_seqlens, position_ids, **rest):
        pixels = [rest.get(name) for name in ("pixel_values", "pixel_values_videos")]
        calls.append((len(input_ids), sum(len(x) for x in pixels if x is not None)))
        return hidden(self, input_ids, cu_seqlens, position_ids, **rest)

    monkeypatch.setattr(Glm4v, "hidden", counted)
    return calls


def picture(seed, width=112, height=84):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(*parts):
    kinds = {str: "text", Image.Image: "image", list: "video"}
    content = [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]
    return {"role": "user", "content": [part | ({"fps": 2} if "video" in part else {}) for part in content]}


def assistant(text):
    return {"role": "assistant", "content": text}


def film(seed):
    return [picture(seed * 100 + i, 56, 56) for i in range(8)]


OPTIONS = {"max_new_tokens": 6, "temperature": 0, "logprobs": True}


def same(model, messages, cache, **options):
    """The answer with the cache, which is the one without it."""
    (plain,) = model.generate(messages, **OPTIONS | options)
    (kept,) = model.generate(messages, prompt_cache=cache, **OPTIONS | options)
    assert (kept.token_ids, kept.prompt_tokens) == (plain.token_ids, plain.prompt_tokens)
    torch.testing.assert_close(torch.tensor(kept.logprobs), torch.tensor(plain.logprobs), rtol=1e-4, atol=1e-4)
    return kept


def test_a_conversation_reads_what_is_new(model, read):
    cache, messages, before = PromptCache(), [], 0
    turns = [picture(0), "What is it?"], ["And now?"], [picture(1), picture(2), "Which?"], [film(1), "When?"], ["Why?"]
    for turn in turns:
        messages.append(user(*turn))
        read.clear()
        answer = same(model, messages, cache)
        (whole, patches), (new, new_patches) = read
        assert whole == answer.prompt_tokens
        assert len(cache) == answer.prompt_tokens + len(answer.token_ids) - 1  # nothing follows the last one
        pictures = [part for part in turn if not isinstance(part, str)]
        assert (new_patches > 0) == (len(pictures) > 0)
        if before:
            assert new_patches < patches and new < whole - before + 10  # the earlier answer again, and the turn
        before = answer.prompt_tokens
        messages.append(assistant(answer.answer or "hm"))


def test_an_answer_that_stays_is_not_read_again(model, read):
    cache = PromptCache()
    batch = model.processor([user("Say it.")])
    (first,) = model.generate(batch, prompt_cache=cache, **OPTIONS)
    ids = torch.cat((batch.input_ids, torch.tensor([*first.token_ids, 65, 66])))
    positions = torch.arange(len(ids)).expand(3, -1)
    longer = {"input_ids": ids, "cu_seqlens": torch.tensor([0, len(ids)]), "position_ids": positions}
    read.clear()
    same(model, longer, cache)
    assert [tokens for tokens, _ in read] == [
        len(ids),
        3,
    ]  # the answer's last token, which no step took in, and two


@pytest.mark.parametrize("change", ["picture", "size", "order", "kind"])
def test_a_picture_that_differs_is_read_anew(model, read, change):
    cache = PromptCache()
    first, second = picture(1), picture(2)
    same(model, [user("Look:", first, second, "?")], cache)
    now = {
        "picture": (first, picture(3)),
        "size": (first, picture(2, 84, 112)),  # as many patches
        "order": (second, first),
        "kind": (first, [second, second]),
    }[change]
    read.clear()
    same(model, [user("Look:", *now, "?")], cache)
    (whole, patches), (new, new_patches) = read
    kept = 0 if change == "order" else 48
    assert new_patches == patches - kept and 0 < new < whole


def test_tokens_at_other_positions_are_read_anew(model, read):
    cache = PromptCache()
    batch = model.processor([user(picture(0), "What?")])
    for distance in (0, 1):
        read.clear()
        same(model, {**batch, "position_ids": batch.position_ids + distance}, cache)
    assert read[0] == read[1]


def test_a_film_is_read_whole(model, read):
    """Two that differ in their second half only."""
    cache, one = PromptCache(), film(1)
    other = [*one[:4], *film(2)[4:]]
    same(model, [user("See:", one, "?")], cache)
    read.clear()
    same(model, [user("See:", other, "?")], cache)
    assert read[0][1] == read[1][1] > 0
    read.clear()
    same(model, [user("See:", other, "!")], cache)
    assert read[1][1] == 0


def test_the_same_prompt_again_reads_its_last_token(model, read):
    cache = PromptCache()
    for _ in range(2):
        read.clear()
        same(model, [user(picture(0), "What?")], cache)
    assert read[1] == (1, 0)


def test_a_prompt_that_ends_in_a_picture(model, read):
    """As no template makes it; all of the picture is read for the last token's logits."""
    cache = PromptCache()
    whole = model.processor([user(picture(0), "What?")])
    end = int((whole.input_ids == model.config.image_token_id).nonzero()[-1]) + 1
    cut = {
        **whole,
        "input_ids": whole.input_ids[:end],
        "cu_seqlens": torch.tensor([0, end]),
        "position_ids": whole.position_ids[:, :end],
    }
    for _ in range(2):
        read.clear()
        same(model, cut, cache)
    assert read[1] == (12, 48)


def test_an_interrupted_answer_leaves_what_was_read(model, read):
    cache = PromptCache()
    messages = [user(picture(0), "What?")]
    pieces = model.stream(messages, prompt_cache=cache, **OPTIONS)
    next(pieces), next(pieces)
    pieces.close()
    read.clear()
    same(model, messages, cache)
    assert read[1] == (1, 0)


def test_a_prefill_that_fails_leaves_what_was_read(model, read, monkeypatch):
    cache = PromptCache()
    same(model, [user(picture(0), "What?")], cache)
    held = len(cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.language_model.norm, "forward", lambda x: 1 / 0)  # all layers have written
        with pytest.raises(ZeroDivisionError):
            model.generate([user(picture(0), "What on earth?")], prompt_cache=cache, **OPTIONS)
    assert 0 < len(cache) < held
    same(model, [user(picture(0), "What?")], cache)


def test_room_grows(model):
    cache = PromptCache()
    for limit in (1, 2, 40):
        same(model, [user("Say it.")], cache, max_new_tokens=limit)


def test_samples_are_those_without_a_cache(model):
    cache = PromptCache()
    for turn in ("What?", "What else?", "What else?"):
        same(model, [user(picture(0), turn)], cache, temperature=1.0, seed=3)


def test_clear_and_another_model_or_dtype(tiny_checkpoint, model, read):
    cache, messages = PromptCache(), [user("Say it.")]
    same(model, messages, cache)
    assert len(cache) > 0
    cache.clear()
    assert len(cache) == 0
    other = Glm4v.from_pretrained(tiny_checkpoint)
    for change in (lambda: model, lambda: other, lambda: other.to(torch.bfloat16)):
        read.clear()
        same(change(), messages, cache)
        assert read[0] == read[1]


@pytest.mark.parametrize("other", ["stream", "clear"])
def test_an_answer_does_not_go_on_with_what_another_call_took(model, other):
    cache = PromptCache()
    pieces = model.stream([user("Say it.")], prompt_cache=cache, **OPTIONS)
    next(pieces)
    if other == "clear":
        cache.clear()
    else:
        same(model, [user("And that.")], cache)
    with pytest.raises(InputError, match="prompt_cache must be one answer's at a time, got another call"):
        next(pieces)


def test_several_requests_are_refused(model):
    with pytest.raises(InputError, match="prompt must be one request with a prompt_cache, got 2"):
        model.generate([[user("a")], [user("b")]], prompt_cache=PromptCache(), **OPTIONS)
    with pytest.raises(InputError, match="prompt_cache must be a PromptCache or None"):
        model.generate([user("a")], prompt_cache={}, **OPTIONS)
