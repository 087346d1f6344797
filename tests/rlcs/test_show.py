"""Waves in the terminal: what is chosen, what is printed, pictures in half blocks."""

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rlcs import gallery
from rlcs.cli import main
from rlcs.pictures import FRAMES, blocks, data_uri, opened
from rlcs.record import Record
from rlcs.show import chosen, plain, print_group, show


def test_the_last_wave_is_shown(rl_run, capsys):
    show(rl_run)
    said = capsys.readouterr().out
    assert said.startswith("rl, wave 4: 3 tasks\n")
    for part in (
        "counting, easy, recorded",
        "Say count.",
        "truth: 3",
        "● score, 1.00, 5 tokens",
        "● error",
        "count-0.png",
    ):
        assert part in said, part
    assert "<|begin_of_box|>3<|end_of_box|>" in said.replace("\n", "").replace("  ", "")


def test_a_terminal_without_these_signs(rl_run, monkeypatch):
    """They are spelled out; an evaluation of hours would else end in an error of its table."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as end:
        main(["show", str(rl_run)])
    said = sys.stdout.buffer.getvalue()
    assert end.value.code == 0 and b"truth: 3" in said and b"\\u25cf score, 1.00, 5 tokens" in said


def test_choices(rl_run, capsys):
    show(rl_run, step=1, domain="counting", only="forced", limit=1)
    said = capsys.readouterr().out
    assert said.count("● wrong, 0.00, forced, 5 tokens: not 3") == 2 and "●" in said
    assert "● format" not in said and "grounding" not in said
    show(rl_run, step=1, only="format", limit=2)
    said = capsys.readouterr().out
    assert said.startswith("rl, wave 1: 3 tasks, the first 2") and said.count("● format, 0.00, 5 tokens: no box") == 2
    assert chosen(Record.read(rl_run).groups(1), None, "error") == []


def test_what_a_terminal_would_obey_is_spelled_out(rl_run, capsys):
    show(rl_run, step=1, only="wrong")
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\\x1b[2J" in said
    assert plain("a\x1b]0;b\x07\n\u202ec") == "a\\x1b]0;b\\x07\n\\u202ec"


def test_pictures_are_half_blocks_where_there_are_colours(rl_run):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=80)
    group = next(g for g in Record.read(rl_run).groups(4) if g["domain"] == "counting")
    print_group(console, group, group["answers"], rl_run)
    said = file.getvalue()
    assert said.count("38;2;255;0;0;48;2;0;0;255m" + "▀" * 6) == 2  # 4 × 6 pixels, red over blue


def test_a_wide_picture_fits_and_an_odd_row_is_doubled():
    picture = Image.fromarray(np.full((9, 200, 3), 7, np.uint8))
    rows = blocks(picture, 50).plain.splitlines()
    assert rows == ["▀" * 50] and len(blocks(picture, 400).plain.splitlines()) == 5
    assert picture.size == (200, 9)


def test_videos_are_frames_side_by_side(tmp_path):
    stills = []
    for i in range(3):
        stills.append(tmp_path / f"{i}.png")
        Image.new("RGB", (10, 8), (80 * i, 0, 0)).save(stills[-1])
    strip = np.asarray(opened("video", stills, (400, 400)))
    assert strip.shape == (8, 34, 3) and strip[0, 0, 0] == 0 and strip[0, -1, 0] == 160
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 12 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    film = opened("video", [tmp_path / "film.mp4"], (4000, 400))
    assert film.size == (32 * FRAMES + 2 * (FRAMES - 1), 16)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_greys_of_sixteen_bits_are_shown_as_the_model_sees_them(ending, tmp_path):
    grey = np.arange(24, dtype=np.uint16).reshape(4, 6) * 10
    file = tmp_path / f"scan.{ending}"
    Image.fromarray(grey * 257).save(file)
    for kind, files in (("image", [file]), ("video", [file, file])):
        shown = np.asarray(opened(kind, files, (40, 40)))
        assert np.array_equal(shown[:, :6], np.repeat(grey[..., None], 3, -1))


def test_pictures_are_made_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    picture = opened("image", [tmp_path / "large.png"], (480, 320))
    assert picture.size == (480, 320) and data_uri(picture).startswith("data:image/jpeg;base64,")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (
        ("text.png", "cannot be read as a picture"),
        ("none.png", "No such file"),
        ("none.mp4", "No such file"),
    ):
        with pytest.raises(ValueError, match=says):
            opened("video" if name.endswith("4") else "image", [tmp_path / name], (9, 9))


def test_as_a_page(rl_run, capsys):
    show(rl_run, step=2, domain="video", html=True)
    path = Path(capsys.readouterr().out.strip())
    assert path == rl_run / "rollouts" / "000002.html"
    page = path.read_text()
    assert "data:image/png;base64," in page and "<h1>rl, wave 2: 1 task</h1>" in page
    assert page.count('class="answer') == 4 and "Say count" not in page and "http" not in page
    assert Record.read(rl_run).steps_shown == [1, 2, 3, 4]


def test_the_box_that_was_judged_is_drawn(tmp_path, monkeypatch):
    """Not one that stands in the thinking."""
    drawn = []
    monkeypatch.setattr(gallery, "framed", lambda picture, boxes, *_: drawn.append(boxes) or picture)
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    text = "<think>{}</think><answer>{}</answer>".format(*(f"<|begin_of_box|>{[i] * 4}<|end_of_box|>" for i in (1, 2)))
    group = {
        "domain": "grounding",
        "prompt": [{"type": "image", "image": str(tmp_path / "a.png")}],
        "truth": "[3,3,3,3]",
    }
    gallery.card([(1, {**group, "answers": [{"text": text, "outcome": "score", "score": 1}]})], tmp_path)
    assert drawn == [[(3, 3, 3, 3)], [(3, 3, 3, 3)], [(2, 2, 2, 2)]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--step", "40"], "step must be one of 1-4 of"),
        (["--domain", "music"], "domain must be one of counting, grounding, video in this wave, got music"),
        (["--limit", "0"], "limit must be 1 or more, got 0"),
    ],
)
def test_errors_are_one_line(rl_run, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        main(["show", str(rl_run), *flags])
    said = capsys.readouterr().err
    assert end.value.code == 2 and says in said and said.count("\n") == 1


def test_a_run_without_rollouts(sft_run):
    with pytest.raises(ValueError, match="must hold rollouts, got none"):
        show(sft_run)
