"""A conversation on a terminal: what a line does, what becomes of its files, how it goes on after what is wrong."""

import dataclasses
import io

import pytest

from glm4v import Glm4v, Processor
from glm4v.chat import Chat

pytestmark = pytest.mark.long


@pytest.fixture
def model(tiny_checkpoint):
    model = Glm4v.from_pretrained(tiny_checkpoint)
    model.processor = Processor.from_pretrained(tiny_checkpoint, allow_network=True)
    return model


@pytest.fixture
def chat(model):
    def run(*lines):
        waiting = iter(lines)

        def ask(_):
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line() if callable(line) else line

        talk = Chat(model, "Be brief.", ask, seed=0, max_new_tokens=4)
        talk.run()
        return talk

    return run


def test_chat(chat, photo, capsys):
    talk = chat("Hello", f"/image '{photo}'", "What?", "", "/think", "/help")
    out, err = capsys.readouterr()
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [part["type"] for part in talk.messages[3]["content"]] == ["image", "text"]
    assert out.splitlines()[-1] == talk.messages[4]["content"].splitlines()[-1]
    assert "image" in err and "tokens" in err and err.count("/quit") == 2


def test_chat_survives_what_is_wrong_with_a_line(chat, photo, capsys):
    talk = chat(
        "/image nowhere.jpg", f"/video {__file__}", "/bogus", f"/image {photo}", "/reset", "Hi", "/quit", "never"
    )
    err = capsys.readouterr().err
    assert "image: nowhere.jpg: no such file" in err
    assert "video: " in err
    assert "/bogus is not a command" in err
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert len(talk.messages[1]["content"]) == 1


def test_chat_gives_up_a_file_that_turns_out_to_be_damaged(chat, photo, capsys):
    photo.write_bytes(photo.read_bytes()[:2000])  # the header is whole
    talk = chat(f"/image {photo}", "What?", "Hi")
    err = capsys.readouterr().err
    assert err.count("cannot be read") == 1
    assert [message["content"] for message in talk.messages[1:2]] == [[{"type": "text", "text": "Hi"}]]


def test_chat_keeps_the_files_that_are_sound(chat, photo, film, capsys):
    bad = photo.with_name("bad.jpg")
    bad.write_bytes(photo.read_bytes()[:2000])  # the header is whole
    talk = chat(f"/image {photo}", f"/image {bad}", f"/video {film()}", "What?", "\udcff", "What?")
    err = capsys.readouterr().err
    assert err.count("it is dropped") == 1 and "bad.jpg: cannot be read" in err and "text must be Unicode" in err
    assert [part["type"] for part in talk.messages[1]["content"]] == ["image", "video", "text"]


def test_chat_says_what_a_file_adds(chat, model, photo, film, capsys):
    """To the next question, whatever stands before it: the picture's tokens and the two around them."""
    chat("Hello", f"/image {photo}", f"/video {film()}")
    image, video = (int(line.split()[-2]) for line in capsys.readouterr().err.splitlines() if line.endswith(" tokens"))
    picture = model.processor.measure("image", photo)
    assert image == picture.height * picture.width // 28**2 + 2
    parts = [{"type": "text", "text": "?"}, {"type": "video", "video": film()}]
    alone, with_film = ([{"role": "user", "content": parts[:count]}] for count in (1, 2))
    assert video == model.processor.count_tokens(with_film) - model.processor.count_tokens(alone)


def test_chat_takes_no_more_than_the_context_holds(chat, model, photo, capsys):
    text = dataclasses.replace(model.config.text_config, max_position_embeddings=80)
    model.processor.config = dataclasses.replace(model.config, text_config=text)
    talk = chat(f"/image {photo}", f"/image {photo}", "What?")
    assert "prompt: tokens must be at most 80, the model's, got " in capsys.readouterr().err
    assert [part["type"] for part in talk.messages[1]["content"]] == ["image", "text"]


def test_chat_opens_a_file_once(chat, photo, film, photos, capsys, monkeypatch):
    """Later turns know the pictures of earlier ones, whatever has become of the files."""
    moving, asked = film(), []

    def respond(url, timeout):
        asked.append(url)
        response = io.BytesIO(image)
        response.length = None  # not announced
        return response

    def gone():
        photo.unlink()
        moving.unlink()
        return "And?"

    image = photo.read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", respond)
    files = [f"/image {photo}", f"/video {moving}", "/image https://example.org/photo.jpg"]
    talk = chat(*files, "What?", gone, "And?")
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", *["user", "assistant"] * 3] and len(asked) == 1
    assert [part["type"] for part in talk.messages[1]["content"]] == ["image", "video", "image", "text"]


def test_ctrl_c_stops_what_is_attached(chat, photo, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("glm4v.image.Picture.__init__", interrupted)
        during.setattr("glm4v.video.Film.__init__", interrupted)
        talk = chat(f"/image {photo}", f"/video {photo}", lambda: during.undo() or "Hi")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert capsys.readouterr().err.count("stopped") == 2 and talk.files == []


def test_an_interrupted_turn_is_forgotten(chat, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("glm4v.Glm4v.stream", interrupted)
    talk = chat("Hello")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert "stopped" in capsys.readouterr().err
