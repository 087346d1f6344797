import copy
import dataclasses
import json
import math
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.video_utils import VideoMetadata

from glm4v import Batch, Glm4v, InputError, Processor
from glm4v.video import Video


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image(source):
    return {"type": "image", "image": source}


def video(source, **options):
    return {"type": "video", "video": source, **options}


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint):
    """transformers' processor; its constructor insists on torchvision, its methods do not."""
    processor = Glm4vProcessor.__new__(Glm4vProcessor)
    processor.tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    processor.image_processor = Glm4vImageProcessorPil.from_pretrained(tiny_checkpoint)
    processor.video_processor = Glm4vVideoProcessor.from_pretrained(tiny_checkpoint)
    processor.image_token = "<|image|>"
    return processor


def transformers_ids(theirs, messages, images=(), videos=()):
    """Ids by transformers' template, placeholder expansion and tokenizer. ``videos``: (grid, fps, sampled indices)."""
    text = theirs.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    grids = theirs.image_processor(list(images), return_tensors="pt")["image_grid_thw"] if images else []
    first, *rest = text.split("<|image|>")
    runs = [theirs.replace_image_token({"image_grid_thw": grids}, i) for i in range(len(grids))]
    text = first + "".join(run + stretch for run, stretch in zip(runs, rest, strict=True))
    for grid, fps, indices in videos:
        metadata = VideoMetadata(total_num_frames=10**6, fps=fps, frames_indices=list(indices))
        inputs = {"video_grid_thw": grid, "video_metadata": [metadata]}
        text = text.replace("<|video|>", theirs.replace_video_token(inputs, 0), 1)
    return theirs.tokenizer(text).input_ids


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_used_processor_goes_with_its_model(again, tiny_checkpoint, photos):
    model = Glm4v.from_pretrained(tiny_checkpoint)
    messages = [user("What", image(photos[0]), "is it? <|image|>")]
    before, after = model.processor(messages), again(model).processor(messages)
    assert before.prompts == after.prompts and torch.equal(before.input_ids, after.input_ids)
    assert torch.equal(before.pixel_values, after.pixel_values)


def test_images_against_transformers(processor, theirs, photos):
    images = [photos[0], photos[1][:100, :350], Image.fromarray(photos[1]).convert("L").resize((30, 20))]
    messages = [user("First ", image(images[0]), "then", image(images[1]), image(images[2]), "\nWhich?")]
    batch = processor(messages)
    expected = theirs.image_processor(images, return_tensors="pt")
    assert torch.equal(batch.image_grid_thw, expected["image_grid_thw"])
    torch.testing.assert_close(batch.pixel_values, expected["pixel_values"], rtol=0, atol=1e-5)
    assert batch.input_ids.tolist() == transformers_ids(theirs, messages, images)
    assert processor.count_tokens(messages) == len(batch.input_ids)


def test_long_texts_are_encoded_without_their_places(processor, tiny_checkpoint):
    """Where each token stands, which the tokenizer's `encode` notes as well, takes as long as all the rest."""
    codec = copy.copy(processor.codec)
    codec._plain = SimpleNamespace(encode_batch_fast=codec._plain.encode_batch_fast)
    text = "So it's 3,5 °C: \r\n\tGrüße 中文 e\u0301 \U0001f600  " * 100
    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert codec.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("count", "rate"), [(48, 24), (3, 24), (75, 30), (131, 10)])
