"""The table of a run in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.rates import Row, growth, growth_text, memory_text, ours_s, rate_text, share_text, speedups, time_text


def show(console: Console, machine: dict[str, Any], ceilings: dict[str, dict[str, float]], rows: list[Row]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"\n{machine['hardware']}, threads: {machine['threads']}, ISA {machine['isa']}; {versions}", soft_wrap=True
    )
    for line in ceiling_lines(ceilings):
        console.print(line, soft_wrap=True)
    for op, of_op in groupby(rows, lambda row: row["op"]):
        console.print(_table(op, list(of_op)))
    for group, slopes in growth(rows).items():
        console.print(f"{group}: seconds ~ work ** b, b = {growth_text(slopes)}", soft_wrap=True)


def ceiling_lines(ceilings: dict[str, dict[str, float]]) -> list[str]:
    peaks = [f"{name} {value:.0f} GFLOP/s" for name, value in ceilings["peak_gflops"].items()]
    products = [f"{name} {value:.0f} GFLOP/s" for name, value in ceilings["product_gflops"].items()]
    sizes = sorted(ceilings["bandwidth_gbs"].items(), key=lambda size: int(size[0]))
    rates = [f"{_size(int(size))} {value:.1f} GB/s" for size, value in sizes]
    found = {"multiply-adds": peaks, "matrix product": products, "reading or copying": rates}
    return [f"{what}: {', '.join(values)}" for what, values in found.items() if values]


def _size(bytes: int) -> str:
    return f"{bytes >> 10} KiB" if bytes < 1 << 20 else f"{bytes >> 20} MiB"


def _table(op: str, rows: list[Row]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in speedups(row)))
    table = Table(title=op, title_justify="left")
    table.add_column("case")
    for name in ("glm4v_ext", "rate", "of the ceiling", "peak", *others):
        table.add_column(name, justify="right")
    for row in rows:
        ratios = speedups(row)
        cells = [f"{time_text(row['median_s'][n])} ({ratios[n]:.2f}x)" if n in ratios else "" for n in others]
        table.add_row(row["case"], time_text(ours_s(row)), rate_text(row), share_text(row), memory_text(row), *cells)
    return table
