"""Data as people have it: byte order marks, other encodings, ids that stand twice, every spelling of a picture."""

import dataclasses
import gzip
import json

import pytest
from small_runs import sft_config

from glm4v import Processor
from rlcs.admission import check_tasks
from rlcs.data import read_rows, read_tasks
from rlcs.prompts import make
from rlcs.rollout import RolloutSettings
from rlcs.shards import BadRows, Row
from rlcs.supervised import read_lessons, sft

TASK = {"id": "a", "domain": "ocr", "truth": "1", "messages": [{"role": "user", "content": "Grüße?"}]}


def write(path, *rows, encoding="utf-8"):
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode(encoding) for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = write(tmp_path / "tasks.jsonl", {**TASK, "id": "b"}, TASK, encoding="utf-8-sig")
    path.write_bytes(path.read_bytes().replace(b"\n\xef\xbb\xbf", b"\r\n"))
    assert [task.id for task in read_tasks(path)] == ["b", "a"]
    assert read_tasks(path)[0].messages[0]["content"] == "Grüße?"


def test_what_is_not_utf8_is_named_or_left_out(tmp_path):
    latin = json.dumps({**TASK, "id": "b"}, ensure_ascii=False).encode("latin-1")
    path = write(tmp_path / "tasks.jsonl", TASK, latin, {**TASK, "id": "c"})
    said = rf"data: {path}, line 2: must be UTF-8, got byte 0xfc at {latin.index(0xFC) + 1}"
    with pytest.raises(ValueError, match=said):
        read_tasks(path)
    notes = []
    assert [task.id for task in read_tasks(path, "skip", notes.append)] == ["a", "c"]
    assert len(notes) == 1 and "line 2" in notes[0]
    with pytest.raises(ValueError, match="line 1: must be UTF-8"):
        read_rows(write(tmp_path / "wide.jsonl", json.dumps(TASK).encode("utf-16")), Row.content, "fatal")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(TASK, indent=1).encode(), "line 1: must be a JSON object, all in one line, got Expecting property"),
        (json.dumps(TASK).encode() + b",", "line 1: must be a JSON object, all in one line, got Extra data at "),
        (json.dumps([TASK]).encode(), "line 1: must be a JSON object, got list"),
        (gzip.compress(json.dumps(TASK).encode()), "must be JSON lines or end in .parquet, got gzip"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "must be JSON lines or end in .parquet, got a pointer of Git LFS",
        ),
        (b"PAR1", "must be JSON lines or end in .parquet, got Parquet by another name"),
    ],
)
def test_what_is_not_json_lines_is_told_what_it_must_be(content, said, tmp_path):
    (path := tmp_path / "tasks.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tasks(path)
    assert str(error.value).startswith(f"data: {path}") and said in str(error.value)


def test_a_path_that_leads_nowhere_is_told_what_it_must_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"data: {tmp_path}/none must be a file, a folder or a pattern"):
        read_tasks(tmp_path / "none")


def test_an_id_that_stands_twice_is_a_bad_row(tmp_path):
    path = write(tmp_path / "tasks.jsonl", TASK, {**TASK, "id": "b"}, {**TASK, "truth": "2"})
    said = "line 3: id must be another than that of line 1, got 'a' again"
    with pytest.raises(ValueError, match=said):
        read_tasks(path)
    notes = []
    tasks = read_tasks(path, "skip", notes.append)
    assert [(task.id, task.truth) for task in tasks] == [("a", "1"), ("b", "1")]
    assert len(notes) == 1 and said in notes[0]


@pytest.mark.parametrize(
    "spelt",
    [
        lambda path: {"type": "image", "image": path},
        lambda path: {"type": "image", "url": path},
        lambda path: {"type": "image", "path": path},
        lambda path: {"type": "image", "image": None, "path": path},
        lambda path: {"type": "image_url", "image_url": path},
        lambda path: {"type": "image_url", "image_url": {"url": path, "detail": "low"}},
    ],
)
def test_a_picture_lies_beside_its_file_however_it_is_spelt(spelt, demo, tmp_path):
    picture = next((demo / "train").glob("*.png"))
    (tmp_path / "here.png").write_bytes(picture.read_bytes())

    def task(path):
        messages = [{"role": "user", "content": [spelt(path), {"type": "text", "text": "Read."}]}]
        return read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, "messages": messages}))[0]

    assert task("here.png").messages[0]["content"][0] == {"type": "image", "image": str(tmp_path / "here.png")}
    assert make(task("here.png").messages, Processor.from_pretrained(demo / "model")).patches
    (tmp_path / "a:b.png").write_bytes(picture.read_bytes())
    assert task("a:b.png").messages[0]["content"][0]["image"] == str(tmp_path / "a:b.png")
    assert task(picture.as_uri()).messages[0]["content"][0]["image"] == picture.as_uri()
    assert task("https://example.org/a.png").messages[0]["content"][0]["image"] == "https://example.org/a.png"
    with pytest.raises(ValueError, match=r"line 1: none\.png must be a file, got none at "):
        task("none.png")


