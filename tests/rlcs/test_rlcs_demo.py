"""The demo, in the small: files, runs, report, answer."""

import json
import math
import subprocess
import sys

import pytest

from rlcs import demo
from rlcs.logs import read_metrics

pytestmark = pytest.mark.long


def test_the_demo_goes_from_nothing_to_an_answer(tmp_path, monkeypatch, capsys):
    for name, value in {"COLD_SCANS": 20, "COLD_SAMPLES": 60, "PROMPTS": 60, "HELD_OUT": 2}.items():
        monkeypatch.setattr(demo, name, value)
    out = tmp_path / "demo"
    demo.demo(out, budget=0.1, seed=1)
    page = (out / "report.html").read_text()
    assert "RLCS" in page and "data:image" in page and "http://" not in page.replace("http://www.w3.org", "")
    for run in ("cold", "rlcs", "control"):
        rows = read_metrics(out / run)
        assert rows[-1]["kind"] == "eval" and rows[-1]["greedy/all/tasks"] == 12
    said = capsys.readouterr()
    assert "Read the digits." in said.out and "truth:" in said.out
    assert "[image: " in said.out and "▀" not in said.out  # half blocks are pictures by their colours alone
    assert "points at temperature 1: RLCS" in said.err
    from transformers import Glm4vForConditionalGeneration

    Glm4vForConditionalGeneration.from_pretrained(out / "final")


def test_it_replaces_only_a_demo(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="--out must be empty or an earlier demo"):
        demo.demo(tmp_path)
    with pytest.raises(ValueError, match="--budget must be above 0, got 0"):
        demo.demo(tmp_path / "new", budget=0)
    for name in ("demo.json", "report.html"):  # an earlier demo stays where a new one cannot be
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="--seed must be 0 or more, got -1"):
        demo.demo(tmp_path, seed=-1)
    with pytest.raises(ValueError, match="seconds must be at most"):
        demo.demo(tmp_path, budget=math.inf)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("rlcs", "control", "said"),
    [
        (0.56, 0.5, "RLCS +16.0, continued SFT +10.0: RLCS gains more"),
        (0.5, 0.6, "RLCS +10.0, continued SFT +20.0: the control gains more"),
        (0.52, 0.5, "RLCS +12.0, continued SFT +10.0: none gains more beyond twice the error"),
    ],
)
def test_it_says_which_gains_more(rlcs, control, said, tmp_path, capsys):
    for run, mean in (("cold", 0.4), ("rlcs", rlcs), ("control", control)):
        known = {"all": mean, "all/error": 0.02}
        row = {f"{mode}/{name}": x for mode in ("sampled", "greedy") for name, x in known.items()}
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 1, **row}) + "\n")
    demo._summary(tmp_path)
    assert said in capsys.readouterr().err


def test_help():
    done = subprocess.run([sys.executable, "-m", "rlcs.cli", "demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--budget" in done.stdout
