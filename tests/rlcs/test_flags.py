"""Flags of `rlcs`: each once, lists whole."""

import pytest

from rlcs import cli
from rlcs.config import TrainConfig


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