@pytest.mark.parametrize(
    "part", [{"type": ["image"]}, {"type": "image", "image": {"bytes": "x"}}, {"type": "image", "image_url": "a"}, {}]
)
def test_parts_that_are_none_are_left_to_the_processor(part, demo, tmp_path):
    messages = [{"role": "user", "content": [part]}]
    (task,) = read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, "messages": messages}))
    with pytest.raises(ValueError, match="prompt: message 1: a part must be"):
        make(task.messages, Processor.from_pretrained(demo / "model"))


def content_of(tmp_path, *content, **pictures):
    """Content of a task's one message as `read_tasks` gives it; URLs are not looked for."""
    messages = [{"role": "user", "content": list(content)}]
    (task,) = read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, "messages": messages, **pictures}))
    return task.messages[0]["content"]


A, B, C = (f"https://a.b/{name}.png" for name in "abc")
QUESTION = {"type": "text", "text": "q"}


@pytest.mark.parametrize(
    "mark", [{"type": "image"}, {"type": "image", "image": None, "text": None}, {"type": "image_url"}]
)
def test_a_picture_part_without_a_source_stands_for_the_next_of_images(mark, tmp_path):
    content = content_of(tmp_path, QUESTION, mark, QUESTION, mark, images=[A, B])
    assert [part.get("image", part.get("text")) for part in content] == ["q", A, "q", B]
    assert {part["type"] for part in content} == {"text", "image"}
    for images, found in (([], "fewer"), ([A], "fewer"), ([A, B, C], "1 more")):
        said = f"line 1: images must be as many as <image> marks and image parts without a source, got {found}"
        with pytest.raises(ValueError, match=said):
            content_of(tmp_path, mark, mark, images=images)


def test_a_video_part_without_a_source_keeps_its_settings(tmp_path):
    content = content_of(tmp_path, {"type": "video", "fps": 2}, {"type": "image", "image": A}, QUESTION, videos=[B])
    assert content == [{"type": "video", "fps": 2, "video": B}, {"type": "image", "image": A}, QUESTION]


@pytest.mark.parametrize("named", [{"type": "image", "image": A}, {"type": "image_url", "image_url": {"url": A}}])
def test_pictures_that_parts_name_and_images_list_too_are_a_bad_row(named, tmp_path):
    said = "line 1: images must be left out where parts of the content name their pictures, got 1 beside them"
    for images in ([A], [B]):
        with pytest.raises(ValueError, match=said):
            content_of(tmp_path, named, QUESTION, images=images)
    with pytest.raises(ValueError, match="line 1: videos must be left out"):
        content_of(tmp_path, {"type": "video", "video": [A, B], "fps": 1}, QUESTION, videos=[C])
    # Nothing is doubtful where all that is listed has its mark.
    assert [part["image"] for part in content_of(tmp_path, named, {"type": "image"}, images=[B])] == [A, B]


@pytest.mark.parametrize(
    ("row", "message", "said"),
    [
        ({"image": A}, {}, "image must be a list named images, got 'https://"),
        ({"video": "a.mp4"}, {}, "video must be a list named videos, got 'a.mp4'"),
        *(({}, {name: [A]}, f"pictures must be parts of a content .*, got {name}") for name in ("images", "video")),
    ],
)
def test_pictures_under_another_name_are_a_bad_row(row, message, said, tmp_path):
    """Nobody would be shown them."""
    messages = [{"role": "user", "content": "Read.", **message}]
    with pytest.raises(ValueError, match=f"line 1: {said}"):
        read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, "messages": messages, **row}))
    nothing = dict.fromkeys(row, ""), dict.fromkeys(message)
    messages = [{"role": "user", "content": "Read.", **nothing[1]}]
    assert read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, "messages": messages, **nothing[0]}))


def test_pictures_without_a_text_to_stand_before_are_a_bad_row(tmp_path):
    row = {**TASK, "messages": [{"role": "user", "content": None}], "images": ["https://a.b/c.png"]}
    with pytest.raises(ValueError, match=r"line 1: content must be text or a list of parts, got NoneType"):
        read_tasks(write(tmp_path / "tasks.jsonl", row))


