"""Task makers: the cold start's own responses score 1 with the verifiers, and held-out scans stay held out."""

import hashlib
from itertools import islice

import numpy as np
import pytest

from rlcs.rewards import verify
from rlcs.tasks import FULL, LEVELS, make_tasks
from rlcs.tasks.canvas import CELL, scans

DOMAINS = list(FULL)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_made_response_is_worth_everything_and_another_nothing(domain, level):
    made = list(make_tasks(12, seed=level, makers={domain: FULL[domain]}, levels=range(level, level + 1)))
    truths = {task.truth for task, _ in made}
    assert len(truths) > 1 or level == 1
    for task, response in made:
        verdict = verify(task.domain, response, task.truth, task.question)
        assert (verdict.outcome, verdict.score) == ("score", 1.0), (task, verdict)
        for other in truths - {task.truth}:
            assert verify(task.domain, response.replace(task.truth, other), task.truth, task.question).score < 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_pictures_are_whole_cells_of_scans(domain):
    for task, _ in make_tasks(10, seed=0, makers={domain: FULL[domain]}):
        *pictures, text = task.messages[0]["content"]
        assert text == {"type": "text", "text": task.question} and pictures
        for part in pictures:
            pixels = part[part["type"]]
            assert pixels.dtype == np.uint8 and pixels.shape[-1] == 3
            assert pixels.shape[-3] % CELL == 0 and pixels.shape[-2] % CELL == 0


def test_tasks_follow_the_seed_and_ids_differ():
    one, two, other = (list(make_tasks(24, seed=s)) for s in (1, 1, 2))
    assert [t.truth for t, _ in one] == [t.truth for t, _ in two] != [t.truth for t, _ in other]
    assert len({t.id for t, _ in [*one, *other]}) == 48
    assert {t.category.split()[0] for t, _ in one} == {"ocr", "counting", "arithmetic", "chart", "grounding", "video"}


def test_held_out_scans_are_in_no_training_task():
    def digest(cell):
        return hashlib.sha256(cell.tobytes()).digest()

    (train, _), (test, labels) = scans("train"), scans("test")
    assert len(train) == 1397 and len(test) == 400 and set(labels) == set(range(10))
    known = {digest(scan) for scan in train}
    for task, _ in make_tasks(12, seed=0, split="test", makers={"ocr": FULL["ocr"]}):
        row = task.messages[0]["content"][0]["image"][..., 0]
        assert not any(digest(np.ascontiguousarray(cell)) in known for cell in np.split(row, row.shape[1] // CELL, 1))


def test_a_small_cold_start_sees_few_scans():
    few = {scan.tobytes() for scan in scans("train")[0][:100]}
    for task, _ in make_tasks(12, seed=0, makers={"ocr": FULL["ocr"]}, scan_count=100):
        row = task.messages[0]["content"][0]["image"][..., 0]
        assert all(np.ascontiguousarray(cell).tobytes() in few for cell in np.split(row, row.shape[1] // CELL, 1))


def test_errors():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        list(islice(make_tasks(0, seed=0), 1))
    with pytest.raises(ValueError, match="split must be train or test, got 'dev'"):
        list(make_tasks(1, seed=0, split="dev"))
