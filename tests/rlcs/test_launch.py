"""What torchrun tells a process by the environment, and what else may stand there."""

import os
import subprocess
import sys

import pytest

from rlcs.launch import local_rank, started_as


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, (0, 1)), ({"RANK": "3"}, (0, 1)), ({"WORLD_SIZE": "1"}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4))],
)
def test_rank_and_size(environment, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_as() == expected


@pytest.mark.parametrize("value", ["", "two", "1.5", "-1", "1e30", "nan", "²", "9" * 20])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_what_is_no_number_of_a_process(name, value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    due = f"parallel: {name} must be a whole number of [01] or more, as torchrun sets it, got"
    with pytest.raises(ValueError, match=due) as error:
        started_as(), local_rank()
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE must be a whole number of 1 or more, as torchrun sets it, got 'many'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of 1 or more, as torchrun sets it, got '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE (2), got 2"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK must be below WORLD_SIZE (1), got 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "RANK, MASTER_ADDR and MASTER_PORT must be as torchrun sets them: "
            "invalid literal for int() with base 10: 'x'",
        ),
    ],
)
def test_the_command_says_it_in_a_line(environment, said):
    """Also where the process would be one that says nothing, or meets no other."""
    command = [sys.executable, "-m", "rlcs.cli", "train", "--help"]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"rlcs: parallel: {said}\n")
