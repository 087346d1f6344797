"""The benchmarks' harness, by its command lines, since tests don't import the bench. No time is asserted."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "bench" / "README.md").read_text()


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "COLUMNS": "200"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def pytest_bench(*arguments, cwd=ROOT):
    return run("pytest", "bench", "-p", "no:cacheprovider", "--quick", *arguments, cwd=cwd)


def row(name, work, seconds, rounds=20, noise=0.02, **changes):
    """A made-up benchmark: rounds of each peer around ``seconds``."""
    draw = np.random.default_rng(len(name))
    found = {peer: (median * (1 + noise * draw.standard_normal(rounds))).tolist() for peer, median in seconds.items()}
    facts = {
        "op": "made", "case": name, "group": "made bf16", "dtype": "bfloat16", "threads": 2, "flops": work,
        "bytes": work, "ceiling_gflops": 100.0, "ceiling_gbs": 10.0, "median_s": seconds, "rounds_s": found,
        "peak_mib": dict.fromkeys(seconds, 3),
    }  # fmt: skip
    return {"name": name, "fullname": f"bench/bench_made.py::bench_{name}", "extra_info": {**facts, **changes}}


def results(path, *rows, **machine):
    facts = {"hardware": "a machine", "threads": 2, "isa": "avx2", "versions": {"torch": "2"}}
    ceilings = {
        "peak_gflops": {"bfloat16": 100.0},
        "product_gflops": {"bfloat16": 80.0},
        "bandwidth_gbs": {"65536": 50.0, "268435456": 10.0},
    }
    run = {
        "machine_info": {**facts, "command": "pytest bench", **machine},
        "commit_info": {"id": "abcdef", "dirty": True},
        "ceilings": ceilings,
        "benchmarks": list(rows),
    }
    path.write_text(json.dumps(run))
    return path


# --- compare ----------------------------------------------------------------------------------------------------------


def compare(tmp_path, a, b, *options, **machine):
    files = results(tmp_path / "a.json", *a), results(tmp_path / "b.json", *b, **machine)
    return run("bench", "compare", *files, *options)


def lines_of(done, *names):
    return [next(line for line in done.stdout.splitlines() if re.search(rf"\W{name}\W", line)) for name in names]


def test_slower_beyond_the_noise_is_a_regression(tmp_path):
    a = [row(name, 1e6, {"glm4v_ext": 1e-3, "torch": 2e-3}) for name in ("same", "slow", "fast", "little", "noisy")]
    times = {"same": 1e-3, "slow": 1.3e-3, "fast": 0.7e-3, "little": 1.02e-3}
    b = [row(name, 1e6, {"glm4v_ext": seconds, "torch": 2e-3}) for name, seconds in times.items()]
    b.append(row("noisy", 1e6, {"glm4v_ext": 1.1e-3, "torch": 2e-3}, noise=0.5))
    done = compare(tmp_path, a, b)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "5 rows, 1 slower by more than 5%" in done.stdout
    slow, fast, *others = lines_of(done, "slow", "fast", "same", "little", "noisy")
    assert "slower" in slow and "faster" in fast and not [line for line in others if "er │" in line]
    ratio, low, high = (float(x) for x in re.search(r"([+-][\d.]+)% \(([+-][\d.]+)% to ([+-][\d.]+)%\)", slow).groups())
    assert 25 < low < ratio < high < 35
    order = [done.stdout.index(f" {name} ") for name in ("slow", "little", "same", "fast")]
    assert order == sorted(order)
    assert compare(tmp_path, a, b, "--threshold", "0.5").returncode == 0


def test_a_run_is_no_regression_of_itself(tmp_path):
    rows = [row(f"case{i}", 1e6, {"glm4v_ext": 1e-3}) for i in range(30)]
    assert compare(tmp_path, rows, rows).returncode == 0
    done = compare(tmp_path, rows, rows, "--relative")
    assert done.returncode == 2 and done.stderr.endswith("must find a baseline that both runs have, got none\n")
    with_baseline = row("with [red]", 1e6, {"glm4v_ext": 1e-3, "torch": 2e-3})
    done = compare(tmp_path, [rows[0], with_baseline], [rows[0], with_baseline], "--relative")
    assert done.returncode == 0 and "1 rows" in done.stdout and "made: with [red] " in done.stdout
    assert "No baseline in both runs: bench/bench_made.py::bench_case0\n" in done.stdout


def test_a_drift_of_the_machine_is_taken_out(tmp_path):
    a = [row("drift", 1e6, {"glm4v_ext": 1e-3, "torch": 2e-3}), row("worse", 1e6, {"glm4v_ext": 1e-3, "torch": 2e-3})]
    b = [row("drift", 1e6, {"glm4v_ext": 2e-3, "torch": 4e-3}), row("worse", 1e6, {"glm4v_ext": 3e-3, "torch": 4e-3})]
    assert "2 slower" in compare(tmp_path, a, b).stdout
    done = compare(tmp_path, a, b, "--relative")
    assert done.returncode == 1 and "1 slower" in done.stdout
    drift, worse = lines_of(done, "drift", "worse")
    assert "slower" in worse and "slower" not in drift


def test_what_cannot_be_compared_is_said(tmp_path):
    a = [row("both", 1e6, {"glm4v_ext": 1e-3}, rounds=2), row("old", 1e6, {"glm4v_ext": 1e-3})]
    b = [row("both", 1e6, {"glm4v_ext": 9e-3}, rounds=2), row("new", 1e6, {"glm4v_ext": 1e-3})]
    done = compare(tmp_path, a, b, threads=1)
    assert done.returncode == 2 and "(few rounds)" in done.stdout  # two rounds are no evidence
    assert "0 slower by more than 5%, 1 undecided" in done.stdout and "3 rounds or more, got none" in done.stderr
    assert "differ in threads: 2 and 1" in done.stdout
    assert "bench_old" in done.stdout and "bench_new" in done.stdout
    done = compare(tmp_path, a[1:], b[1:])
    assert done.returncode == 2 and "must have a row in common, got none" in done.stderr
    other = [row("both", 1e6, {"mine": 9e-3, "glm4v_ext": 1e-3})]
    done = compare(tmp_path, a[:1], other)
    assert done.returncode == 2 and done.stderr.endswith("a.json, got others in every row in common\n")
    done = compare(tmp_path, a, [*other, a[1]])
    assert done.returncode == 0 and "Another peer is the first: bench/bench_made.py::bench_both\n" in done.stdout
    compare(tmp_path, a, b)
    whole = json.loads((tmp_path / "a.json").read_text())

    def timed(**changed):
        row = whole["benchmarks"][0]
        return json.dumps(whole | {"benchmarks": [row | {"extra_info": row["extra_info"] | changed}]})

    no_times = "must be the JSON of a run, benchmark 0 has other times than seconds from 1e-30 to 1e+30"
    for content, said in (
        (timed(rounds_s={"glm4v_ext": ["fast"]}), no_times),
        (timed(rounds_s={"glm4v_ext": [1e-3, 0.0]}), no_times),
        (timed(median_s={"glm4v_ext": 1e-3, "sdpa": 1e-3}), no_times),
        *((timed(rounds_s={"glm4v_ext": [1e-3, seconds]}), no_times) for seconds in (10**400, 10**31, 1e-320)),
        ("{}", "must be the JSON of a run, its machine_info are missing"),
        ("[]", "must be the JSON of a run, its machine_info are missing"),
        ("# no", "must be the JSON of a run, got another kind of file"),
        (json.dumps(whole | {"benchmarks": [{}]}), "must be the JSON of a run, benchmark 0 has no extra_info"),
        (json.dumps(whole | {"benchmarks": [{"extra_info": {"median_s": {}}}]}), "benchmark 0 has no op"),
        (timed(peak_mib=[3]), "peak_mib of benchmark 0 must be an object, got [3]"),
        (json.dumps(whole | {"machine_info": {}}), "its machine_info has no command"),
        (json.dumps(whole | {"benchmarks": []}), "must have rows that were timed, got none"),
        (None, "cannot be read: No such file or directory"),
    ):
        (tmp_path / "c.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "c.json").write_text(content)
        for command in (("compare", tmp_path / "a.json"), ("page",)):
            done = run("bench", *command, tmp_path / "c.json")
            assert done.returncode == 2 and done.stderr.startswith(f"bench {command[0]}: {tmp_path / 'c.json'} ")
            assert done.stderr.endswith(f"{said}\n") and len(done.stderr.splitlines()) == 1
    done = run("bench", "guess")
    assert done.returncode == 2 and "must be compare or page, got 'guess'" in done.stderr
    done = run("bench", "--help")
    assert done.returncode == 0 and "bench compare A.json B.json" in done.stdout


def with_fact(file, part, fact, value):
    """The run of ``file`` with one fact changed, of its first benchmark where ``part`` is extra_info."""
    run_of = json.loads(file.read_text())
    (run_of["benchmarks"][0] if part == "extra_info" else run_of)[part][fact] = value
    (file := file.with_stem("changed")).write_text(json.dumps(run_of))
    return file


NAMED, SIZED = (f"numbers from 1e-30 to 1e+30 by {what}, got" for what in ("name", "size in bytes"))
AMOUNT = "0 or a number from 1e-30 to 1e+30, got"


@pytest.mark.parametrize(
    ("part", "fact", "value", "said"),
    [
        *(("machine_info", name, None, "text, got None") for name in ("command", "hardware", "isa")),
        ("machine_info", "threads", 2.5, "a whole number above 0, got 2.5"),
        *(("machine_info", "versions", value, f"an object, got {value}") for value in (None, ["2"])),
        *(("ceilings", "peak_gflops", value, f"{NAMED} {value}") for value in (None, 1, 0)),
        *(("ceilings", "product_gflops", {"bfloat16": value}, f"{NAMED} {{'bfloat16': {value!r}}}")
          for value in (None, 0, -1.0, float("nan"), float("inf"), True, "9")),
        ("ceilings", "product_gflops", {"bfloat16": 10**400}, f"{NAMED} {{'bfloat16': {'1' + 17 * '0'}...{19 * '0'}}}"),
        *(("ceilings", "bandwidth_gbs", {size: 1.0}, f"{SIZED} {{{size!r}: 1.0}}") for size in ("all", "-1", "")),
        *(("extra_info", name, None, f"{AMOUNT} None") for name in ("flops", "bytes", "ceiling_gflops", "ceiling_gbs")),
        *(("extra_info", "flops", value, f"{AMOUNT} {value}") for value in (-1, float("nan"), float("inf"), 1e-320)),
        ("extra_info", "bytes", 10**31, f"{AMOUNT} {10**31}"),
        ("extra_info", "dtype", 16, "text or null, got 16"),
    ],
)  # fmt: skip
def test_facts_of_another_kind(part, fact, value, said, tmp_path):
    file = with_fact(results(tmp_path / "a.json", row("one", 1e6, {"glm4v_ext": 1e-3})), part, fact, value)
    whose = "benchmark 0" if part == "extra_info" else f"its {part}"
    for command in (("compare", tmp_path / "a.json"), ("page",)):
        done = run("bench", *command, file)
        said_of_file = f"{file} must be the JSON of a run, {fact} of {whose} must be {said}"
        assert done.returncode == 2 and done.stderr == f"bench {command[0]}: {said_of_file}\n"


def test_text_that_no_page_can_hold(tmp_path):
    file = results(tmp_path / "a.json", row("one", 1e6, {"glm4v_ext": 1e-3}), isa="\ud800")
    for command in (("compare", file), ("page",)):
        done = run("bench", *command, file)
        said = f"{file} must be Unicode, got half a pair of UTF-16"
        assert done.returncode == 2 and done.stderr == f"bench {command[0]}: {said}\n"
    assert not file.with_suffix(".html").exists()


@pytest.mark.parametrize("threshold", ["-1", "nan", "inf"])
def test_a_threshold_that_is_none(threshold, tmp_path):
    done = run("bench", "compare", tmp_path, tmp_path, "--threshold", threshold)
    said = f"bench compare: --threshold must be a finite number of 0 or more, got {float(threshold)}\n"
    assert done.returncode == 2 and done.stderr == said


@pytest.mark.parametrize("option", ["--out", "--figures"])
def test_a_page_that_has_no_place(option, tmp_path):
    file = results(tmp_path / "a.json", row("one", 1e6, {"glm4v_ext": 1e-3}))
    where = file if option == "--figures" else tmp_path
    done = run("bench", "page", file, option, where)
    said = "cannot be written: " if option == "--figures" else "must be a file, got a folder"
    assert done.returncode == 2 and done.stderr.startswith(f"bench page: {where} {said}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--benchmark-json", "--bench-html"])
def test_results_that_have_no_place(option, tmp_path):
    """Said before anything is timed."""
    os.mkfifo(tmp_path / "pipe")
    done = pytest_bench("--op", "swiglu", f"{option}={tmp_path / 'pipe'}")
    assert done.returncode == 4 and "pipe must be a file, got a device or a pipe" in done.stderr
    for place, folder in ((tmp_path, tmp_path), ("", ".")):
        done = pytest_bench("--op", "swiglu", f"{option}={place}")
        assert done.returncode == 4 and f"ERROR: {option} must be a file, got the folder '{folder}'" in done.stderr
    (file := tmp_path / "file").write_text("")
    for place in (file / "results.json", "/proc/results.json"):  # where even root may not write
        done = pytest_bench("--op", "swiglu", option, place)
        said = f"ERROR: {option} must be a file that can be written, got '{place}': "
        assert done.returncode == 4 and said in done.stderr


def test_results_in_the_pages_place(tmp_path):
    file = tmp_path / "a.html"
    done = pytest_bench("--op", "swiglu", "--benchmark-json", file)
    assert done.returncode == 4 and f"--benchmark-json must be another file than the page, got '{file}'" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("cpu-*.json")), ids=lambda path: path.stem)
def test_the_results_that_are_kept_can_be_read(path, tmp_path):
    done = run("bench", "compare", path, path)
    rows, undecided = re.search(r"(\d+) rows, 0 slower by more than 5%(?:, (\d+) undecided)?", done.stdout).groups()
    assert done.returncode == (2 if undecided == rows else 0), done.stdout + done.stderr
    done = run("bench", "page", path, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert done.returncode == 0 and "glm4v_ext" in page, done.stderr
    shown = [title for title in re.findall("<h2>(.*?)</h2>", page) if title != "Rooflines"]
    ops = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert len(shown) == len(set(shown)) and set(shown) <= ops  # and so they stand on the ops' pages


# --- page -------------------------------------------------------------------------------------------------------------


def test_the_page_stands_by_itself(tmp_path):
    sizes = (1e6, 1e7, 1e8)
    rows = [row(f"S{n:.0e}", n, {"glm4v_ext": 2e-10 * n, "torch <old>": 1e-12 * n**1.5}) for n in sizes]
    rows.append(row("alone", 0, {"glm4v_ext": 1e-3}, op="other", group="other", bytes=0))
    done = run("bench", "page", results(tmp_path / "a.json", *rows), "--figures", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "a.html").read_text()
    assert not re.search(r"https?:|//|<script|<link|src=|@import|url\((?!#)", page)
    assert page.count("<svg") == 2 and "torch &lt;old&gt;" in page and "<old>" not in page
    for said in (
        "a machine",
        "pytest bench",
        "abcdef with changes",
        "50% of memory",
        "3 / 3 MiB",
        "5.0 GB/s",
        "1.00 s",
        "64 KiB 50.0",
        "256 MiB 10.0",
    ):
        assert said in page, said
    assert "<td>1.00</td><td>1.50</td>" in page  # growth, of ours and of the peer
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {f"{n}.{e}" for n in ("roofline-bfloat16", "made-time-over-ours") for e in ("png", "svg")}
    assert drawn["roofline-bfloat16.png"].startswith(b"\x89PNG") and b"<svg" in drawn["roofline-bfloat16.svg"]


def test_an_op_has_one_mark_in_all_rooflines(tmp_path):
    times = {"glm4v_ext": 1e-3}
    rows = [row("a", 1e6, times, op="first"), row("b", 1e6, times), row("c", 1e6, times, dtype="float32")]
    file = results(tmp_path / "a.json", *rows)
    run_of = json.loads(file.read_text())
    run_of["ceilings"]["peak_gflops"]["float32"] = 50.0
    file.write_text(json.dumps(run_of))
    assert run("bench", "page", file, "--figures", tmp_path).returncode == 0
    both, second = ((tmp_path / f"roofline-{dtype}.svg").read_text() for dtype in ("bfloat16", "float32"))
    assert "fill: #3b82f6" in both and "fill: #3b82f6" not in second and "fill: #e8833a" in second

    file.write_text(json.dumps({**run_of, "ceilings": {name: {} for name in run_of["ceilings"]}}))
    assert run("bench", "page", file).returncode == 0
    assert not re.search("Rooflines|Ceilings", (tmp_path / "a.html").read_text())


def test_a_row_without_dtype_is_as_one_of_none(tmp_path):
    named, absent = (row(name, 1e6, {"glm4v_ext": 1e-3, "torch": 2e-3}) for name in ("named", "absent"))
    del absent["extra_info"]["dtype"]
    file = results(tmp_path / "a.json", named, absent)
    done = run("bench", "page", file, "--figures", tmp_path)
    assert done.returncode == 0 and "<td>absent</td>" in (tmp_path / "a.html").read_text(), done.stderr
    page = (tmp_path / "a.html").read_text()
    assert run("bench", "page", with_fact(file, "extra_info", "dtype", "bfloat16")).returncode == 0
    absent["extra_info"]["dtype"] = None
    assert run("bench", "page", results(file, named, absent)).returncode == 0
    assert (tmp_path / "a.html").read_text() == page


def test_ends_of_what_can_be_told(tmp_path):
    """Rates, shares, growth and figures of the least and the most that a number may be, and without memory's rate."""
    least, most = 1e-30, 1e30
    a, b = {"glm4v_ext": least, "torch": most}, {"glm4v_ext": most, "torch": least}
    rows = [
        row("a", least, a, noise=0, bytes=most, ceiling_gflops=most, ceiling_gbs=least),
        row("b", 10**30, b, noise=0, bytes=least, ceiling_gflops=least, ceiling_gbs=most),
    ]
    file = results(tmp_path / "a.json", *rows)
    file = with_fact(file, "ceilings", "peak_gflops", {"bfloat16": 10**30})
    for bandwidths in ({"65536": most, "268435456": least}, {}):
        file = with_fact(file, "ceilings", "bandwidth_gbs", bandwidths)
        done = run("bench", "page", file, "--figures", tmp_path)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert ("Rooflines" in file.with_suffix(".html").read_text()) == bool(bandwidths)
    done = run("bench", "compare", file, file)
    assert done.returncode == 0 and not done.stderr, done.stderr


