"""Data in shards: one order over workers and ranks, taken up anywhere, in bounded memory, with what is bad left out."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from small_runs import table, wait_for_the_end_of

from rlcs import shards
from rlcs.failures import told
from rlcs.feed import Feed, WorkerDied
from rlcs.shards import BadRows, files_of, rows_of
from rlcs.stream import Stream, from_memory, shared

pytestmark = pytest.mark.long

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


def test_a_signal_to_the_whole_group_ends_no_worker_that_is_only_beginning():
    feed = Feed(make_square, 1, 2)

    def items():
        yield 3, None
        for process in feed._pool._processes:
            os.kill(process, signal.SIGINT)
            os.kill(process, signal.SIGTERM)
        yield 4, None

    assert [made for _, made, _ in feed(items())] == [9, 16]
    feed.close()


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
    wait_for_the_end_of(worker)


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