def test_videos_against_transformers(count, rate, processor, theirs, film, photos):
    path = film(count=count, rate=rate)
    messages = [user("Look: ", video(str(path)), "What happens?")]
    batch = processor(messages)
    indices = theirs.video_processor.sample_frames(
        VideoMetadata(total_num_frames=count, fps=float(rate), duration=count / rate)
    )
    patches = theirs.video_processor.get_num_of_video_patches(len(indices), 64, 96)
    assert batch.video_grid_thw.prod() == patches == len(batch.pixel_values_videos)
    assert batch.video_grid_thw[0, 0] * 2 == len(indices)
    # The same resized frames through transformers' own patch order.
    resized = torch.from_numpy(Video(path).frames(*(int(n) * 14 for n in batch.video_grid_thw[0, 1:])))
    mean, std = (torch.tensor(v) for v in (theirs.video_processor.image_mean, theirs.video_processor.image_std))
    normal = ((resized / 255 - mean) / std).permute(0, 3, 1, 2)[None]
    expected, *grid = theirs.video_processor.patchify(normal, 14, 2, 2)
    torch.testing.assert_close(batch.pixel_values_videos, expected[0], rtol=0, atol=1e-5)
    assert grid == batch.video_grid_thw[0].tolist()
    assert batch.input_ids.tolist() == transformers_ids(
        theirs, messages, videos=[(batch.video_grid_thw, rate, indices)]
    )
    assert processor.count_tokens(messages) == len(batch.input_ids)


def test_times_in_the_prompt_are_the_true_ones(processor, film):
    ticks = [0, 400, 1900, 2100, 3700, 5000, 7600]
    batch = processor([user(video(film(ticks=ticks, count=len(ticks))))])
    stretches = batch.prompts[0].split("<|end_of_image|>")[1:]
    assert [int(s.partition("<")[0]) for s in stretches] == [0, 2, 5]  # units begin with frames at 0, 2.1 and 5 s


def test_conversations_are_packed_without_padding(processor, photos, film):
    conversations = [
        [user("Hi")],
        [user(image(photos[0][:60, :90]), video(film()), "Both?")],
        [user(video([p[:56, :56] for p in photos], fps=1)), {"role": "assistant", "content": "Two."}, user("Sure?")],
        [user(image(photos[1][:90, :60]), image(photos[0][:30, :30]))],
    ]
    batch = processor(conversations)
    alone = [processor(conversation) for conversation in conversations]
    lengths = [len(one.input_ids) for one in alone]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert processor.count_tokens(conversations) == lengths
    for name, axis in [("input_ids", 0), ("position_ids", 1), ("next_positions", 0), ("rope_deltas", 0)]:
        assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in alone], axis))
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone if one[name] is not None]))
    assert batch.prompts == tuple(one.prompts[0] for one in alone)


def test_a_batch_is_the_arguments_of_the_model(processor):
    batch = processor([user("Hi")])
    names = ["input_ids", "cu_seqlens", "position_ids"]
    pictures = ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"]
    assert isinstance(batch, Batch) and list(batch) == names + pictures
    assert all(batch[name] is None for name in pictures)
    assert dict(**batch).keys() == set(names + pictures)
    assert batch.next_positions.tolist() == [len(batch.input_ids)] and batch.rope_deltas.tolist() == [0]
    assert batch.to("cpu").prompts == batch.prompts
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.input_ids = None
    with pytest.raises(KeyError):
        batch["prompts"]


def test_counting_decodes_nothing(processor, photos, film, monkeypatch):
    messages = [user(image(photos[0]), video(film()), image(photos[1]), "All?")]
    whole = processor(messages)

    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("glm4v.image.Picture.pixels", refuse)
    monkeypatch.setattr("glm4v.video.Film.read", refuse)
    assert processor.count_tokens(messages) == len(whole.input_ids)
    outline = processor(messages, pixels=False)
    assert outline.pixel_values is None and outline.pixel_values_videos is None
    for name in ("input_ids", "cu_seqlens", "position_ids", "next_positions", "image_grid_thw", "video_grid_thw"):
        assert torch.equal(getattr(outline, name), getattr(whole, name)), name


def test_a_picture_may_be_read_before_it_is_asked_about(processor, photos, film):
    path = film(rotation=90)
    files = [image(photos[0]), video(path)]
    expected = processor([user(*files, "Both?")])
    kept = [processor.measure(part["type"], part[part["type"]]) for part in files]
    for picture in kept:
        picture.keep()
    path.unlink()
    messages = [user(image(kept[0]), video(kept[1]), "Both?")]
    for _ in range(2):
        batch = processor(messages)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert processor.count_tokens(messages) == len(expected.input_ids)
    with pytest.raises(InputError, match=r"^image: must be a path, URL, bytes, PIL image or array, got Measured$"):
        processor.count_tokens([user(image(kept[1]))])


