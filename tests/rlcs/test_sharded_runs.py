"""Training from data in shards: taken up bitwise, the same over workers and wherever pictures stand."""

import base64
import codecs
import dataclasses
import json
import os
import pickle
import shutil

import pytest
import torch
from small_runs import sft_config, table, train_config, weights

from glm4v import Processor
from glm4v.image import Picture
from rlcs import evaluate, shards
from rlcs.data import read_tasks
from rlcs.engines.media import video_bytes
from rlcs.logs import _shown, read_metrics
from rlcs.prompts import Prompts
from rlcs.record import Record, pictures
from rlcs.rewards import Verdict
from rlcs.shards import BadRows
from rlcs.supervised import Lessons, Making, Samples, sft
from rlcs.trainer import Trainer, train

pytestmark = pytest.mark.long


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
        config = sft_config(demo, tmp_path / "run", data=data, buffer=16, workers=workers, batch=12)
        lessons = Lessons(config, BadRows("fatal", 0, print))
        lessons.start({}, Making(Prompts(processor), Samples(processor, True, (2,)), demo / "model", config.tokens))
        made.append(lessons.take())
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


@pytest.mark.parametrize("buffer", [None, 4])
def test_pictures_that_are_all_damaged_end_a_run(buffer, demo, tmp_path):
    shutil.copytree(demo / "train", tmp_path / "train")
    for path in (tmp_path / "train").glob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    rows = (demo / "train-answers.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([row for row in rows if ".png" in row and '"video"' not in row][:6]))
    with pytest.raises(ValueError, match=r"rows.jsonl must hold a good row, got none"):
        sft(sft_config(demo, tmp_path / "run", data=tmp_path / "rows.jsonl", buffer=buffer, bad_rows="skip"))


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
    film = video_bytes([Picture(png).pixels(28, 28)] * 3, fps=24)[0]
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
