"""Flags of `rlcs`: each once, lists whole, no path that a shell has left empty."""

import re
from pathlib import Path

import pytest

from rlcs import cli
from rlcs.config import SftConfig, TrainConfig, read

BARE = re.compile(r"(--[\w.-]+,? )+ *([A-Z\[{][^ a-z]\S*|\{\S+\}| |\[?STR|\.\.\.\]+)* *\((default|required)")
"""A flag, what it takes, and its default at once."""


@pytest.fixture
def refused(capfd):
    """Runs a command that must end with exit code 2 and one line, which it gives back."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        said = capfd.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("rlcs: "), said
        return said.strip()

    return run


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_flag_is_explained(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    entries = []
    for line in (line.strip("│ ") for line in capsys.readouterr().out.splitlines()):
        if line.startswith("-"):
            entries.append(line)
        elif entries:
            entries[-1] += f" {line}"
    bare = [entry for entry in entries if BARE.match(entry)]
    assert len(entries) > 1 and not bare


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("train", "--model.freeze", "language", "--model.freeze", "vision"), "--model.freeze"),
        (("train", "--model.freeze=language", "--groups", "3", "--model.freeze", "vision"), "--model.freeze"),
        (("train", "--engine.urls", "http://a", "--engine.urls", "http://b"), "--engine.urls"),
        (("sft", "--run.save-every", "3", "--run.save_every", "4"), "--run.save-every"),
        (("sft", "--run.resume", "--run.no-resume"), "--run.resume"),
        (("sft", "--no-thinking", "--thinking"), "--thinking"),
        (("train", "--config", "a.yaml", "--config=b.yaml"), "--config"),
        (("show", "run", "--domain", "ocr", "--domain", "math"), "--domain"),
        (("plan", "--gpus", "8", "--gpus", "16"), "--gpus"),
    ],
)
def test_a_flag_that_stands_twice_is_refused(arguments, flag, refused):
    said = f"a flag must stand once (all values of a list stand behind one), got {flag} twice"
    assert refused(*arguments) == f"rlcs: {arguments[0]}: {said}"


def test_values_of_a_list_stand_behind_one_flag(monkeypatch):
    found = []
    monkeypatch.setitem(cli.COMMANDS, "train", lambda given: found.append(cli._parsed(TrainConfig, "train", given)))
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--model.freeze", "language", "vision", "--engine.extra", '{"a": "--groups --groups"}'])
    assert end.value.code == 0 and found[0].model.freeze == ("language", "vision")


def test_domains_of_verify_may_also_be_flags_of_their_own(refused):
    said = refused("verify", "--domain", "ocr", "--domain", "music")
    assert said.startswith("rlcs: verify: --domain must be one of") and said.endswith("got music")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sft", "--run.out", ""),
        ("train", "--run.out="),
        ("train", "--eval.tasks", ""),
        ("eval", "--model", "m", "--tasks", "t", "--out", ""),
        ("report", "run", "--out", ""),
        ("demo", "--out", ""),
    ],
)
def test_an_empty_path_is_refused(arguments, refused, tmp_path, monkeypatch):
    """A variable that is not set, which would be the folder one is in."""
    monkeypatch.chdir(tmp_path)
    flag = next(one for one in reversed(arguments) if one.startswith("--")).rstrip("=")
    assert refused(*arguments) == f"rlcs: Error parsing {flag}: must be a path, got '' (see rlcs {arguments[0]} --help)"
    assert not list(tmp_path.iterdir())


def test_empty_paths_of_other_kinds(refused, tmp_path):
    assert "must be a path, got ''" in refused("show", "")
    assert "arguments: ['run', '']" in refused("report", "run", "")
    for name in ("train", "sft"):
        assert refused(name, "--config", "") == "rlcs: --config must have a value, got ''"
    (file := tmp_path / "config.yaml").write_text("run: {out: ''}")
    for kind in (SftConfig, TrainConfig):
        with pytest.raises(ValueError, match=r"config\.yaml: run\.out must be a path, got ''$"):
            read(kind, file)


@pytest.mark.parametrize(("given", "path"), [([], None), (["--out", "None"], None), (["--out", "a"], Path("a"))])
def test_a_path_that_may_be_none(given, path):
    def command(run: Path, /, out: Path | None = None, other: Path = Path("b")):
        return run, out, other

    assert cli._called(command, "show", ["here", *given]) == (Path("here"), path, Path("b"))


@pytest.mark.parametrize(("flag", "name"), [("--rollout.temperature", "temperature"), ("--rollout.top-p", "top_p")])
def test_what_evaluations_do_not_heed_is_refused(flag, name, refused):
    said = refused("sft", flag, "0.5")
    assert f"sft: rollout.{name} must be 1, as sampled answers have it, got 0.5" in said
