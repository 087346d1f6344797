"""The page of a run: one file that stands by itself, with roofline plots and bars of speed-ups; figures also as files.

``python -m bench page RESULTS.json [--out FILE.html] [--figures FOLDER]`` makes both of any run's JSON.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bench.rates import (
    Row,
    growth,
    memory_text,
    ours_s,
    rate_text,
    read_run,
    share_text,
    speedups,
    time_text,
)
from bench.table import ceiling_lines
from rlcs.figures import INK, PALETTE, RULE, SIZE, STYLE, draw
from rlcs.page import document, figure, table, tile, write

Facts = dict[str, Any]
Ceilings = dict[str, dict[str, float]]
Paint = Callable[[Any], None]
MARKS = "osD^vP*X<>"  # as many as colours; ops beyond them are hollow


def write_page(path: Path, machine: Facts, commit: Facts, ceilings: Ceilings, rows: list[Row]) -> Path:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    changes = " with changes" if commit.get("dirty") else ""
    body = [
        "<h1>Benchmarks of glm4v-ext</h1>",
        f'<p class="soft">{escape(versions)}; commit {escape(str(commit.get("id"))[:12])}{changes}</p>',
        f"<pre>{escape(machine['command'])}</pre>",
        '<div class="tiles">',
        tile("threads", str(machine["threads"]), str(machine["isa"])),
        *(tile(f"peak, {name}", f"{value:.0f}", "GFLOP/s") for name, value in ceilings["peak_gflops"].items()),
        *(tile(f"product, {name}", f"{value:.0f}", "GFLOP/s") for name, value in ceilings["product_gflops"].items()),
        *([tile("memory", f"{_memory_gbs(ceilings):.1f}", "GB/s")] if ceilings["bandwidth_gbs"] else []),
        "</div>",
        f"<p>{escape(machine['hardware'])}.</p>",
    ]
    if lines := ceiling_lines(ceilings):
        body.append(f"<p>Ceilings of the run: {escape('; '.join(lines))}.</p>")
        body.append(
            "<p>A row is held against the one that bounds it; rates of memory are of as many bytes as it moves.</p>"
        )
    if drawn := rooflines(rows, ceilings):
        caption = "Solid: multiply-adds, and main memory. Dashed: torch's matrix product, and the fastest cache."
        body += ["<h2>Rooflines</h2>", '<div class="figures">']
        body += [figure(title, draw(title, paint, size), caption) for title, (paint, size) in drawn.items()]
        body.append("</div>")
    for op, of_op in groupby(rows, lambda row: row["op"]):
        body += _section(op, list(of_op))
    return write(path, document("Benchmarks of glm4v-ext", body))


def _section(op: str, rows: list[Row]) -> list[str]:
    others = list(dict.fromkeys(name for row in rows for name in speedups(row)))
    head = ["case", "glm4v_ext", "rate", "of the ceiling", "peak", *others]
    lines = []
    for row in rows:
        cells = [row["case"], time_text(ours_s(row)), rate_text(row), share_text(row), memory_text(row)]
        for name in others:
            ratio = speedups(row).get(name)
            cells.append("" if ratio is None else f"{time_text(row['median_s'][name])} ({ratio:.2f}x)")
        lines.append(("", [escape(cell) for cell in cells]))
    body = [f"<h2>{escape(op)}</h2>", table([[(name, 1) for name in head]], lines)]
    if others:
        paint, size = bars(rows)
        drawn = draw(f"bars {op}", paint, size)
        body += ['<div class="figures">', figure("Time over ours", drawn, "Right of 1, ours is faster."), "</div>"]
    if slopes := growth(rows):
        peers = list(dict.fromkeys(name for found in slopes.values() for name in found))
        cells = [
            ("", [escape(group), *(f"{found[name]:.2f}" if name in found else "" for name in peers)])
            for group, found in slopes.items()
        ]
        body += ["<h3>Cost growth: b of seconds ~ work ** b</h3>", table([[(n, 1) for n in ("", *peers)]], cells)]
    return body


def figures(rows: list[Row], ceilings: Ceilings) -> dict[str, tuple[Paint, tuple[float, float]]]:
    """Title -> what paints it, and its size in inches."""
    drawn = rooflines(rows, ceilings)
    for op, of_op in groupby(rows, lambda row: row["op"]):
        members = list(of_op)
        if any(map(speedups, members)):
            drawn[f"{op}: time over ours"] = bars(members)
    return drawn


def rooflines(rows: list[Row], ceilings: Ceilings) -> dict[str, tuple[Paint, tuple[float, float]]]:
    """One for each peak: rates of the rows that give flops and bytes, under what the machine can do."""
    drawn = {}
    placed = [row for row in rows if row["flops"] and row["bytes"]]
    ops = list(dict.fromkeys(row["op"] for row in placed))  # each has the same mark in all of them
    for name, peak in ceilings["peak_gflops"].items():
        found = [row for row in placed if row["dtype"] == name]
        if found and ceilings["bandwidth_gbs"]:
            product = ceilings["product_gflops"].get(name, peak)
            rates = _memory_gbs(ceilings), max(ceilings["bandwidth_gbs"].values())
            drawn[f"Roofline, {name}"] = _roofline(found, ops, peak, product, rates), (7.2, 4.6)
    return drawn


def _roofline(
    rows: Sequence[Row], ops: Sequence[str], peak: float, product: float, rates: tuple[float, float]
) -> Paint:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        intensity = [row["flops"] / row["bytes"] for row in rows]
        x = np.geomspace(min(intensity) / 2, max(*intensity, 4 * peak / rates[0]), 200)
        axes.plot(x, np.minimum(peak, x * rates[0]), color=PALETTE[8], linewidth=1.8)
        axes.plot(x, np.minimum(peak, x * rates[1]), color=PALETTE[8], linewidth=0.9, linestyle="--")
        axes.axhline(product, color=PALETTE[8], linewidth=0.9, linestyle="--")
        for i, op in enumerate(ops):
            points = [(at, row) for at, row in zip(intensity, rows, strict=True) if row["op"] == op]
            if points:
                axes.plot(
                    [at for at, _ in points], [row["flops"] / ours_s(row) / 1e9 for _, row in points], label=op,
                    linestyle="none", marker=MARKS[i % len(MARKS)], color=PALETTE[i % len(PALETTE)], alpha=0.85,
                    fillstyle="full" if i < len(MARKS) else "none",
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="flops per byte moved", ylabel="GFLOP/s")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        figure.legend(loc="outside lower center", ncols=4, handlelength=1.0)

    return paint


def bars(rows: Sequence[Row]) -> tuple[Paint, tuple[float, float]]:
    """Each peer's time over ours, case by case."""
    peers = list(dict.fromkeys(name for row in rows for name in speedups(row)))
    height = 0.8 / len(peers)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for k, name in enumerate(peers):
            known = [(i, speedups(row)[name]) for i, row in enumerate(rows) if name in speedups(row)]
            at = [i + (k - (len(peers) - 1) / 2) * height for i, _ in known]
            ratios = np.array([ratio for _, ratio in known])
            drawn = axes.barh(at, ratios - 1, height, left=1, label=name, color=PALETTE[k % len(PALETTE)])
            axes.bar_label(drawn, [f"{ratio:.3g}x" for ratio in ratios], padding=2, fontsize=7)
        axes.axvline(1, color=PALETTE[8], linewidth=1)
        axes.set(xscale="log", xlabel="time over ours")
        axes.margins(x=0.12)
        _plain_ticks(axes.xaxis)
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=4, handlelength=1.2)

    return paint, (SIZE[0] * 1.4, 1.2 + 0.13 * len(rows) * (len(peers) + 1))


