"""Data in shards: one order over workers and ranks, taken up anywhere, in bounded memory, with what is bad left out."""

import base64
import codecs
import dataclasses
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import weakref
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import sft_config, train_config

from glm4v import Processor
from glm4v.image import Picture
from rlcs import checkpoint, evaluate, shards
from rlcs.data import read_tasks
from rlcs.engines.media import video_bytes
from rlcs.failures import told
from rlcs.feed import Feed, WorkerDied
from rlcs.logs import _shown, read_metrics
from rlcs.prompts import Prompts
from rlcs.record import Record, pictures
from rlcs.rewards import Verdict
from rlcs.shards import BadRows, files_of, rows_of
from rlcs.stream import Stream, from_memory, shared
from rlcs.supervised import Lessons, Making, Samples, sft
from rlcs.trainer import Trainer, train

COUNTS = (13, 1, 40, 9)  # rows of the files


def write(folder, counts=COUNTS, suffix="jsonl"):
    """Files of rows that count on."""
    folder.mkdir(exist_ok=True)
    start = 0
    for name, count in zip("dbca", counts, strict=True):
        rows = [{"n": start + i} for i in range(count)]
        if suffix == "jsonl":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table(folder / f"{name}.parquet", rows)
        start += count
    return folder


def table(path, rows, group=8):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def fatal():
    return BadRows("fatal", 0, print)


def stream(path, buffer=7, seed=3, items_of=lambda row: [row.content()["n"]], bad=None):
    return Stream(files_of(path), items_of, buffer, seed, bad or fatal())


def taken(items, count):
    return [item for item, _ in islice(items, count)]


# --- order ---


