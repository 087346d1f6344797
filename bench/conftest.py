"""Runs the benchmarks: ``pytest bench --op rms_norm --device cpu --quick``.

A benchmark is a function ``bench_<case>(race, device, dtype, ...)`` in ``bench/bench_<op>.py`` that builds its inputs
and ends with ``race({"glm4v_ext": ours, "<baseline>": theirs, ...}, flops=..., bytes=...)``. The table of medians goes
to the terminal; ``--benchmark-json FILE`` also writes them with the machine, the versions and the command.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from bench.cuda import CudaLane
from bench.peers import Lane, Peer, assert_agree

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_rows: dict[str, list[dict[str, Any]]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--op", help="only bench_<op>.py")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--dtype", choices=DTYPES, help="only this dtype")
    group.addoption("--quick", action="store_true", help="few shapes, short turns, no torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out by --quick")
    config.option.benchmark_quiet = True  # the table below replaces the plugin's


def pytest_ignore_collect(collection_path, config: pytest.Config) -> bool | None:
    op = config.option.op
    return True if op and collection_path.suffix == ".py" and collection_path.stem != f"bench_{op}" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        names = [metafunc.config.option.dtype] if metafunc.config.option.dtype else list(DTYPES)
        metafunc.parametrize("dtype", [DTYPES[n] for n in names], ids=names)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.option.device


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark, device: str) -> Callable[..., dict[str, float]]:
    """``race(peers, flops=0, bytes=0, grad=False, ...)`` -> median seconds per call of each peer.

    Asserts that the peers agree, then times them in turns. ``flops`` and ``bytes`` of one call give our rate; ``grad``
    leaves autograd on; peers named in ``slow`` (torch.compile) are left out by --quick; ``ceiling`` is the machine's
    GFLOP/s, measured in this run.
    """
    quick = request.config.option.quick

    def run(
        peers: dict[str, Peer],
        flops: float = 0,
        bytes: float = 0,
        grad: bool = False,
        slow: tuple[str, ...] = (),
        tolerance: float | None = None,
        ceiling: float = 0,
    ) -> dict[str, float]:
        peers = {name: peer for name, peer in peers.items() if not (quick and name in slow)}
        with torch.inference_mode(not grad):
            assert_agree(peers, tolerance)
            medians = _take_turns(benchmark, peers, device, turn_s=0.002 if quick else 0.01, budget_s=1 if quick else 6)
        _rows[request.path.stem.removeprefix("bench_")].append(
            {
                "case": _case_name(request.node.name),
                "flops": flops,
                "bytes": bytes,
                "ceiling": ceiling,
                "medians": medians,
            }
        )
        benchmark.extra_info.update(
            median_s=medians, flops=flops, bytes=bytes, ceiling_gflops=ceiling, threads=torch.get_num_threads()
        )
        return medians

    return run


def _case_name(node_name: str) -> str:
    return node_name.removeprefix("bench_").replace("[", " ").rstrip("]")


def _take_turns(benchmark, peers: dict[str, Peer], device: str, turn_s: float, budget_s: float) -> dict[str, float]:
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    kind = CudaLane if device == "cuda" else Lane
    lanes = {name: kind(peer, turn_s, sync) for name, peer in peers.items()}
    ours, *others = lanes.values()

    def others_in_turn() -> None:  # forwards in one round, backwards in the next
        for lane in others if len(ours.seconds) % 2 else reversed(others):
            lane.turn()

    round_s = sum(lane.fastest_s * lane.calls for lane in lanes.values())
    least = 3 if round_s < 10 else 2 if round_s < 20 else 1  # calls that long vary by little
    rounds = max(least, min(50, int(budget_s / round_s)))
    benchmark.pedantic(ours.turn, setup=others_in_turn, rounds=rounds, iterations=1)
    benchmark.extra_info["calls_per_round"] = ours.calls
    return {name: lane.median() for name, lane in lanes.items()}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(describe_machine())


def describe_machine() -> dict[str, Any]:
    import transformers

    import glm4v_ext

    return {
        "command": " ".join(["pytest", *sys.argv[1:]]),
        "hardware": _cpu_name() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _rows:
        return
    console = Console(file=sys.__stdout__, width=None if sys.__stdout__.isatty() else 160)
    facts = describe_machine()
    console.print(
        f"\n{facts['hardware']}, {facts['threads']} threads, ISA {facts['isa']}, {facts['versions']}", soft_wrap=True
    )
    for op, rows in _rows.items():
        console.print(_table(op, rows))


def _table(op: str, rows: list[dict[str, Any]]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in list(row["medians"])[1:]))
    table = Table(title=op, title_justify="left")
    table.add_column("case")
    for name in ("glm4v_ext", "rate", *others):
        table.add_column(name, justify="right")
    for row in rows:
        ours, *theirs = row["medians"].values()
        known = dict(zip(list(row["medians"])[1:], theirs, strict=True))
        cells = [f"{_time(known[n])} ({known[n] / ours:.2f}x)" if n in known else "" for n in others]
        table.add_row(row["case"], _time(ours), _rate(row, ours), *cells)
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _rate(row: dict[str, Any], seconds: float) -> str:
    if row["flops"]:
        gflops = row["flops"] / seconds / 1e9
        return f"{gflops:.0f} GFLOP/s" + (f" ({gflops / row['ceiling']:.0%})" if row["ceiling"] else "")
    return f"{row['bytes'] / seconds / 1e9:.1f} GB/s" if row["bytes"] else ""