# --- races ------------------------------------------------------------------------------------------------------------


def test_an_entry_of_ten_lines(tmp_path):
    """The README's, in a copy of the bench: rows, ceilings, memory, growth, the page, and the choice of peers."""
    (entry,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in entry.splitlines() if line]) <= 10
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    third = ',\n        "third": lambda: x * torch.rsqrt(x.float().square().mean(-1, True) + 1e-5).to(dtype) * weight}'
    entry = entry.replace("def bench_theirs", "def bench_rms_norm")  # as one of ours
    entry = entry.replace('"theirs":', '"their [own]":')
    (tmp_path / "bench" / "bench_theirs.py").write_text(entry.replace("weight, 1e-5)}", f"weight, 1e-5){third}"))
    json_file = tmp_path / "results" / "a.json"
    options = ["--op", "theirs", "--dtype", "fp32", "--peers", "glm4v_ext, their [own]"]
    done = pytest_bench(*options, "--benchmark-json", json_file, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(json_file.read_text())
    assert len(found["benchmarks"]) == 4
    for timed in found["benchmarks"]:
        one = timed["extra_info"]
        assert list(one["median_s"]) == ["glm4v_ext", "their [own]"] == list(one["peak_mib"])
        assert {len(seconds) for seconds in one["rounds_s"].values()} == {timed["stats"]["rounds"]}
        assert timed["stats"]["rounds"] % 2 == 0  # each peer comes as often behind the one as behind the other
        assert one["bound"] in ("compute", "memory") and one["share"] > 0
    assert set(found["growth"]) == {"theirs rms_norm forward fp32", "theirs rms_norm backward fp32"}
    assert "--peers 'glm4v_ext, their [own]'" in found["machine_info"]["command"]  # to be run again
    assert found["ceilings"]["peak_gflops"]["float32"] > 0 and found["ceilings"]["bandwidth_gbs"]
    assert found["machine_info"]["hardware"] and found["machine_info"]["versions"]["torch"]
    assert " their [own] " in done.stdout and "http" not in json_file.with_suffix(".html").read_text()
    done = pytest_bench("--op", "theirs", "--benchmark-disable", "--peers", "their", cwd=tmp_path)
    said = "must name peers of these benchmarks (glm4v_ext, their [own], third), got 'their'"
    assert done.returncode == 4 and said in done.stderr
    for op in ("their", "rlcs"):  # bench_rlcs.py is a program
        done = pytest_bench("--op", op, cwd=tmp_path)
        assert done.returncode == 4 and re.search(rf"--op must be one of .*, theirs, .*, got '{op}'", done.stderr)
    (tmp_path / "bench" / "bench_theirs.py").write_text(entry.replace("theirs(x,", "theirs(x[1:],"))
    done = pytest_bench("--op", "theirs", "--benchmark-disable", "-k", "512 and forward", cwd=tmp_path)
    assert done.returncode == 1 and "their [own]: output 0 is [511, 1536], expected [512, 1536]" in done.stdout


def test_tests_leave_the_benchmarks_alone():
    """Options of both have the same names; where nobody asks for the bench, it is not there."""
    done = run("pytest", ".", "-p", "no:cacheprovider", "--collect-only", "--ignore", "tests")
    assert done.returncode == 5 and "no tests collected" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    done = pytest_bench("--op", "swiglu", "--device", "cuda")
    assert done.returncode == 4 and "--device must be cpu where torch finds no GPU, got 'cuda'" in done.stderr


def test_what_fills_a_gpus_cache_is_written_in_any_mode():
    """The first to ask for it may do so in inference mode, the next not."""
    program = """
import torch
from bench.gpu import _other_data
with torch.inference_mode():
    _other_data("cpu").zero_()
assert _other_data("cpu").zero_() is _other_data("cpu")
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peers_agree():
    """The quick pass: every peer of a few ops is called, and nothing is timed."""
    few = "rms_norm and 336 or bench_swiglu and S1- or bench_linear and M1 or rope_3d and S1 or decode and B1-KV512"
    done = pytest_bench("--benchmark-disable", "--dtype", "bf16", "-k", few)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "glm4v_ext" not in done.stdout


@pytest.mark.slow
def test_all_peers_agree():
    done = pytest_bench("--benchmark-disable")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_compiled_peers_agree():
    """More cases of one op than the eight versions of a function that torch.compile keeps."""
    done = run("pytest", "bench", "-p", "no:cacheprovider", "-q", "--op", "rms_norm", "--benchmark-disable")
    assert done.returncode == 0, done.stdout + done.stderr
