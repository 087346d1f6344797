"""`rlcs verify`: its table, its exit codes, users' verifiers and users' cases."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rlcs.rewards import kit

PATHS = str(Path(__file__).parents[2] / "python")


def rlcs(*arguments, path=""):
    command = [sys.executable, "-m", "rlcs.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": f"{PATHS}:{path}", "COLUMNS": "120"}
    )


def test_the_verifiers_pass_their_own_cases():
    done = rlcs("verify", "--domain", "grounding", "--domain", "counting")
    assert done.returncode == 0, done.stderr
    assert "grounding" in done.stdout and "counting" in done.stdout and "math" not in done.stdout


def test_a_user_s_verifier_and_cases(tmp_path):
    (tmp_path / "mine.py").write_text("def generous(answer, truth, question): return 1.0\n")
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"domain": "own", "answer": "a", "truth": "b", "expect": 0}) + "\n")
    done = rlcs("verify", "--verifier", "mine:generous", "--cases", str(cases), path=str(tmp_path))
    assert done.returncode == 1 and "1.000 in place of 0.000" in done.stdout


def test_bad_input_is_one_line(tmp_path):
    cases = tmp_path / "cases.jsonl"
    cases.write_text('{"domain": "math"}\n')
    (empty := tmp_path / "empty.jsonl").write_text("\n")
    lost = tmp_path / "lost.jsonl"
    lost.write_text(json.dumps({"domain": "foo:bar", "answer": "a", "truth": "b", "expect": 0}) + "\n")
    unloaded = "rewards: verifier foo:bar cannot be loaded: ModuleNotFoundError: No module named 'foo'"
    for arguments, text in (
        (["--cases", str(cases)], f"{cases}:1: a case needs domain, answer, truth and expect"),
        (["--domain", "maths"], "--domain must be one of"),
        (["--cases", str(empty)], f"{empty}: must hold a case, got none"),
        (["--cases", str(tmp_path / "none")], "No such file"),
        (["--verifier", "foo:bar"], unloaded),
        (["--verifier", "math:sqrt"], "--verifier must come with --cases of its own, or with the --domain"),
        (["--cases", str(lost)], unloaded),
    ):
        done = rlcs("verify", *arguments)
        assert done.returncode == 2 and text in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"domain": ["ocr"]}, "domain must be a text, got ['ocr']"),
        ({"answer": 3}, "answer must be a text, got 3"),
        ({"truth": None}, "truth must be a text, got None"),
        ({"expect": "1"}, "expect must be a number from 0 to 1, got '1'"),
        ({"expect": math.nan}, "expect must be a number from 0 to 1, got nan"),
        ({"expect": True}, "expect must be a number from 0 to 1, got True"),
    ],
)
def test_a_case_that_is_none_is_named(change, said, tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"domain": "ocr", "answer": "a", "truth": "a", "expect": 1, **change}) + "\n")
    with pytest.raises(ValueError) as error:
        kit.read_cases(path)
    assert str(error.value) == f"{path}:1: {said}"


def test_help():
    assert "verify" in rlcs("--help").stdout and "--cases" in rlcs("verify", "--help").stdout


@pytest.mark.parametrize("arguments", [["verify", "--domain", "counting"], ["plan", "--help"], ["--help"]])
def test_a_full_disk_is_told_once(arguments):
    environment = {"PYTHONPATH": PATHS}  # and no PYTHONUNBUFFERED: what is left in a buffer counts at exit
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rlcs.cli", *arguments]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "rlcs: [Errno 28] No space left on device\n")


def test_python_says_nothing_of_answers_that_it_reads():
    answers = ["5x(1)", "1if x else y", "f(a='\\\\d')", "[1, 2, '\\\\d', 4]"]
    program = "from rlcs.rewards import kit, verify\n" + "\n".join(
        f"verify({domain!r}, kit.respond({answer!r}), 'W()')"
        for answer in answers
        for domain in ("gui_os", "grounding")
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=120
    )
    assert (done.stderr, done.returncode) == ("", 0)
