"""Runs the benchmarks: ``pytest bench --op rms_norm --device cpu --peers transformers --quick``; bench/README.md.

A benchmark is a function ``bench_<case>(race, device, dtype, ...)`` in ``bench/bench_<op>.py`` that builds its inputs
and ends with ``race({"glm4v_ext": ours, "<baseline>": theirs, ...}, flops=..., bytes=...)``. The table of medians goes
to the terminal; ``--benchmark-json FILE`` also writes them with the machine, the versions, the commit and the command,
and a page with figures beside it. ``--benchmark-disable`` only asks whether the peers agree.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench.ceilings import MOST_BYTES, bandwidth_gbs, measured, peak_gflops
from bench.gpu import CudaLane
from bench.peers import Lane, Peer, assert_agree, gradients, rounds_within
from bench.rates import Row, bound, growth, share
from bench.table import show
from rlcs.files import expect_writable

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_rows: list[Row] = []
_peers: set[str] = set()  # all that came by, chosen or not


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--op", help="only bench_<op>.py")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--dtype", choices=DTYPES, help="only this dtype")
    group.addoption("--peers", help="only these beside glm4v_ext, by the table's names: transformers,flash-attn")
    group.addoption("--quick", action="store_true", help="few shapes, short turns, no torch.compile")
    group.addoption("--bench-html", type=Path, metavar="FILE", help="the page; beside --benchmark-json by default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out by --quick")
    files = {path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")}
    ops = sorted(files - {"rlcs"})  # that one is a program
    if config.option.op not in (None, *ops):
        raise pytest.UsageError(f"--op must be one of {', '.join(ops)}, got {config.option.op!r}")
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device must be cpu where torch finds no GPU, got 'cuda'")
    config.option.benchmark_quiet = True  # the table below replaces the plugin's
    if json := _json(config):
        _expect_writable("--benchmark-json", json)
    if page := _page(config):
        _expect_writable("--bench-html", page)
    if page and page == json:
        raise pytest.UsageError(f"--benchmark-json must be another file than the page, got {str(page)!r}")


def _expect_writable(option: str, file: Path) -> None:
    """Before the hours whose results it is for."""
    if file.is_dir():
        raise pytest.UsageError(f"{option} must be a file, got the folder {str(file)!r}")
    try:
        expect_writable(file)
    except ValueError as error:  # a device
        raise pytest.UsageError(f"{option}: {error}") from None
    except OSError as error:
        said = f"{option} must be a file that can be written, got {str(file)!r}: {error.strerror}"
        raise pytest.UsageError(said) from None


def _json(config: pytest.Config) -> Path | None:
    """The file of --benchmark-json, which older versions of pytest-benchmark have opened."""
    given = config.getoption("benchmark_json")
    return Path(given if isinstance(given, str | Path) else given.name) if given else None


def _page(config: pytest.Config) -> Path | None:
    json = _json(config)
    return config.option.bench_html or (json and json.with_suffix(".html"))


def pytest_ignore_collect(collection_path, config: pytest.Config) -> bool | None:
    op = config.option.op
    return True if op and collection_path.suffix == ".py" and collection_path.stem != f"bench_{op}" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backward" in metafunc.fixturenames:
        metafunc.parametrize("backward", [False, True], ids=["forward", "backward"])
    if "dtype" in metafunc.fixturenames:
        names = [metafunc.config.option.dtype] if metafunc.config.option.dtype else list(DTYPES)
        metafunc.parametrize("dtype", [DTYPES[n] for n in names], ids=names)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.option.device


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark, device: str) -> Callable[..., None]:
    """``race(peers, flops=0, bytes=0, leaves=(), ...)`` asserts that the peers agree, then times them in turns.

    ``flops`` and ``bytes`` of one call give our rate and its share of the machine's. With ``leaves``, tensors that the
    peers read, each peer is forward and backward to their gradients; with ``grad`` the peers see to that themselves.
    Those named in ``slow`` (torch.compile) are left out by --quick.
    """
    quick = request.config.option.quick
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float32

    def run(
        peers: dict[str, Peer],
        flops: float = 0,
        bytes: float = 0,
        leaves: Iterable[Tensor] = (),
        grad: bool = False,
        slow: tuple[str, ...] = (),
        tolerance: float | None = None,
    ) -> None:
        peers = _chosen(peers, request.config.option.peers, slow if quick else ())
        leaves = list(leaves)
        if leaves:
            peers = gradients(peers, leaves)
        with torch.inference_mode(not (leaves or grad)):
            assert_agree(peers, tolerance)
            if benchmark.disabled:
                return benchmark.pedantic(lambda: None)
            budget_s = (0.3 if device == "cuda" else 1) if quick else 6  # a GPU's turns are alike
            lanes = _take_turns(benchmark, peers, device, turn_s=0.002 if quick else 0.01, budget_s=budget_s)
        row = {
            **_names(request),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "flops": flops,
            "bytes": bytes,
            "ceiling_gflops": peak_gflops(dtype, device) if flops else 0.0,
            "ceiling_gbs": bandwidth_gbs(bytes, device) if bytes else 0.0,
            "median_s": {name: lane.median() for name, lane in lanes.items()},
            "rounds_s": {name: lane.seconds for name, lane in lanes.items()},
            "peak_mib": {name: lane.peak_mib for name, lane in lanes.items()},
        }
        _rows.append(row)
        benchmark.extra_info.update(row, bound=bound(row), share=share(row))
        return None

    return run


def _names(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of a row. Cases of one group are fitted together in `growth`."""
    name, _, chosen = request.node.name.removeprefix("bench_").removesuffix("]").partition("[")
    kind = [part for part in chosen.split("-") if part in (*DTYPES, "forward", "backward")]
    op = request.path.stem.removeprefix("bench_")
    of_op = [name] if name == op else [op, name]  # another op's benchmark may have the same name
    return {"op": op, "case": f"{name} {chosen}".rstrip(), "group": " ".join([*of_op, *kind])}