def test_a_prompt_that_is_too_long_is_refused_before_decoding(processor, photos, monkeypatch):
    monkeypatch.setattr("glm4v.image.Picture.pixels", lambda *_: pytest.fail("decoded"))
    messages = [user(*[image(photos[0])] * 200)]  # 345 tokens each
    with pytest.raises(InputError, match=r"^prompt: tokens must be at most 65536, the model's, got 69\d\d\d$"):
        processor(messages)
    with pytest.raises(
        InputError, match=r"^prompt: tokens of conversation 2 must be at most 65536, the model's, got 69"
    ):
        processor([[user("Hi")], messages])


def test_a_turned_film_costs_what_it_is_said_to_cost(processor, film):
    for degrees in (90, 180):
        messages = [user(video(film(rotation=degrees)))]
        batch = processor(messages)
        assert len(batch.input_ids) == processor.count_tokens(messages)
        outline = processor(messages, pixels=False)
        assert torch.equal(outline.input_ids, batch.input_ids)
        assert torch.equal(outline.next_positions, batch.next_positions)
        assert outline.video_grid_thw.prod() == len(batch.pixel_values_videos)
    grids = [processor([user(video(film(rotation=degrees)))]).video_grid_thw.tolist()[0] for degrees in (90, 180)]
    assert grids[0] == [grids[1][0], grids[1][2], grids[1][1]]


def test_encode_and_decode(processor):
    answer = "<think>Four?</think><answer>4</answer>"
    ids = processor.encode(answer)
    assert ids[0] == processor.codec.id("<think>") and ids[-1] == processor.codec.id("</answer>")
    assert processor.decode(torch.tensor(ids), skip_special_tokens=False) == answer
    typed = processor.encode(answer, specials=False)
    assert not set(typed) & set(processor.codec.specials.values())
    assert processor.decode([*typed, processor.codec.id("<|endoftext|>"), 575]) == answer  # 575 only pads the head


def test_a_tokenizer_saved_after_padding(tiny_checkpoint, tmp_path, processor):
    """transformers writes the padding and truncation of its last call into `tokenizer.json`."""
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    theirs(["a", "b c"], padding="max_length", truncation=True, max_length=8)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"]["strategy"] == {"Fixed": 8}
    model, tag = Glm4v.from_pretrained(tmp_path), "</think><answer>"
    (answer,) = model.generate([user("Hi")], thinking_budget=2, max_new_tokens=8, temperature=0)
    assert [answer.token_ids[i] for i in answer.forced] == processor.encode(tag)
    ids = model.processor.tokenizer.encode(tag * 8, add_special_tokens=False).ids
    assert ids == processor.tokenizer.encode(tag * 8, add_special_tokens=False).ids