@pytest.mark.parametrize("token", ["<|image|>", "<|begin_of_video|>"])
def test_tokens_of_pictures_in_an_answer_are_refused_with_their_line(token, demo, tmp_path):
    def row(asked, answered):
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}

    path = write(tmp_path / "data.jsonl", row(f"What is {token}?", "A token."), row("What?", f"It is {token}."))
    config = sft_config(demo, tmp_path / "run", data=path, batch=1)
    with pytest.raises(ValueError) as error:
        read_lessons(config, BadRows("fatal", 0, print))
    said = f"line 2: an answer must be without tokens of pictures, which have none there, got {token}"
    assert str(error.value) == f"data: {path}, {said}"
    run = dataclasses.replace(config.run, steps=1)
    notes = []
    sft(dataclasses.replace(config, bad_rows="skip", run=run), notes.append)  # the question's is text
    assert sum(said in note for note in notes) == 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"truth": "\ud83d"}, "truth must be Unicode"),
        ({"category": "\ud83d"}, "category must be Unicode"),
        ({"question": "\ud83d"}, "question must be Unicode"),
        ({"attempts": 10**400}, "attempts must be from 1 to"),
    ],
)
def test_what_no_file_or_number_can_hold_is_said_with_its_row(change, part, tmp_path):
    row = {"id": "a", "domain": "math", "truth": "5", "messages": [{"role": "user", "content": "x"}], "pass_rate": 0.5}
    (tmp_path / "t.jsonl").write_text(json.dumps({**row, **change}))
    with pytest.raises(ValueError, match=rf"t.jsonl, line 1: {part}"):
        read_tasks(tmp_path / "t.jsonl")


def test_half_an_emoji_in_an_answer_is_a_bad_row(demo, tmp_path):
    def row(answer):
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}

    path = write(tmp_path / "data.jsonl", row("fine"), json.dumps(row("half \ud83d")).encode())
    with pytest.raises(ValueError, match="line 2: an answer must be Unicode, got half a pair of UTF-16 in 'half "):
        read_lessons(sft_config(demo, tmp_path / "run", data=path), BadRows("fatal", 0, print))


@pytest.mark.parametrize("name", ["truth", "category", "tier", "pass_rate", "images", "messages"])
def test_a_line_about_a_value_is_short(name, tmp_path):
    with pytest.raises(ValueError, match=f"line 1: {name} must be") as error:
        read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, name: {"data": "iVBORw0KGgo" * 999}}))
    assert len(str(error.value)) < 400


def test_what_stands_in_place_of_messages_is_named(demo, tmp_path):
    """Data sets of other trainers, in their form."""
    talk = [("human", "Read."), ("gpt", "1")]
    rows = (
        ({"conversations": talk}, "messages must be a list of objects .*, got none beside conversations"),
        ({"messages": [{"role": role, "content": text} for role, text in talk]}, "got messages of human, gpt"),
    )
    for row, said in rows:
        path = write(tmp_path / "data.jsonl", row)
        with pytest.raises(ValueError, match=f"line 1: .*{said}"):
            read_lessons(sft_config(demo, tmp_path / "run", data=path), BadRows("fatal", 0, print))
    row = {**TASK, "messages": rows[1][0]["messages"], "images": [A]}
    with pytest.raises(ValueError, match="images must belong to a user's message, got messages of human, gpt"):
        read_tasks(write(tmp_path / "tasks.jsonl", row))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_an_answer_that_is_learned_is_a_bad_row(name, demo, tmp_path):
    """The answer would be learned without it."""
    ask = {"role": "user", "content": "q"}
    first, last = ({"role": "assistant", "content": text, name: thought} for text, thought in (("a", "Hm."), ("b", "")))

    def lessons(*messages, **settings):
        path = write(tmp_path / "data.jsonl", {"messages": messages})
        config = sft_config(demo, tmp_path / "run", data=path, **settings)
        return [lesson.answer for lesson in read_lessons(config, BadRows("fatal", 0, print))]

    assert lessons(ask, last) == ["b"]
    assert lessons(ask, first, ask, last, turns="last") == ["b"]  # of earlier answers the history keeps none
    said = f"line 1: an assistant's thinking must stand in the content, as <think>.*, got {name} beside it"
    with pytest.raises(ValueError, match=said):
        lessons(ask, first, ask, last)


def test_a_picture_in_base64_without_its_scheme_is_a_bad_row(tmp_path):
    """Its name is too long for the file system, which is no reason to end a run that leaves out bad rows."""
    picture = {**TASK, "id": "b", "images": ["iVBORw0KGgo" * 999]}
    path, notes = write(tmp_path / "tasks.jsonl", TASK, picture), []
    assert [task.id for task in read_tasks(path, "skip", notes.append)] == ["a"]
    assert (
        len(notes) == 1 and "line 2: iVBORw0KGgo" in notes[0] and "must be a file" in notes[0] and len(notes[0]) < 400
    )