@pytest.mark.parametrize("buffer", [1, 7, 63, 500])
def test_a_pass_has_every_row_once_and_the_next_another_order(buffer, tmp_path):
    total = sum(COUNTS)
    found = taken(stream(write(tmp_path / "data"), buffer).behind({}), 3 * total)
    passes = [found[i * total : (i + 1) * total] for i in range(3)]
    assert all(sorted(one) == list(range(total)) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert taken(stream(tmp_path / "data", buffer).behind({}), total) == passes[0]
    assert taken(stream(tmp_path / "data", buffer, seed=4).behind({}), total) != passes[0]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("source", ["stream", "memory"])
def test_ranks_together_take_the_order_of_one(source, world, tmp_path):
    data = stream(write(tmp_path / "data"))

    def items():
        return data.behind({}) if source == "stream" else from_memory(range(63), 3, {})

    rounds = 160 // world
    one = list(islice(items(), rounds * world))
    ranks = [list(islice(shared(items(), rank, world), rounds)) for rank in range(world)]
    together = [item for turn in zip(*ranks, strict=True) for item, _ in turn]
    assert together == [item for item, _ in one]
    for turn, (_, position) in zip(zip(*ranks, strict=True), one[world - 1 :: world], strict=True):
        assert all(place == position for _, place in turn)  # any rank's checkpoint is everybody's


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_it_goes_on_behind_every_position(suffix, tmp_path):
    data = stream(write(tmp_path / "data", suffix=suffix))
    whole = list(islice(data.behind({}), 150))
    for at in (0, 1, 6, 7, 8, 50, 62, 63, 64, 100, 126, 140):
        position = json.loads(json.dumps(whole[at - 1][1])) if at else {}
        assert list(islice(data.behind(position), 150 - at)) == whole[at:], at


def test_both_formats_and_a_pattern_are_one_order(tmp_path):
    lines = taken(stream(write(tmp_path / "lines")).behind({}), 63)
    assert taken(stream(write(tmp_path / "tables", suffix="parquet")).behind({}), 63) == lines
    assert taken(stream(tmp_path / "lines" / "*.jsonl").behind({}), 63) == lines
    one = tmp_path / "lines" / "c.jsonl"
    assert sorted(taken(stream(one).behind({}), 40)) == list(range(14, 54))
    assert [row.number for row in rows_of(one, 38)] == [39, 40]
    assert [row.number for row in rows_of(tmp_path / "tables" / "c.parquet", 13)] == list(range(14, 41))


@pytest.mark.parametrize("path", ["empty", "none-*.jsonl"])
def test_no_files_are_an_error_that_names_the_place(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"data: {tmp_path}/{path.replace('*', '.')}"):
        files_of(tmp_path / path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        taken(stream(tmp_path / "none.jsonl").behind({}), 1)


# --- memory ---


class Held:
    """Something that counts how many of it there are."""

    live: ClassVar = weakref.WeakSet()

    def __init__(self, n):
        self.n = n
        Held.live.add(self)

    @classmethod
    def count(cls):
        return len(cls.live)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_no_more_than_the_buffer_is_held(suffix, tmp_path):
    write(tmp_path / "data", (900, 700, 1, 800), suffix)
    most, n = 0, None
    for item, _ in islice(
        stream(tmp_path / "data", 50, items_of=lambda row: [Held(row.content()["n"])]).behind({}), 4800
    ):
        n, item = item.n, None
        most = max(most, Held.count())
    gc.collect()
    assert 0 < most <= 50 + 1 and n is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_what_one_process_makes_and_no_more_ahead(workers, tmp_path):
    data = write(tmp_path / "data")

    def run(count, ahead=3):
        found, drawn, most = [], [], 0
        items = (drawn.append(item) or (item, position) for item, position in stream(data).behind({}))
        feed = Feed(make_square, count, ahead)
        for item, made, position in islice(feed(items), 40):
            found.append((item, str(made) if isinstance(made, ValueError) else made, position))
            most = max(most, len(drawn) - len(found))
        feed.close()
        return found, most

    alone, held = run(0)
    assert held == 0 and sum(isinstance(made, str) for _, made, _ in alone) > 1
    together, held = run(workers)
    assert together == alone and 0 < held <= 3 * workers


def make_square(n):
    if n % 10 == 7:
        raise ValueError(f"{n} is bad")
    return n * n


def end_at_20(n):
    if n == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def test_a_worker_that_is_killed_is_one_line():
    feed = Feed(end_at_20, 1, 2)
    with pytest.raises(WorkerDied, match="data: a worker must live as long as the run, got one that was") as error:
        list(islice(feed(from_memory(range(40), 0, {})), 80))
    feed.close()
    said = told("sft", error.value)
    assert "\n" not in said and "Lower --workers or --ahead; what was saved is kept" in said


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    (tmp_path / "trainer.py").write_text(
        "import os\n"
        "from rlcs.feed import Feed\n"
        "def number(_): return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for _, made, _ in Feed(number, 1)((i, None) for i in range(10 ** 9)): print(made, flush=True)\n"
    )
    trainer = subprocess.Popen([sys.executable, tmp_path / "trainer.py"], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / trainer.stdout.readline().strip()
    assert worker.exists()
    trainer.kill()
    trainer.stdout.close()
    trainer.wait()
    deadline = time.monotonic() + 60
    while worker.exists() and (worker / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what is bad ---


def test_bad_rows_of_every_kind_are_named_and_left_out_to_a_limit(tmp_path):
    data = write(tmp_path / "data")
    lines = (data / "c.jsonl").read_text().splitlines()
    lines[3], lines[5], lines[7] = "{", "[1]", '{"m": 1}'
    (data / "c.jsonl").write_text("\n".join([*lines, ""]))
    table(tmp_path / "whole.parquet", [{"n": 100 + i} for i in range(64)])
    content = (tmp_path / "whole.parquet").read_bytes()
    (data / "e.parquet").write_bytes(content[: len(content) // 2])
    notes = []

    def items_of(row):
        if "n" not in (found := row.content()):
            raise ValueError("n must be there")
        return [found["n"]]

    bad = BadRows("skip", 4, notes.append)
    found = taken(stream(data, items_of=items_of, bad=bad).behind({}), 2 * 60)
    assert sorted(found[:60]) == sorted(found[60:]) == sorted(set(range(63)) - {17, 19, 21})
    places = sorted(note.removeprefix(f"data: {data}/") for note in notes)
    assert [place.partition(":")[0] for place in places] == [
        "c.jsonl, line 4", "c.jsonl, line 6", "c.jsonl, line 8", "e.parquet",
    ]  # fmt: skip
    assert places[3].startswith("e.parquet: cannot be read")
    with pytest.raises(ValueError, match=r"bad rows must be at most 3 \(--max-bad-rows\), got one more: .*: "):
        taken(stream(data, items_of=items_of, bad=BadRows("skip", 3, notes.append)).behind({}), 63)
    with pytest.raises(ValueError, match=rf"data: {data}/c.jsonl, line [468]: |data: {data}/e.parquet: cannot"):
        taken(stream(data, items_of=items_of).behind({}), 63)


def test_a_table_that_breaks_in_the_middle_gives_what_stands_before(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    table(path, [{"n": i, "text": rng.bytes(400).hex()} for i in range(64)])
    content = bytearray(path.read_bytes())
    content[len(content) * 5 // 8 : len(content) * 6 // 8] = bytes(len(content) * 6 // 8 - len(content) * 5 // 8)
    path.write_bytes(content)
    notes = []
    found = taken(stream(path, 16, bad=BadRows("skip", 1, notes.append)).behind({}), 64)
    assert len(set(found)) >= 32 and "cannot be read behind row" in notes[0] and str(path) in notes[0]


def test_nothing_good_in_a_pass_ends_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n[]\n")
    with pytest.raises(ValueError, match="a pass over the files must hold a good row, got none"):
        taken(stream(tmp_path, bad=BadRows("skip", 9, print)).behind({}), 1)


def test_without_pyarrow_a_table_is_an_error_that_says_so(tmp_path, monkeypatch):
    write(tmp_path / "data", suffix="parquet")
    monkeypatch.setattr(shards, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="data: pyarrow must be installed to read Parquet: pip install pyarrow"):
        files_of(tmp_path / "data")


# --- training from it ---


def sharded(demo, folder, suffix="jsonl"):
    """The demo's answers in three files; in tables with the pictures' bytes."""
    rows = [json.loads(line) for line in (demo / "train-answers.jsonl").read_text().splitlines()]
    folder.mkdir()
    for i in range(3):
        part = rows[i::3]
        if suffix == "jsonl":
            (folder / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            found = []
            for row in part:
                question, answer = row["messages"]
                kinds, text = [one["type"] for one in question["content"]], question["content"][-1]["text"]
                if "video" in kinds:
                    continue
                paths = [one["image"] for one in question["content"][:-1]]
                messages = [{"role": "user", "content": "<image>" * len(paths) + text}, answer]
                images = [{"bytes": (demo / path).read_bytes(), "path": path} for path in paths]
                found.append({"messages": messages, "images": images})
            table(folder / f"{i}.parquet", found)
    if suffix == "jsonl":
        os.symlink(demo / "train", folder / "train")
    return folder


def weights(folder):
    saved = checkpoint.latest(folder / "checkpoints")
    return {**load_file(saved.folder / "model.safetensors"), **saved.tensors()}


def rows_of_run(folder):
    return [
        {name: x for name, x in row.items() if "seconds" not in name and "per_s" not in name}
        for row in read_metrics(folder)
    ]


@pytest.mark.parametrize(("suffix", "workers"), [("jsonl", 0), ("parquet", 0), ("jsonl", 1)])
def test_a_run_on_a_stream_is_taken_up_bitwise(suffix, workers, demo, tmp_path):
    data = sharded(demo, tmp_path / "data", suffix)

    def run(name):
        config = sft_config(demo, tmp_path / name, data=data, buffer=10, workers=workers)
        sft(config)

    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:06d}")
    run("cut")
    assert rows_of_run(tmp_path / "cut") == rows_of_run(tmp_path / "whole")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


def test_samples_are_the_same_over_workers(demo, tmp_path):
    """Here and in another process, bit for bit."""
    data = sharded(demo, tmp_path / "data")
    processor = Processor.from_pretrained(demo / "model")
    made = []
    for workers in (0, 2):
        config = sft_config(demo, tmp_path / "run", data=data, buffer=16, workers=workers)
        lessons = Lessons(config, fatal())
        lessons.start({}, Making(Prompts(processor), Samples(processor, True, (2,)), demo / "model", config.tokens))
        made.append(lessons.take(12))
        lessons.close()
    for (a, p), (b, q) in zip(zip(*made[0], strict=True), zip(*made[1], strict=True), strict=True):
        assert (a.token_ids == b.token_ids).all() and (a.trained == b.trained).all() and a.source == b.source
        for name, value in vars(p).items():
            other = getattr(q, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("buffer", [None, 10])
def test_a_picture_that_is_damaged_is_left_out_in_the_middle_of_a_run(buffer, demo, tmp_path, capfd):
    data = sharded(demo, tmp_path / "data")
    (data / "train").unlink()
    shutil.copytree(demo / "train", data / "train")
    path = next(path for path in sorted((data / "train").glob("*.png")))
    path.write_bytes(path.read_bytes()[:-30])
    steps = 12  # of 6 samples: more than a pass
    config = sft_config(demo, tmp_path / "run", data=data, buffer=buffer, bad_rows="skip")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=steps, save_every=0))
    sft(config)
    said = "".join(capfd.readouterr().err.split())
    assert said.count(path.name) == 1 and "line" in said
    assert read_metrics(tmp_path / "run")[-1]["step"] == steps
    with pytest.raises(ValueError, match=rf"data: {data}/\d.jsonl, line \d+: image: .*{path.name}"):
        sft(dataclasses.replace(config, bad_rows="fatal", run=dataclasses.replace(config.run, out=tmp_path / "f")))
    with pytest.raises(ValueError, match="bad rows must be at most 0"):
        sft(dataclasses.replace(config, max_bad_rows=0, run=dataclasses.replace(config.run, out=tmp_path / "g")))


def with_pictures_inside(demo, folder, suffix):
    """The demo's tasks about pictures, which stand in the rows."""
    found = []
    for line in (demo / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        *pictures, text = row["messages"][0]["content"]
        if any(part["type"] == "video" for part in pictures):
            continue
        files = [(demo / part["image"]).read_bytes() for part in pictures]
        if suffix == "jsonl":
            urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
            content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), text]
            found.append({**row, "messages": [{"role": "user", "content": content}]})
        else:
            content = "<image>" * len(files) + text["text"]
            images = [{"bytes": file, "path": None} for file in files]
            found.append({**row, "messages": [{"role": "user", "content": content}], "images": images})
    path = folder / f"tasks.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(codecs.BOM_UTF8 + "\n".join(json.dumps(row) + "\n" for row in found).encode())
    else:
        table(path, found, 20)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pictures_that_stand_in_tasks_are_read_when_they_are_needed(suffix, demo, tmp_path, monkeypatch):
    path = with_pictures_inside(demo, tmp_path, suffix)
    monkeypatch.setattr(shards, "BATCH", 7)
    opened = []
    monkeypatch.setattr(shards, "_batches", lambda *how, real=shards._batches: opened.append(how) or real(*how))
    tasks = read_tasks(path)
    assert len(tasks) > 30 and len(pickle.dumps(tasks)) < 500 * len(tasks)
    known = {task.id: task for task in read_tasks(demo / "train.jsonl")}
    before = len(opened)
    order = [*tasks, *reversed(tasks), *tasks[::9]]
    for i, task in enumerate(order):
        (message,) = task.messages
        assert len(task.messages) == 1 and task.messages[0] == message
        expected = known[task.id].messages[0]["content"]
        assert len(message["content"]) == len(expected) and message["content"][-1] == expected[-1]
        for part, other in zip(message["content"][:-1], expected[:-1], strict=True):
            assert Picture(part["image"]).pixels(28, 28).tolist() == Picture(other["image"]).pixels(28, 28).tolist()
        if i == len(tasks) - 1:
            assert len(opened) - before == (suffix == "parquet")  # in their order it is one pass
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{path}, (line|row) \d+: "):
        list(tasks[0].messages), list(tasks[-1].messages)


@pytest.mark.parametrize(("suffix", "workers"), [("jsonl", 0), ("parquet", 1)])
def test_waves_are_the_same_wherever_pictures_stand(suffix, workers, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "verify", lambda domain, text, *_: Verdict("score", float(len(text) % 2)))
    path = with_pictures_inside(demo, tmp_path, suffix)
    ids = {task.id for task in read_tasks(path)}
    lines = [line for line in (demo / "train.jsonl").read_text().splitlines() if json.loads(line)["id"] in ids]
    os.symlink(demo / "train", tmp_path / "train")
    (tmp_path / "files.jsonl").write_text("\n".join(lines))
    rows = []
    for tasks, count in ((path, workers), (tmp_path / "files.jsonl", 0)):
        config = train_config(demo, tmp_path / tasks.stem, tasks=tasks, workers=count)
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2)))
        rows.append(rows_of_run(tmp_path / tasks.stem))
    assert [str(row) for row in rows[0]] == [str(row) for row in rows[1]]  # NaN is not NaN
    for folder in (tmp_path / "tasks", tmp_path / "files"):  # and they are shown alike
        shown = [pictures(group, folder) for group in Record.read(folder).groups(1)]
        assert all(kind == "image" and file.exists() for group in shown for kind, (file,) in group)


def test_what_stands_in_no_file_is_shown_from_one(demo, tmp_path):
    (tmp_path / "pictures").mkdir()
    png = next((demo / "train").glob("*.png")).read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    for i, image in enumerate((png, url)):
        shown = _shown({"type": "image", "image": image}, tmp_path, "a", i)
        assert shown == {"type": "image", "image": f"pictures/a-{i}.png"}
        assert Picture(str(tmp_path / shown["image"])).pixels(9, 9).tolist() == Picture(png).pixels(9, 9).tolist()
    shown = _shown({"type": "video", "video": [png, url, png]}, tmp_path, "b", 0)
    one, three = Picture(png), Picture(str(tmp_path / shown["image"]))
    assert (three.width, three.height) == (3 * one.width, one.height)
    film = video_bytes([Picture(png).pixels(28, 28)] * 3)[0]
    for i, video in enumerate((film, f"data:video/mp4;base64,{base64.b64encode(film).decode()}")):
        shown = _shown({"type": "video", "video": video}, tmp_path, "c", i)
        assert shown == {"type": "video", "video": f"pictures/c-{i}.mp4"}
        assert (tmp_path / shown["video"]).read_bytes() == film


def test_tasks_stand_in_several_files(demo, tmp_path):
    lines = (demo / "train.jsonl").read_text().splitlines()
    data = tmp_path / "tasks"
    data.mkdir()
    os.symlink(demo / "train", data / "train")
    for i in range(3):
        (data / f"{i}.jsonl").write_text("\n".join(lines[i::3]) + "\n")
    assert sorted(task.id for task in read_tasks(data)) == sorted(task.id for task in read_tasks(demo / "train.jsonl"))
    assert len(Trainer(train_config(demo, tmp_path / "run", tasks=data / "[01].jsonl")).tasks) == 32
    (data / "2.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match=rf"2.jsonl, line 1: id must be another than that of {data}/0.jsonl, line 1"):
        read_tasks(data)