def changed(checkpoint, folder, **files):
    """A copy of the checkpoint without weights, with some JSON files changed; None removes one."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, content in files.items():
        path = folder / f"{name}.json"
        if content is None:
            path.unlink()
        else:
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content}))
    return folder


def test_settings_come_from_the_checkpoint(tiny_checkpoint, tmp_path, photos, film):
    size = {"shortest_edge": 784, "longest_edge": 2 * 56 * 56}
    separate = {"preprocessor_config": {"size": size}, "video_preprocessor_config": {"fps": 4, "image_std": [1, 1, 1]}}
    one_file = {"image_processor": {"size": size}, "video_processor": {"fps": 4, "image_std": [1, 1, 1]}}
    removed = {"preprocessor_config": None, "video_preprocessor_config": None}
    for i, files in enumerate([separate, {**removed, "processor_config": one_file}]):
        own = Processor.from_pretrained(changed(tiny_checkpoint, tmp_path / str(i), **files))
        batch = own([user(image(photos[0]), video(film()))])
        assert batch.image_grid_thw.tolist() == [[1, 2, 4]]
        assert batch.video_grid_thw.tolist()[0][0] == 4
        assert batch.pixel_values_videos.max() < 0.8
    released = Processor.from_pretrained(changed(tiny_checkpoint, tmp_path / "none", **removed))
    standard = Processor.from_pretrained(tiny_checkpoint)
    assert (released.image, released.video) == (standard.image, standard.video)


@pytest.mark.parametrize("stated", ["pv", "p", "pvIV", "pvI", "pvV", "pV", "pI", "IV", "vI"])
def test_settings_come_from_where_transformers_finds_them(stated, tiny_checkpoint, tmp_path):
    """Of a checkpoint that a newer transformers saved again, both spellings (capitals: the newer) lie in the folder."""

    def of(place):
        side = 10 + "pvIV".index(place)
        settings = {"size": {"shortest_edge": 784, "longest_edge": side * 28 * 28}, "image_mean": [1 / side] * 3}
        return settings if place in stated else None

    whole = {name: of(place) for name, place in (("image_processor", "I"), ("video_processor", "V")) if of(place)}
    files = {"preprocessor_config": of("p"), "video_preprocessor_config": of("v"), "processor_config": whole}
    folder = changed(tiny_checkpoint, tmp_path / "a", **files)
    ours = Processor.from_pretrained(folder)
    for own, theirs in ((ours.image, Glm4vImageProcessorPil), (ours.video, Glm4vVideoProcessor)):
        expected = theirs.from_pretrained(folder)
        assert own.max_pixels == expected.size["longest_edge"]
        assert list(own.mean) == list(expected.image_mean)


def test_patches_in_the_model_s_type(tiny_checkpoint, processor, photos):
    messages = [user(image(photos[0][:60, :90]))]
    half = Processor.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)(messages)
    assert torch.equal(half.pixel_values, processor(messages).pixel_values.bfloat16())


def test_folders_that_are_no_checkpoint(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"hf download zai-org/GLM-4.1V-9B-Thinking"):
        Processor.from_pretrained("zai-org/GLM-4.1V-9B-Thinking")
    wrong = changed(tiny_checkpoint, tmp_path / "a", config={"image_token_id": 3})
    with pytest.raises(
        InputError, match=r"image_token_id must be the id of <\|image\|>, got 3 in config.json, 522 in tok"
    ):
        Processor.from_pretrained(wrong)
    bare = changed(tiny_checkpoint, tmp_path / "b", tokenizer=None)
    with pytest.raises(InputError, match=r"^tokenizer: .*tokenizer.json: cannot be read: [^\n]*$"):
        Processor.from_pretrained(bare)
    other = changed(tiny_checkpoint, tmp_path / "c", tokenizer={"added_tokens": []})
    with pytest.raises(InputError, match=r"^tokenizer: special tokens must include <\|begin_of_image\|>, got \[\]$"):
        Processor.from_pretrained(other)
    for key in ("do_rescale", "do_sample_frames"):
        without = changed(tiny_checkpoint, tmp_path / key, video_preprocessor_config={key: False})
        with pytest.raises(InputError, match=rf"^processor: .*: {key} of videos must be True, got False$"):
            Processor.from_pretrained(without)
    for i, (key, value, expectation) in enumerate(
        (
            ("patch_size", 16, "14, got 16"),
            ("size", {"longest_edge": 0}, "positive numbers named shortest_edge and longest_edge, got"),
            ("size", 5, "positive numbers named shortest_edge and longest_edge, got 5"),
            ("image_mean", [1], r"3 numbers, got \[1\]"),
            ("image_mean", [0, 0, math.nan], r"3 numbers, got \[0, 0, nan\]"),
            ("image_std", [1, 0, 1], r"3 positive numbers, got \[1, 0, 1\]"),
            ("fps", 0, "a positive number, got 0"),
            ("fps", True, "a positive number, got True"),
        )
    ):
        wrong = changed(tiny_checkpoint, tmp_path / f"settings{i}", video_preprocessor_config={key: value})
        with pytest.raises(InputError, match=rf"^processor: .*: {key}( of videos)? must be {expectation}[^\n]*$"):
            Processor.from_pretrained(wrong)
    for name, value in (
        ("max_pixels", 0),
        ("max_pixels", "9"),
        ("max_aspect_ratio", 0.5),
        ("max_aspect_ratio", math.nan),
    ):
        with pytest.raises(InputError, match=rf"^processor: {name} must be 1 or more, got {value!r}$"):
            Processor.from_pretrained(tiny_checkpoint, **{name: value})
    with pytest.raises(InputError, match=r"^processor: allow_network must be True or False, got 'no'$"):
        Processor.from_pretrained(tiny_checkpoint, allow_network="no")
    with pytest.raises(InputError, match=r"^processor: dtype must be torch.float32, .* or torch.float16, got 'half'$"):
        Processor.from_pretrained(tiny_checkpoint, dtype="half")
    both = {"preprocessor_config": None, "processor_config": {"image_processor": 5}}
    with pytest.raises(InputError, match=r"^processor: .*: settings of images must be a JSON object, got 5$"):
        Processor.from_pretrained(changed(tiny_checkpoint, tmp_path / "both", **both))
    (bare / "tokenizer.json").write_text((tiny_checkpoint / "tokenizer.json").read_text())
    (bare / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"^processor: .*preprocessor_config.json: is not JSON: [^\n]*$"):
        Processor.from_pretrained(bare)
    (bare / "preprocessor_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"^processor: .*preprocessor_config.json: must be a JSON object, got list$"):
        Processor.from_pretrained(bare)


def test_a_template_that_loses_a_picture(tiny_checkpoint, tmp_path, photos):
    folder = changed(tiny_checkpoint, tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[-1].text }}")
    with pytest.raises(InputError, match="prompt: the chat template must place 1 pictures, got 0"):
        Processor.from_pretrained(folder)([user(image(photos[0]), "Hi")])
    (folder / "chat_template.jinja").write_text("<|video|>")
    for messages in ([user(image(photos[0]))], [user("Hi")]):
        with pytest.raises(InputError, match="must place the pictures of the messages in their order"):
            Processor.from_pretrained(folder)(messages)


def test_films_by_another_rule(tiny_checkpoint, tmp_path, photos):
    """GLM-4.6V-Flash has this model and these image settings, but other rules for films."""
    other = changed(tiny_checkpoint, tmp_path / "a", video_preprocessor_config={"video_processor_type": "Glm46VVideo"})
    processor = Processor.from_pretrained(other)
    assert processor.count_tokens([user(image(photos[0]))]) > 100
    with pytest.raises(
        InputError, match=r"^processor: video_processor_type must be Glm4vVideoProcessor, got Glm46VVid"
    ):
        processor.count_tokens([user({"type": "video", "video": photos[:1]})])


def test_messages_that_are_no_list(processor):
    table = np.array([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])  # pandas' way
    assert processor.count_tokens(table) == processor.count_tokens(list(table))
    with pytest.raises(InputError, match=r"^prompt: a conversation must be a list of messages, got [^\n]*$"):
        processor(np.zeros(2))
    for messages in ("Hi", b"Hi", {"role": "user", "content": "Hi"}, [], iter([])):
        with pytest.raises(InputError, match=r"^prompt: messages must be a list of messages .*, not empty, got .+$"):
            processor(messages)


def test_saved_beside_the_weights_a_checkpoint_is_whole(tiny_checkpoint, tmp_path, photos):
    model = Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    saved, question = tmp_path / "new" / "saved", [user(image(photos[0]), "Hi")]
    model.save_pretrained(saved)
    model.processor.save_pretrained(saved)
    again = Glm4v.from_pretrained(saved)
    how = {"max_new_tokens": 4, "temperature": 0}
    assert again.generate(question, **how) == model.generate(question, **how)
    names = {path.name for path in saved.iterdir()}
    assert names == {path.name for path in tiny_checkpoint.iterdir()}
    again.processor.save_pretrained(saved)  # where it was read from
    (saved / "chat_template.json").write_text("{}")
    model.processor.save_pretrained(saved)  # no mix with another checkpoint's
    assert {path.name for path in saved.iterdir()} == names
