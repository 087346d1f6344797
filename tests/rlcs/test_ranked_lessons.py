"""Supervised training on several ranks: who decodes which pictures, and what becomes of those that are damaged."""

import json
import shutil

import pytest
from ranked_runs import cold_config, cut_to, expect_close, expect_equal, rows_of, run_job, tensors_of
from small_runs import with_damaged_pictures
from worlds import in_worlds

from rlcs import parallel
from rlcs.supervised import Lessons

pytestmark = pytest.mark.long


def noting_job(config, *, folder):
    """A run that notes for each step which samples have pictures, and which of these have been decoded here."""
    noted, take = [], Lessons.take

    def taken(self):
        samples, prompts = take(self)
        values = [(prompt.pixel_values, prompt.pixel_values_videos) for prompt in prompts]
        decoded = [i for i, both in enumerate(values) if any(x is not None for x in both)]
        noted.append(([i for i, prompt in enumerate(prompts) if prompt.patches], decoded))
        return samples, prompts

    Lessons.take = taken
    try:
        run_job(config, folder=folder)
    finally:
        Lessons.take = take
    (folder / f"noted-{parallel.size()}-{parallel.rank()}").write_text(json.dumps(noted))


@pytest.mark.parametrize(("damaged", "workers"), [(False, 0), (True, 1)])
def test_a_rank_decodes_what_it_learns_from(damaged, workers, demo, tmp_path):
    """Damaged pictures are left out by all ranks, which see it in a rank's decoding alone, and the run is the same."""
    data = demo / "train-answers.jsonl"
    if damaged:
        with_damaged_pictures(demo, tmp_path)
        data = shutil.copy(data, tmp_path / "answers.jsonl")
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1 " * 3000}]
        with data.open("a") as more:
            more.write(json.dumps({"messages": turns}) + "\n")  # longer than the context
    several, alone = (
        cold_config(demo, tmp_path / name, steps=4, data=data, bad_rows="skip", workers=workers if name == "2" else 0)
        for name in ("2", "1")
    )
    in_worlds([(2, noting_job, (several,))], tmp_path)
    noting_job(alone, folder=tmp_path)
    expected = rows_of(tmp_path / "1")
    assert (expected[-1]["samples"] > 4 * alone.batch) == damaged
    expect_close(rows_of(tmp_path / "2"), expected)
    whole, *each = (json.loads((tmp_path / f"noted-{name}").read_text()) for name in ("1-0", "2-0", "2-1"))
    for (pictured, decoded), *by_rank in zip(whole, *each, strict=True):
        assert decoded == pictured and all(seen == pictured for seen, _ in by_rank)
        assert sorted(by_rank[0][1] + by_rank[1][1]) == pictured
    assert all(any(decoded for _, decoded in of_rank) for of_rank in each)


@pytest.mark.slow
def test_a_run_that_decodes_ahead_is_taken_up_to_the_bit(demo, tmp_path):
    """Samples that were on their way when a checkpoint was written come again, and damaged ones don't."""
    with_damaged_pictures(demo, tmp_path)
    data = shutil.copy(demo / "train-answers.jsonl", tmp_path / "answers.jsonl")
    how = {"steps": 5, "data": data, "bad_rows": "skip", "workers": 1, "ahead": 9}
    whole, cut = (cold_config(demo, tmp_path / name, **how) for name in ("whole", "cut"))
    in_worlds([(2, run_job, (whole,))], tmp_path)
    cut_to(tmp_path / "whole", tmp_path / "cut", 2)
    in_worlds([(2, run_job, (cut,))], tmp_path)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    expect_equal(tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "whole"))
