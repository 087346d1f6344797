"""Files of a run are there whole or not at all, and the ledger as often as a checkpoint."""

import dataclasses
import errno
import io
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from small_runs import groups_of, tasks_of, train_config

from rlcs import evaluate, files
from rlcs.curriculum import Curriculum
from rlcs.logs import Log
from rlcs.progress import Bar
from rlcs.record import Record, pictures
from rlcs.trainer import Trainer, train


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_ledger_is_on_the_disk_before_it_has_its_name(suffix, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: done.append(str(b)) or replace(a, b))
    path = tmp_path / f"ledger.{suffix}"
    Curriculum(["a", "b"]).ledger.export(path)
    assert done == [f"{path}.part", str(path), str(tmp_path)]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_older_file(tmp_path):
    path = tmp_path / "there" / "file"
    files.write_text(path, "one")
    with pytest.raises(OSError, match="full"), files.whole(path) as part:
        part.write_text("tw")
        raise OSError("full")
    assert path.read_text() == "one" and [one.name for one in path.parent.iterdir()] == ["file"]


def test_a_full_disk_says_which_file_it_has_no_room_for(tmp_path):
    with pytest.raises(OSError) as error, files.whole(tmp_path / "page.html"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does
    assert str(error.value) == f"[Errno 28] No space left on device: '{tmp_path}/page.html'"


def test_a_log_says_which_of_its_files_has_no_room(tmp_path, monkeypatch):
    log = Log(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does

    for part, name in (("_file", "metrics.jsonl"), ("_board", "tensorboard")):
        with monkeypatch.context() as patch:
            patch.setattr(log, part, SimpleNamespace(write=fail, add_scalar=fail))
            with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/{name}'"):
                log.write("sft", 1, 0.0, {"loss": 1.0})
    log.close()


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("rlcs.run.load_model", lambda *_: pytest.fail("the model was read"))
    (file := tmp_path / "file").write_text("")
    said = "must be a folder that can be written, got"
    for out, got in ((file, "a file$"), (file / "run", f"a file: {file}$")):
        with pytest.raises(ValueError, match=f"^run: {out} {said} {got}"):
            train(train_config(demo, out))
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # who runs this may write everywhere
    with pytest.raises(ValueError, match=f"{said} one that is read-only: {tmp_path}$"):
        train(train_config(demo, tmp_path / "new" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_or_a_folder_is_not_replaced_by_a_file(tmp_path):
    """Neither is a device: who may, would make a file of /dev/null."""
    (folder := tmp_path / "folder").mkdir()
    os.mkfifo(pipe := tmp_path / "pipe")
    for path, kind in ((folder, "a folder"), (pipe, "a device or a pipe")):
        for write in (files.expect_writable, lambda path: files.write_text(path, "text")):
            with pytest.raises(ValueError, match=f"{path} must be a file, got {kind}"):
                write(path)
    assert pipe.is_fifo() and folder.is_dir() and len(list(tmp_path.iterdir())) == 2


def test_a_link_stays_one(tmp_path):
    (there := tmp_path / "there").mkdir()
    (link := tmp_path / "link").symlink_to(there / "file")
    for text in ("one", "two"):
        files.write_text(link, text)
        assert link.is_symlink() and (there / "file").read_text() == text
    assert len(list(there.iterdir())) == 1


def test_a_picture_of_a_prompt_is_written_anew_where_it_was_cut_off(tmp_path, monkeypatch):
    picture = np.full((28, 28, 3), 7, dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    task = dataclasses.replace(tasks_of()[0], messages=[{"role": "user", "content": content}])
    log = Log(tmp_path)

    def cut_off(image, path, *rest):
        path.write_bytes(b"half")
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", cut_off)
        with pytest.raises(OSError, match="full"):
            log.rollouts(1, groups_of([task], 1), [], [])
    log.rollouts(1, groups_of([task], 1), [], [])
    log.close()
    ((_, [file]),) = pictures(Record(tmp_path, "run", [], {}).groups(1)[0], tmp_path)
    assert np.array_equal(np.asarray(Image.open(file)), picture)


def test_the_ledger_is_exported_with_every_checkpoint(demo, tmp_path):
    config = train_config(demo, tmp_path / "run")
    trainer = Trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=9)))
    with Bar("test") as bar:
        trainer.wave(bar)
    trainer._save()
    rows = Record(tmp_path / "run", "run", [], {}).ledger
    assert rows == json.loads(json.dumps(trainer.curriculum.ledger.rows())) and any(row["rollouts"] for row in rows)


def test_a_stopped_run_has_its_ledger(demo, tmp_path, monkeypatch):
    config = train_config(demo, tmp_path / "run")
    trainer = Trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=0)))
    wave = trainer.wave
    monkeypatch.setattr(trainer, "wave", lambda bar: (setattr(trainer.run_, "asked", signal.SIGINT), wave(bar))[1])
    with pytest.raises(KeyboardInterrupt, match="step 1 is saved"):
        trainer.run()
    assert (tmp_path / "run" / "ledger.jsonl").exists()
    train(config)


def test_scores_that_cannot_be_written_are_refused_before_anything_is_answered(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("answers were made"))
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path, "must be a file, got a folder"), (tmp_path / "file" / "scores.json", "File exists")):
        with pytest.raises((ValueError, OSError), match=said):
            evaluate.evaluate_files(demo / "model", demo / "test.jsonl", out=out)
    unknown = evaluate.Score("ocr", "greedy", 0.5, math.nan, 1, 0.0, 0.0, 7.0)  # an error by one task
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: [unknown])
    out = tmp_path / "new" / "scores.json"
    evaluate.evaluate_files(demo / "model", demo / "test.jsonl", out=out)
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
    (row,) = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert row["mean"] == 0.5 and row["error"] is None
    console = Console(width=99, record=True, file=io.StringIO())
    console.print(evaluate.table([unknown]))
    said = console.export_text()
    assert "0.500" in said and "–" in said and "nan" not in said


def test_scores_that_cannot_be_written_after_all_are_printed(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: [evaluate.Score("ocr", "greedy", 0.5, 0.1, 9, 0.0, 0.0, 7.0)])

    def write_text(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(evaluate, "write_text", write_text)
    with pytest.raises(OSError, match="No space left"):
        evaluate.evaluate_files(demo / "model", demo / "test.jsonl", out=tmp_path / "scores.json")
    assert "0.500" in capsys.readouterr().out