@pytest.mark.parametrize("content", ["", [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_a_bad_row(content, demo, tmp_path):
    """It would teach to say nothing."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    path = write(tmp_path / "data.jsonl", {"messages": messages})
    with pytest.raises(ValueError, match=r"line 1: an assistant's content must be a text .*, got an empty one"):
        read_lessons(sft_config(demo, tmp_path / "run", data=path), BadRows("fatal", 0, print))


def test_parts_of_text_are_one_answer(demo, tmp_path):
    def lessons(answer):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        path = write(tmp_path / "data.jsonl", {"messages": messages})
        return read_lessons(sft_config(demo, tmp_path / "run", data=path), BadRows("fatal", 0, print))

    texts = ["<think>a</think>", "<answer>b", "</answer>"]
    (joined,) = lessons([{"type": "text", "text": text} for text in texts])
    (whole,) = lessons("".join(texts))
    assert joined.answer == whole.answer == "".join(texts)
    for other, said in (
        ({"type": "image", "image": A}, "a part of type 'image'"),
        ({"type": "thinking", "thinking": "a"}, "a part of type 'thinking'"),
        ({"text": "a"}, "a part of type None"),
        ({"type": "text", "text": 3}, "{'text': 3, 'type': 'text'}"),
        ("b", "'b'"),
    ):
        with pytest.raises(ValueError) as error:
            lessons([{"type": "text", "text": "a"}, other])
        said = f"line 1: an assistant's content must be a text or parts of text, got {said}"
        assert str(error.value).endswith(said)
    for nothing in (None, [], 3):
        with pytest.raises(
            ValueError, match=r"an assistant's content must be a text or parts of text, got (None|\[\]|3)"
        ):
            lessons(nothing)
    with pytest.raises(ValueError, match=r"an answer must be without tokens of pictures, .* got <\|image\|>"):
        lessons([{"type": "text", "text": "<|ima"}, {"type": "text", "text": "ge|>"}])  # in the seam


BOX = '{{"action_type": "click", "box_2d": [[{}]]}}'


@pytest.mark.parametrize(
    ("domain", "truth", "part"),
    [
        ("counting", "a few", "counting: truth must be a whole number, got 'a few'"),
        ("grounding", "there", "grounding: truth must be boxes"),
        ("grounding", "[100,100,1920,1080]", "coordinates are per mille, 0 to 1000), got 0 of 1 boxes"),
        ("grounding", "[[10,10,20,20],[30,30,30,40]]", "got 1 of 2 boxes"),
        ("gui_os", "click here", "gui: truth must be an action"),
        ("gui_android", BOX.format("100,100,1080,1920"), "got click: 0.00"),
        (
            "math",
            "<|begin_of_box|>1<|end_of_box|> <|begin_of_box|>2<|end_of_box|>",
            "truth must hold at most one box, got 2",
        ),
    ],
)
def test_a_truth_that_no_answer_can_meet_is_refused_before_the_run(domain, truth, part, demo, tmp_path):
    path = write(tmp_path / "tasks.jsonl", TASK, {**TASK, "id": "b", "domain": domain, "truth": truth})
    tasks, processor, notes = read_tasks(path), Processor.from_pretrained(demo / "model"), []
    with pytest.raises(ValueError) as error:
        check_tasks(tasks, RolloutSettings(), processor)
    assert str(error.value).startswith("data: task 'b': ") and part in str(error.value)
    assert check_tasks(tasks, RolloutSettings(), processor, BadRows("skip", 1, notes.append)) == tasks[:1]
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("domain", "truth"),
    [
        ("counting", "three"), ("grounding", "[0,0,1000,1000]"), ("gui_web", "CLICK(point=(1,2))"), ("gui_os", "W()"),
        ("gui_android", BOX.format("1,2,30,40")), ("math", "a few"), ("ocr", ""), ("video", "[100,100,1920,1080]"),
        ("counting", "<think>a</think><answer><|begin_of_box|>3<|end_of_box|></answer>"),
    ],
)  # fmt: skip
def test_truths_that_an_answer_can_meet_are_kept(domain, truth, demo, tmp_path):
    tasks = read_tasks(write(tmp_path / "tasks.jsonl", {**TASK, "domain": domain, "truth": truth}))
    assert check_tasks(tasks, RolloutSettings(), Processor.from_pretrained(demo / "model")) == tasks
