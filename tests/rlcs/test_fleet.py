"""New weights of an engine's servers: when they are due, how servers take them in, what a fault leaves."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from asked import GIVES_IDS, Asked
from fake_server import STYLES, fake, short_pauses  # noqa: F401 (a fixture)
from safetensors import SafetensorError

from rlcs.engines import EngineFault

pytestmark = pytest.mark.long


def refusing(when, status, path):
    """A fault of the fake server: what it says to ``path`` once ``when`` is set."""
    return lambda _, asked, body: status if when.is_set() and asked == path else None


def moved(asked, by):
    with torch.no_grad():
        for weight in asked.model.parameters():
            weight.mul_(by)


@pytest.mark.parametrize("style", STYLES)
def test_new_weights_answer_from_the_wave_on_that_they_are_due(style, demo, tmp_path):
    with fake(demo / "model", style=style) as server:
        asked = Asked(demo, tmp_path, [server.url], style, refresh_every=2)
        assert asked.engine.renew(0) == 0
        moved(asked, 1.2)
        assert asked.engine.renew(1) == 0  # not due yet
        assert asked.engine.renew(2) == 2
        if style in GIVES_IDS:
            assert asked.gaps(asked.rollouts(version=2)).max() < 1e-4
        folders = sorted((tmp_path / "weights").glob("wave-*"))
        assert [f.name[:11] for f in folders] == ["wave-000000", "wave-000002"]
        for version in (4, 6, 8):
            asked.engine.renew(version)
        left = sorted((tmp_path / "weights").iterdir())
    assert [f.name[:11] for f in left] == ["wave-000006", "wave-000008"]


def test_calls_that_take_weights_in(demo, tmp_path):
    expected = {
        "vllm": ["/pause?mode=wait", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
                 "/finish_weight_update", "/resume"],
        "sglang": ["/update_weights_from_disk"],
        "transformers": ["/load_model"],
        "text": ["/mine"],
    }  # fmt: skip
    for style, paths in expected.items():
        with fake(demo / "model", style=style) as server:
            Asked(demo, tmp_path / style, [server.url], style).engine.renew(0)
            assert server.paths() == paths


def test_a_command_takes_weights_in(demo, tmp_path):
    script = tmp_path / "tell.py"
    script.write_text("import sys, json, pathlib; pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2:]))")
    command = f"{sys.executable} {script} {tmp_path}/said {{path}} {{version}} {{url}}"
    asked = Asked(demo, tmp_path, ["http://127.0.0.1:9/v1"], update_command=command)
    asked.engine.renew(3)
    path, version, url = json.loads((tmp_path / "said").read_text())
    assert Path(path).is_dir() and Path(path).name == version and url == "http://127.0.0.1:9/v1"
    asked = Asked(demo, tmp_path, ["http://127.0.0.1:9/v1"], update_command="false", patience_s=0.1)
    with pytest.raises(EngineFault, match=r"weights must be .* false: exit code 1"):
        asked.engine.renew(0)


@pytest.mark.parametrize("style", ["vllm", "sglang"])
def test_a_server_that_began_anew_between_waves_is_told_again(style, demo, tmp_path):
    with fake(demo / "model", style=style) as server:
        asked = Asked(demo, tmp_path, [server.url], style, refresh_every=2)
        asked.engine.renew(0)
        server.label = "default"
        asked.engine.renew(1)
        assert server.label.startswith("wave-000000") and asked.engine.metrics()["told"] == 2


def test_an_answer_by_other_weights_is_not_taken(demo, tmp_path):
    count = iter(range(10**6))

    def fault(_, path, body):
        if "chat" in path and next(count) == 3:
            server.label = "default"

    with fake(demo / "model", style="sglang", fault=fault) as server:
        asked = Asked(demo, tmp_path, [server.url], "sglang", concurrency=1)
        asked.rollouts()
        metrics = asked.engine.metrics()
    assert metrics["told"] == 2 and metrics["retries"] >= 1


def test_weights_may_lag_as_far_as_the_settings_allow(demo, tmp_path):
    closed = threading.Event()

    with fake(demo / "model", fault=refusing(closed, 503, "/start_weight_update")) as server:
        asked = Asked(demo, tmp_path, [server.url], staleness=2, patience_s=0.1)
        assert asked.engine.renew(0) == 0
        closed.set()
        assert asked.engine.renew(1) == 0 and asked.engine.renew(2) == 0
        assert "goes on with older weights" in asked.notes[-1] and "HTTP 503" in asked.notes[-1]
        assert len(asked.rollouts(version=2)) == 4  # it doesn't stay paused
        with pytest.raises(EngineFault, match=r"at most 2 waves old \(staleness\), those there are 3 old: .*HTTP 503"):
            asked.engine.renew(3)
        closed.clear()
        assert asked.engine.renew(3) == 3


def test_a_server_that_paused_without_a_reply_goes_on(demo, tmp_path):
    late = threading.Event()

    def fault(_, path, body):
        if late.is_set() and path.startswith("/pause"):
            server.resumed.clear()
            return 504

    with fake(demo / "model", fault=fault) as server:
        asked = Asked(demo, tmp_path, [server.url], patience_s=0.1)
        asked.engine.renew(0)
        late.set()
        assert asked.engine.renew(1) == 0 and server.resumed.is_set()


def test_a_server_that_has_half_of_the_new_weights_is_asked_nothing(demo, tmp_path):
    half = threading.Event()

    with fake(demo / "model", fault=refusing(half, 500, "/update_weights")) as server:
        asked = Asked(demo, tmp_path, [server.url], staleness=2, patience_s=0.1)
        assert asked.engine.renew(0) == 0
        half.set()
        with pytest.raises(EngineFault, match=r"none are known there: .*/update_weights: HTTP 500"):
            asked.engine.renew(1)
        half.clear()
        assert asked.engine.renew(1) == 1 and len(asked.rollouts(version=1)) == 4


def test_weights_of_an_earlier_run_go_and_those_that_servers_may_still_be_told_stay(demo, tmp_path):
    for version in (7, 8, 9):  # it had come further
        (tmp_path / "weights" / f"wave-{version:06d}-earlier").mkdir(parents=True)
    closed = threading.Event()

    with fake(demo / "model", fault=refusing(closed, 503, "/start_weight_update")) as server:
        asked = Asked(demo, tmp_path, [server.url], staleness=9, patience_s=0.1)
        asked.engine.renew(3)
        closed.set()
        for version in (4, 5, 6):
            asked.engine.renew(version)
    left = sorted(folder.name[:11] for folder in (tmp_path / "weights").iterdir())
    assert left == ["wave-000003", "wave-000005", "wave-000006"]


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(28, FULL), SafetensorError(f"I/O error: {FULL}")])  # the latter of adapters
def test_a_full_disk_leaves_the_older_weights(error, demo, tmp_path):
    with fake(demo / "model") as server:
        asked = Asked(demo, tmp_path, [server.url])
        asked.engine.renew(0)

        def full(folder):
            (folder / "half").write_bytes(b"x")
            raise error

        asked.engine.fleet.write = full
        with pytest.raises(EngineFault, match=rf"engine: weights cannot be laid in .*: .*{FULL}"):
            asked.engine.renew(1)
    assert [f.name[:11] for f in (tmp_path / "weights").iterdir()] == ["wave-000000"]