def _plain_ticks(axis: Any) -> None:
    """10, not a power of ten; between the decades where there are few."""
    from matplotlib.ticker import NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter((lambda value, _: f"{value:g}") if high < 10 * low else NullFormatter())


def _memory_gbs(ceilings: Ceilings) -> float:
    """Of the largest size that was measured."""
    found = ceilings["bandwidth_gbs"]
    return found[max(found, key=int)] if found else 0.0


def save_figures(
    drawn: dict[str, tuple[Paint, tuple[float, float]]], folder: Path, endings: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """As PNG and SVG files, on white."""
    import matplotlib
    from matplotlib.figure import Figure

    shades = {INK: "#1f2328", RULE: "#d5dae0"}
    style = {key: shades.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for title, (paint, size) in drawn.items():
        with matplotlib.rc_context({**style, "figure.facecolor": "white", "svg.hashsalt": title}):
            figure = Figure(figsize=size)
            paint(figure)
            for ending in endings:
                files.append(folder / f"{re.sub(r'[^a-z0-9_]+', '-', title.lower())}.{ending}")
                figure.savefig(files[-1], dpi=150)
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench page", description="The page, and the figures, of a run's JSON.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="by default beside the JSON")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write them as PNG and SVG")
    asked = parser.parse_args(arguments)
    try:
        run, found = read_run(asked.results)
    except ValueError as error:
        print(f"bench page: {error}", file=sys.stderr)
        return 2
    machine, commit, ceilings, rows = run["machine_info"], run["commit_info"], run["ceilings"], list(found.values())
    try:
        print(write_page(asked.out or asked.results.with_suffix(".html"), machine, commit, ceilings, rows))
        if asked.figures:
            print(*save_figures(figures(rows, ceilings), asked.figures), sep="\n")
    except ValueError as error:  # a folder or a device
        print(f"bench page: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench page: {error.filename2 or error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0
