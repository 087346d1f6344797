"""The report: its numbers and sentences, nothing from outside, and runs that are half there."""

import base64
import io
import json
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlcs import figures, panels
from rlcs.cli import main
from rlcs.logs import Log
from rlcs.record import Record, before, column, span
from rlcs.report import _short, page_of, report, verdicts
from rlcs.types import Group, Task

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Tags that close what they opened, ids that differ, and where the page would load from."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.sources, self.text, self.used = [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]
        self._attributes(attributes)

    def handle_startendtag(self, tag, attributes):
        self._attributes(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def _attributes(self, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.sources += [found[name] for name in ("src", "href") if name in found]
        self.used += re.findall(r"url\(#([\w-]+)\)", " ".join(value or "" for value in found.values()))


@pytest.fixture(scope="module")
def page(rl_run, sft_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "side.html"
    assert report((rl_run, sft_run), out) == out
    return out.read_text()


def words(page):
    return " ".join("".join(Checker(page).text).split())


def test_the_page_stands_by_itself(page):
    found = Checker(page)
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert len(found.ids) == len(set(found.ids))
    inside = {source[1:] for source in found.sources if source.startswith("#")} | set(found.used)
    assert inside <= set(found.ids)
    assert all(source.startswith(("#", "data:image/")) for source in found.sources)


def test_sentences_say_which_gains_more(page):
    text = words(page)
    assert (
        "At temperature 1, RLCS (rl) gains more: +15.0 ± 1.6 points against +3.3 ± 1.6 of SFT (control); "
        "a difference of +11.7 ± 2.3, 5.1 standard errors." in text
    )
    assert "Greedy, none gains more beyond the error: +6.7 ± 1.6 points of" in text
    assert "control: the same model, evaluated by rl" in text
    assert "rl trained m by RLCS for 2 min 00 s: 4 waves, 48 rollouts, 240 tokens sampled, 160 trained on" in text
    assert "1 step moved nothing" in text and "3 prompts of 3 domains" in text
    assert "control trained m by SFT for 2 min 00 s: 6 optimizer steps, 48 samples, 300 tokens trained on" in text


def test_tables_hold_scores_changes_and_alarms(page):
    for cell in ("60.0 ± 2.0", "30.0 ± 2.0", '<td class="up">+30.0 ± 2.8</td>', '<td class="">-5.0 ± 2.8</td>'):
        assert cell in page, cell
    text = words(page)
    assert re.search(r"video ?duplicates ?3 to 4 ?2 ?40% of the answers are one \(warn\)", text)
    assert re.search(r"run.seed ?0 ?7", text)


def test_every_curve_is_there(page):
    for title in (
        "Before and after, sampled", "Before and after, greedy", "Held-out score over time",
        "Held-out score over rollouts", "Held-out score by domain", "Training reward", "Pass@k", "Valid share",
        "Expansion", "Valid groups of a wave", "Tiers drawn", "Tiers in the ledger", "Pass rate by category",
        "Prompts by category and tier", "Length", "What went wrong", "Reward of forced answers", "Entropy",
        "Clip fractions", "Gradient norm", "Mismatch", "Time of a wave", "Throughput", "Loss",
    ):  # fmt: skip
        assert f"<h4>{title}</h4>" in page, title
    assert page.count("<svg") == page.count("<figure")
    assert ">alarm</text>" in page and ">expansion_ratio_ema</text>" in page


def test_the_gallery_shows_pictures_and_answers_early_and_late(page):
    text = words(page)
    assert "wave 1: 1 of 4 right" in text and "wave 4: 3 of 3 right" in text
    assert "<mark>3</mark>" in page and "&lt;script&gt;alert(4)" in page
    pictures = [base64.b64decode(one) for one in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    sizes = {Image.open(io.BytesIO(one)).size for one in pictures}
    assert (6, 4) in sizes and (12, 4) in sizes  # a picture, and a video's frames side by side
    assert max(size[0] for size in sizes) > 100  # one with boxes, enlarged


def test_a_run_alone(rl_run):
    sampled, greedy = verdicts([Record.read(rl_run)])
    assert sampled == (
        "At temperature 1 the mean held-out score of rl went from 40.0 to 55.0: +15.0 ± 1.6 points, 9.2 standard "
        "errors. Up beyond twice the error: counting +30.0 ± 2.8, grounding +20.0 ± 2.8. "
        "Down beyond twice the error: none."
    )
    assert greedy.startswith("Greedy the mean held-out score of rl went from 50.0 to 56.7: +6.7")


def write(folder, *rows, config=None, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if config is not None:
        (folder / "config.yaml").write_text(json.dumps(config))
    return folder


WAVE = {"kind": "wave", "step": 1, "seconds": 3.0}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([WAVE], "1 wave"),
        ([{**WAVE, "reward": None, "reward/ocr": None, "curriculum/drawn": "many"}], "Nothing was evaluated"),
        ([{**WAVE, "reward": 0.5, "seconds/rollout": 2.0, "curriculum/drawn/easy": 3.0}], "Training reward"),
        ([{"kind": "sft", "step": 1, "seconds": 1.0, "loss": 2.5}], "2.500"),
        ([{"kind": "eval", "step": 0, "seconds": 0.0, "sampled/ocr": 0.5, "sampled/all": 0.5}], "50.0"),
        ([{"kind": "alarm", "step": 1, "seconds": 1.0, "alarm": "odd"}], "odd"),
        ([{"kind": "sft", "step": 1}, {"kind": "eval", "step": 1, "sampled/all": None}], "optimizer step"),
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out(tmp_path, rows, says):
    text = report((write(tmp_path / "run", *rows),)).read_text()
    Checker(text)
    assert says in text and "nan" not in text.lower().replace("nanmean", "")


@pytest.mark.parametrize(
    ("run", "share"),
    [
        ({"steps": 8, "seconds": None}, "25%"),
        ({"steps": 8, "seconds": 1e6}, "25%"),
        ({"steps": 1000, "seconds": 12}, "25%"),
        ({"steps": None, "seconds": None}, "2%"),
    ],
)
def test_a_run_that_goes_on(run, share, tmp_path):
    config = {"tasks": "t", "run": run}
    folder = write(tmp_path / "run", WAVE, {**WAVE, "step": 2}, config=config, tail='{"kind": "wa')
    text = page_of([Record.read(folder)])
    assert f"It still goes on: {share} are behind it." in text and "2 waves" in text


def test_pictures_that_are_gone_are_named(tmp_path):
    folder = write(tmp_path / "run", WAVE)
    (folder / "rollouts").mkdir()
    prompt = [{"type": "image", "image": "gone.png"}, {"type": "image", "image": "https://a.b/c.png"}]
    row = {"task": "t", "domain": "ocr", "prompt": prompt, "truth": "7", "answers": []}
    (folder / "rollouts/000001.jsonl").write_text(json.dumps(row) + "\n")
    text = page_of([Record.read(folder)])
    assert "image not shown: gone.png" in text and "src=" not in text


def test_pictures_are_found_from_another_folder(tmp_path, monkeypatch):
    """Relative paths of a run's data are those of where it was started."""
    (tmp_path / "here/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Image.new("L", (28, 28)).save("data/a.png")
    content = [{"type": "image", "image": "data/a.png"}, {"type": "video", "video": ["data/a.png", "data/a.png"]}]
    task = Task("a", "ocr", ({"role": "user", "content": content},), "7")
    log = Log(Path("runs/one"))
    log.rollouts(1, [Group(task, (), 0)], [], [])
    log.close()
    write(Path("runs/one"), WAVE)
    for place, file in ((".", "data/a.png"), ("..", "here/data/a.png"), ("runs/one", "../../data/a.png")):
        monkeypatch.chdir(tmp_path / "here" / place)
        text = page_of([Record.read(tmp_path / "here/runs/one")])
        assert text.count(f'alt="{file}"') == text.count(f'alt="{file}, {file}"') == 1, place


def test_axes_of_what_is_one_value_or_one_point():
    """No wave 1.975, no share below 0; of a single evaluation the error, and greedy apart from sampled."""
    one, error = np.ones(1), 0.25 * np.ones(1)
    flat = figures.curves("flat", [figures.Series("share", one, 0 * one)], "wave", "share")
    ticks = ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert re.findall(r"<text[^>]*>([^<]+)</text>", flat) == ["1", "wave", *ticks, "share"]
    bells = figures.dumbbells("bells", ["all"], {"run": [(0.0, 0.0, 0.0, 0.0)]}, "points")
    assert "−" not in bells and ">0.8<" in bells.replace("</text>", "<")
    dots = []
    for dashed, found in ((False, None), (False, error), (True, error)):
        svg = figures.curves("dot", [figures.Series("a", one, one, dashed=dashed, error=found)], "x", "y")
        dots.append(svg.count("fill: #3b82f6"))
    assert dots == [1, 3, 2]  # a dot, and the two caps of a bar


def test_where_a_gain_is_counted_from(tmp_path):
    at = {"kind": "eval", "seconds": 0.0, "sampled/all": 0.5}
    cold = write(tmp_path / "cold", {**at, "step": 9})
    model = {"model": {"path": str(cold / "checkpoints/000009")}}
    own = Record.read(write(tmp_path / "own", {**at, "step": 0}, {**at, "step": 5}, config=model))
    late = Record.read(write(tmp_path / "late", {**at, "step": 3}, {**at, "step": 5}, config=model))
    other = Record.read(cold)
    assert before(own, [own, late]) == (own.evals[0], "before the first step")
    assert before(late, [late, own]) == (own.evals[0], "the same model, evaluated by own")
    assert before(late, [late, other]) == (other.evals[-1], "the end of cold, whose model it starts from")
    assert before(late) == (late.evals[0], "the first evaluation, at step 3")
    assert before(other) is None
    begun = Record.read(write(tmp_path / "begun", {**at, "step": 0}, {**WAVE, "step": 7}, config=model))
    (first, last), scored = span(begun, [begun], "sampled", "all"), panels.held_out([begun])
    assert first is not None and first.mean == 0.5 and last is None  # what it has since is not known
    assert "<td>50.0</td><td>–</td>" in page_of([begun]) and not any("Before" in one.title for one in scored)


def test_a_relative_model_is_found_from_any_folder(tmp_path, monkeypatch):
    at = {"kind": "eval", "seconds": 0.0, "step": 9, "sampled/all": 0.5}
    model = "runs/cold/checkpoints/step-000009"
    cold, elsewhere = (Record.read(write(tmp_path / name / "runs/cold", at)) for name in ("lab", "other"))
    config = {"model": {"path": model}, "run": {"out": "runs/rl"}}
    late = Record.read(write(tmp_path / "lab/runs/rl", at, config=config))
    for folder in ("lab", "other", "lab/runs/rl"):
        monkeypatch.chdir(tmp_path / folder)
        assert before(late, [elsewhere, cold]) == (cold.evals[0], "the end of cold, whose model it starts from")
    moved = Record.read(write(tmp_path / "moved", at, config=config))
    monkeypatch.chdir(tmp_path / "lab")  # where it was started is not known: here, perhaps
    assert before(moved, [elsewhere, cold]) == (cold.evals[0], "the end of cold, whose model it starts from")
    assert str(late.model) == model


def test_runs_that_do_not_compare_are_told(tmp_path):
    rows = [{"kind": "eval", "step": step, "seconds": 100.0 * step, "sampled/all": 0.5} for step in (0, 1)]
    config = {"model": {"path": "m"}, "eval": {"limit": 5}}
    one = Record.read(write(tmp_path / "one", *rows, config=config))
    two = Record.read(
        write(tmp_path / "two", rows[0], {**rows[1], "seconds": 50.0}, config={**config, "eval": {"limit": 6}})
    )
    said = verdicts([one, two])
    assert "Training times differ: one 1 min 40 s, two 50 s." in said
    assert any("different settings" in sentence for sentence in said)
    short, alike, long = (
        Record.read(write(tmp_path / f"{rows_at_once}", *rows, config={**config, "rollout": limits}))
        for rows_at_once, most in ((1, 32), (2, 32), (3, 64))
        for limits in [{"max_new_tokens": most, "rows": rows_at_once}]
    )
    assert any("different settings" in sentence for sentence in verdicts([short, long]))
    assert not any("different settings" in sentence for sentence in verdicts([short, alike]))
    assert '<p class="soft">Of one:</p>' in page_of([one, two]) and "Of one:" not in page_of([one])
    assert "Nothing was evaluated before." in page_of([Record.read(write(tmp_path / "late", rows[1]))])


def test_seeds_of_one_setting_are_one_arm(tmp_path):
    """Folders of one name are told apart by the one above."""
    runs = []
    for arm, ends in (("a", (0.7, 0.8, 0.9)), ("b", (0.5, 0.6))):
        for seed, end in enumerate(ends):
            rows = [{"kind": "eval", "step": i, "sampled/all": mean} for i, mean in enumerate((0.5, end))]
            config = {"batch": ord(arm), "run": {"seed": seed}}
            runs.append(write(tmp_path / arm / f"{seed}", *rows, config=config))
    text = words(report(tuple(runs), tmp_path / "all.html").read_text())
    assert (
        "At temperature 1, SFT (a/0, a/1, 2) gains more: +30.0 ± 5.8 points against +5.0 ± 5.0 of SFT (b/0, b/1); "
        "a difference of +25.0 ± 7.6, 3.3 standard errors." in text
    )
    assert "SFT (0, 1, 2): +30.0 ± 5.8 points, 5.2" in words(report(tuple(runs[:3])).read_text())


def test_folders_of_one_name_below_others_of_one_name_are_told_apart(tmp_path):
    runs = []
    for arm, end in (("a", 0.9), ("b", 0.6)):
        rows = [{"kind": "eval", "step": i, "sampled/all": mean} for i, mean in enumerate((0.5, end))]
        runs.append(write(tmp_path / arm / "seed" / "run", *rows, config={"batch": ord(arm)}))
    text = words(report(tuple(runs), tmp_path / "both.html").read_text())
    assert "+40.0 points of SFT (a/seed/run), +10.0 of SFT (b/seed/run)" in text


def test_long_runs_stay_small(tmp_path):
    rows = [{**WAVE, "step": i, "seconds": float(i), "reward": 0.5, "reward/ocr": i / 1e4} for i in range(1, 10_001)]
    record = Record.read(write(tmp_path / "run", *rows))
    (drawn,) = panels.sections(record, "run")["Reward"]
    assert len(drawn.svg) < 100_000


def test_any_name_can_be_drawn():
    names = ["$\\frac{1$", "字" * 400, "W" * 400 + " (50%)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = figures.heatmap("names", np.full((3, 2), 0.5), names, np.arange(2), "wave", "pass rate")
    assert names[0] in svg and "W…W" in svg and "W (50%)" in svg


def test_running_mean_and_thinning_leave_out_what_is_unknown():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(figures.running_mean(values, 3), [1.0, np.nan, 4.0, 4.0])
    thin = figures.thinned(np.r_[np.full(1000, 2.0), np.full(1000, np.nan)])
    assert len(thin) == figures.POINTS and (thin[:200] == 2).all() and np.isnan(thin[201:]).all()
    np.testing.assert_array_equal(column([{"a": True}, {"a": 2}, {}], "a"), [np.nan, 2, np.nan])


def test_phases_of_a_wave_add_up_where_answers_are_made_ahead(tmp_path, monkeypatch):
    phases = {"seconds/update": 4.0, "seconds/rollout": 5.0}
    rows = [{**WAVE, **phases}, {**WAVE, **phases, "step": 2, "seconds/wait": 1.0}]
    monkeypatch.setattr(figures, "stack", lambda name, x, parts, *_, **how: drawn.update({name: parts}))
    drawn = {}
    panels.sections(Record.read(write(tmp_path / "run", *rows)), "run")
    times = drawn["run/Time of a wave"]
    assert np.nansum(list(times.values()), axis=0).tolist() == [9.0, 5.0]


def test_numbers_take_the_unit_that_they_round_to():
    numbers = (0, 9999, 12345, 999_400, 999_600, 1_234_000, 999_700_000)
    assert [_short(x) for x in numbers] == ["0", "9,999", "12.3 k", "999 k", "1 M", "1.23 M", "1 G"]


def test_no_run_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (write(tmp_path / "ledger", WAVE) / "ledger.jsonl").write_text("[1]\n")
    (write(tmp_path / "cut", WAVE) / "ledger.jsonl").write_text("{")
    (write(tmp_path / "config", WAVE) / "config.yaml").write_bytes(b"\xff")
    for arguments, says in (
        (["report", str(tmp_path / "ledger")], "ledger.jsonl must hold objects, got [1]"),
        (["report", str(tmp_path / "cut")], "ledger.jsonl must be JSON lines, got"),
        (["report", str(tmp_path / "config")], "config.yaml must be YAML, got"),
        (["report", str(tmp_path / "none")], "must be a run folder, got nothing"),
        (["report", str(tmp_path / "empty")], "must hold a row of metrics.jsonl, got none"),
        (["report"], "runs must hold a folder, got none"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr().err
        assert end.value.code == 2 and says in said and said.count("\n") == 1


def test_libraries_load_late():
    code = "import sys, rlcs.report, rlcs.show; print({'torch', 'matplotlib', 'PIL', 'rich', 'av'} & set(sys.modules))"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == "set()", found.stderr
