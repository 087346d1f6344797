"""Whole answers against transformers: the same prompts from the same files, the same tokens."""

import pytest
import torch
from transformers import Glm4vForConditionalGeneration

from glm4v import Glm4v

QUESTIONS = [
    "What is this?",
    "",
    "Count the objects in the picture, one after the other.",
    "数一数 🌺",
    "Why?\n\nSay so.",
]
STEPS = 16


def user(*parts):
    return [{"role": "user", "content": [part if isinstance(part, dict) else text(part) for part in parts]}]


def text(content):
    return {"type": "text", "text": content}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return Glm4v.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint):
    return Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture
def conversations(photos, film):
    """25 prompts: text, an image, several, a video, several turns."""
    temple, flower = ({"type": "image", "image": photo} for photo in photos)
    small = {"type": "image", "image": photos[0][:60, :200]}
    tall = {"type": "image", "image": photos[1][:400, 100:140]}
    films = [{"type": "video", "video": str(film(f"{n}.mp4", count=n))} for n in (12, 36, 60)]
    answer = {"role": "assistant", "content": "<think>Hm.</think><answer>A temple.</answer>"}
    text_only = [user(question or "Hi") for question in QUESTIONS]
    one_image = [user(image, q) for image in (small, tall) for q in QUESTIONS] + [user(temple, QUESTIONS[0])]
    several = [user(small, "and", tall, "?"), user(tall, small, small), user("One: ", small, " Two: ", flower)]
    of_films = [user(one, "What happens?") for one in films]
    turns = [
        [*user(small, "Where?"), answer, *user("And when?")],
        [{"role": "system", "content": "Be brief."}, *user(small, "Where?"), answer, *user(tall, "And this?")],
        [*user("Hi"), {"role": "assistant", "content": "Hello"}, *user(films[0], "What now?")],
    ]
    return text_only + one_image + several + of_films + turns


def transformers_tokens(theirs, processor, model, messages):
    """What transformers' own generate says to one prompt."""
    batch = processor(messages)
    ids = batch.input_ids
    border = (ids == model.config.video_start_token_id).int() - (ids == model.config.video_end_token_id).int()
    types = (ids == model.config.image_token_id) * (1 + border.cumsum(0))
    pictures = {
        name: batch[name]
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        if batch[name] is not None
    }
    output = theirs.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        mm_token_type_ids=types[None],
        **pictures,
        max_new_tokens=STEPS,
        do_sample=False,
        bad_words_ids=[[token] for token in model.config.vision_token_ids],
    )
    return output[0, len(ids) :].tolist()


def test_greedy_tokens_are_those_of_transformers(model, theirs, processor, conversations):
    answers = model.generate(conversations, max_new_tokens=STEPS, temperature=0)
    assert len(answers) == 25
    for messages, answer in zip(conversations, answers, strict=True):
        assert answer.token_ids == transformers_tokens(theirs, processor, model, messages)
        assert answer.text == processor.decode(
            answer.token_ids[: len(answer.token_ids) - (answer.finish_reason == "stop")], skip_special_tokens=False
        )
    assert len({tuple(answer.token_ids) for answer in answers}) > 20


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8, "repetition_penalty": 1.2}])
def test_samples_alone_and_in_a_batch_of_17(model, processor, conversations, options):
    options = {"max_new_tokens": STEPS, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "logprobs": True, **options}
    together = model.generate(conversations[5:22], seed=3, **options)
    for i in range(17):
        (alone,) = model.generate(conversations[5 + i], seed=[(3, i)], **options)
        assert alone.token_ids == together[i].token_ids
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(together[i].logprobs), rtol=0, atol=1e-4)


def test_a_batch_is_as_good_as_messages(model, processor, conversations):
    batch = processor(conversations[:3])
    assert model.generate(batch, max_new_tokens=5, seed=1) == model.generate(
        conversations[:3], max_new_tokens=5, seed=1
    )


def test_bfloat16_and_the_checkpoint_s_sampling(tiny_checkpoint, conversations):
    model = Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert model.generation_config["top_k"] == 2
    answers = model.generate(conversations[6:9], max_new_tokens=8, seed=0)
    assert all(0 < len(answer.token_ids) <= 8 for answer in answers)


def test_settings_travel_with_the_weights(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    again = Glm4v.from_pretrained(tmp_path)
    assert again.generation_config == model.generation_config
    (tmp_path / "generation_config.json").unlink()
    bare = Glm4v.from_pretrained(tmp_path)
    assert bare.generation_config == {"eos_token_id": model.generation_config["eos_token_id"]}
    bare.folder = None
    with pytest.raises(ValueError, match="glm4v: processor must be set for a model without a checkpoint folder"):
        bare.generate(user("Hi"))
    bare.processor = processor
    assert bare.generate(user("Hi"), max_new_tokens=1)[0].prompt_tokens == processor.count_tokens(user("Hi"))
