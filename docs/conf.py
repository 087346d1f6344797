"""The documentation site: `make docs`. Nothing is fetched while it is built, and its pages fetch nothing.

Docstrings are the ops' reference; the numbers come from ``bench/results/``: ``{measured} rms_norm`` stands for the rows
of an op (of all without a name) in every recorded benchmark, with the plots of runs that are there as a whole, and the
page of benchmarks ends with all pages and plots.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
FIGURES = ROOT / "docs/figures"  # drawn when the site is built
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from bench.page import figures, save_figures  # noqa: E402
from bench.rates import ours_s, share_text, speedups, time_text  # noqa: E402
from glm4v_ext._version import __version__ as release  # noqa: E402

project, author = "glm4v-ext", "the glm4v-ext authors"
copyright = f"{author}, Apache-2.0"
version = release
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"glm4v-ext {release}"
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["wrap.css"]
smartquotes = False  # flags keep their two dashes

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "literal"  # docstrings set names and files in single backquotes
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show no types: shapes and dtypes stand in the text
nitpick_ignore_regex = [("py:.*", r"torch\..*")]  # documented elsewhere
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
pygments_dark_style = "github-dark"


class Measured(Directive):
    """Tables of the recorded benchmarks, one a machine."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        op = self.arguments[0] if self.arguments else None
        found: list[nodes.Node] = []
        for path in sorted(RESULTS.rglob("*.json")):
            record = _read(path)
            if "machine_info" in record and (rows := list(_rows(record, op))):
                found += [nodes.paragraph(text=_machine(record)), _table(rows)]
                for figure in _figures_of(path.stem, op):
                    found.append(nodes.image(uri=f"/{figure.relative_to(ROOT / 'docs')}", alt=figure.stem))
        return found or [nodes.paragraph(text="Nothing is recorded yet.")]


def draw_figures(app: Any) -> None:
    """Plots of the runs that are kept with their rounds: of others only figures are."""
    for path in RESULTS.glob("*.json"):
        record = _read(path)
        rows = [row["extra_info"] for row in record.get("benchmarks", [])]
        if any(len(turns) > 1 for row in rows for turns in row.get("rounds_s", {}).values()):
            save_figures(figures(rows, record["ceilings"]), FIGURES / path.stem, ("svg",))


def _figures_of(run: str, op: str | None) -> list[pathlib.Path]:
    """The plot of an op, or the rooflines of all."""
    return sorted((FIGURES / run).glob("roofline-*.svg" if op is None else f"{op}-time-over-ours.svg"))


def add_results(app: Any, name: str, source: list[str]) -> None:
    """Pages and plots as the benchmarks wrote them, behind the page of benchmarks."""
    if name != "benchmarks":
        return
    pages = sorted(RESULTS.rglob("*.md"))
    shown = "".join(page.read_text() for page in pages)
    for path in sorted(RESULTS.rglob("*.svg")):
        if path.name not in shown:
            source[0] += f"\n![{path.stem}](../{path.relative_to(ROOT)})\n"
    for page in pages:
        options = ":heading-offset: 1\n:relative-images:"
        source[0] += f"\n```{{include}} ../{page.relative_to(ROOT)}\n{options}\n```\n"


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['hardware']}, {threads}, {machine['isa']}; {versions}; {machine['command']}"


def _rows(record: dict[str, Any], op: str | None) -> Iterator[list[str]]:
    """Case, our time, each peer's and how many times longer it takes, our share of the ceiling that bounds it."""
    for benchmark in record["benchmarks"]:
        row = benchmark["extra_info"]
        if op not in (None, row.get("op")) or "median_s" not in row:
            continue
        times = ", ".join(
            f"{peer} {time_text(row['median_s'][peer])} ({ratio:.1f}x)" for peer, ratio in speedups(row).items()
        )
        case = row["case"] if op or row["case"].startswith(row["op"]) else f"{row['op']}: {row['case']}"
        yield [case, time_text(ours_s(row)), times, share_text(row)]


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A run's JSON; files of before the harness wrote them itself hold rows alone."""
    record = json.loads(path.read_text())
    if "rows" not in record:
        return record
    benchmarks = []
    for name, row in record["rows"].items():
        op, _, case = name.partition(": ")
        facts = {"op": op, "case": case, "median_s": row["seconds"], "flops": 0, "bytes": 0, "ceiling_gbs": 0}
        facts["ceiling_gflops"] = row.get("ceiling_gflops", 0)
        facts["flops"] = row.get("gflops", 0) * 1e9 * next(iter(row["seconds"].values()))
        benchmarks.append({"extra_info": facts})
    machine = {**record["machine"], "command": "; ".join(record["commands"])}
    return {"machine_info": machine, "benchmarks": benchmarks}


def _table(rows: list[list[str]]) -> nodes.table:
    heads = ["case", "glm4v_ext", "peers (times ours)", "of the ceiling"]
    widths = (30, 15, 45, 10)
    group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in widths), cols=len(widths))
    for part, content in ((nodes.thead(), [heads]), (nodes.tbody(), rows)):
        for row in content:
            entries = (nodes.entry("", nodes.paragraph(text=cell)) for cell in row)
            part += nodes.row("", *entries)
        group += part
    return nodes.table("", group)


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    app.connect("builder-inited", draw_figures)
    app.connect("source-read", add_results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