def _names_in(text: str) -> set[str]:
    return {name.strip() for name in text.split(",")} - {""}


def _chosen(peers: dict[str, Peer], wanted: str | None, without: tuple[str, ...]) -> dict[str, Peer]:
    """Ours and the peers wanted."""
    ours, *others = peers
    _peers.update(peers)
    kept = others if wanted is None else _names_in(wanted)
    return {name: peer for name, peer in peers.items() if name == ours or (name in kept and name not in without)}


def _take_turns(benchmark, peers: dict[str, Peer], device: str, turn_s: float, budget_s: float) -> dict[str, Lane]:
    kind = CudaLane if device == "cuda" else Lane
    lanes = {name: kind(peer, turn_s, device) for name, peer in peers.items()}
    ours, *others = lanes.values()

    def others_in_turn() -> None:  # forwards in one round, backwards in the next
        for lane in others if len(ours.seconds) % 2 else reversed(others):
            lane.turn()

    rounds = rounds_within(budget_s, sum(lane.fastest_s * lane.calls for lane in lanes.values()))
    benchmark.pedantic(ours.turn, setup=others_in_turn, rounds=rounds, iterations=1)
    benchmark.extra_info["calls_per_round"] = ours.calls
    return lanes


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(describe_machine(config.option.device))


def describe_machine(device: str) -> dict[str, Any]:
    import transformers

    import glm4v_ext

    return {
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": glm4v_ext.build_info()["isa"],
        "versions": {
            "glm4v_ext": glm4v_ext.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']}), {os.cpu_count()} cores"


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json.update(ceilings=measured, growth=growth(_rows))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    option = session.config.option
    if _rows:  # for the roofs of the figures
        bandwidth_gbs(MOST_BYTES[option.device], option.device)
    yield
    if _peers and (unknown := sorted(_names_in(option.peers or "") - _peers)):
        known = ", ".join(sorted(_peers))
        pytest.exit(f"--peers must name peers of these benchmarks ({known}), got {unknown[0]!r}", returncode=4)


def pytest_terminal_summary(config: pytest.Config) -> None:
    if not _rows:
        return
    width = None if sys.__stdout__.isatty() else 160
    console = Console(file=sys.__stdout__, width=width, markup=False)  # names may have brackets
    machine = describe_machine(config.option.device)
    show(console, machine, measured, _rows)
    if file := _page(config):
        if importlib.util.find_spec("matplotlib") is None:
            console.print("no page: its figures need matplotlib")
            return
        from bench.page import write_page

        commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
        console.print(write_page(file, machine, commit, measured, _rows), soft_wrap=True)
