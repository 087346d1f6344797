"""Curves of a run as SVG text for a page: no script, no font, no address; ink and rules take the page's colours.

A figure without anything to draw is None. Dims: R rows of metrics, S series.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INK, RULE = "#010203", "#040506"  # stand for the page's colours until the SVG is written
PALETTE = (  # legible on white and on near black
    "#3b82f6", "#e8833a", "#22a06b", "#e5534b", "#9f6ef0", "#c99a1e", "#17a2b8", "#d85a9c", "#8b949e", "#9a7b4f",
)  # fmt: skip
ALARM = "#e5534b"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": RULE, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.titlesize": 9, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8, "lines.markersize": 4,
    "figure.constrained_layout.use": True, "text.parse_math": False,
}  # fmt: skip
SIZE = (5.4, 3.2)  # inches
POINTS = 400  # of a curve, at most: longer ones become means of neighbours
NAME = 36  # characters beside or above a figure: a longer name would leave no room to draw


@dataclass(frozen=True)
class Series:
    """One curve. ``error`` is drawn as a band."""

    label: str
    x: np.ndarray  # [R]
    y: np.ndarray  # [R], NaN where unknown
    colour: str = PALETTE[0]
    dashed: bool = False
    error: np.ndarray | None = None  # [R]

    @property
    def known(self) -> bool:
        return bool((np.isfinite(self.x) & np.isfinite(self.y)).any())


def coloured(x: np.ndarray, curves: Mapping[str, np.ndarray]) -> list[Series]:
    """Series by label, each in its own colour."""
    return [Series(label, x, y, PALETTE[i % len(PALETTE)]) for i, (label, y) in enumerate(curves.items())]


def curves(
    name: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    percent: bool = False,
    log: bool = False,
    marks: Sequence[float] = (),
    level: tuple[str, float] | None = None,
    smooth: bool = True,
) -> str | None:
    """Lines over a common axis: what was measured thin, its running mean thick; alarms at ``marks``, a named level."""
    series = [one for one in series if one.known]
    if not series:
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for one in series:
            _curve(axes, one, smooth)
        if level is not None and np.isfinite(level[1]):
            axes.axhline(level[1], color=INK, linewidth=1, linestyle=":", label=level[0])
        if len(marks):
            style = {"transform": axes.get_xaxis_transform(), "clip_on": False, "color": ALARM}
            axes.plot(marks, np.ones(len(marks)), "v", markersize=5, linestyle="none", label="alarm", **style)
        axes.set(xlabel=x_label, ylabel=y_label)
        _whole_ticks(axes, x_label)
        every = np.concatenate([one.y[np.isfinite(one.y)] for one in series])
        if log and every.min() > 0 and every.max() > 10 * every.min():
            axes.set_yscale("log")
        elif percent:
            _percent(axes)
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 6))
        _room(axes, "y")
        _legend(figure, axes)

    return draw(name, paint)


def stack(
    name: str, x: np.ndarray, parts: Mapping[str, np.ndarray], colours: Sequence[str], x_label: str, y_label: str,
    *, share: bool = False,
) -> str | None:  # fmt: skip
    """Parts of a whole, one on the other; with ``share`` of one."""
    kept = {label: np.nan_to_num(y) for label, y in parts.items() if np.nan_to_num(y).any()}
    if not kept:
        return None
    shades = [colours[i % len(colours)] for i, label in enumerate(parts) if label in kept]
    x, heights = thinned(x), np.array([thinned(y) for y in kept.values()])
    if share:
        heights = heights / np.maximum(heights.sum(axis=0), 1e-300)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        if len(x) < 40:
            for i, (label, y) in enumerate(zip(kept, heights, strict=True)):
                axes.bar(x, y, bottom=heights[:i].sum(axis=0), label=label, color=shades[i], width=0.9)
        else:
            axes.stackplot(x, heights, labels=list(kept), colors=shades, step="mid", linewidth=0, alpha=0.9)
            axes.set_xlim(x[0], x[-1])
        axes.set(xlabel=x_label, ylabel=y_label)
        _whole_ticks(axes, x_label)
        if share:
            _percent(axes)
        _legend(figure, axes, most=5)

    return draw(name, paint)


def multiples(name: str, panels: Mapping[str, Sequence[Series]], x_label: str, y_label: str) -> str | None:
    """A small figure for each title, all with the same series."""
    panels = {title: [one for one in series if one.known] for title, series in panels.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)

    def paint(figure: Any) -> None:
        grid = figure.subplots(down, across, squeeze=False, sharex=True)
        for axes, (title, series) in zip(grid.flat, panels.items(), strict=False):
            for one in series:
                _curve(axes, one, smooth=False)
            axes.set_title(shortened(title), fontweight="bold", loc="left")
            _room(axes, "y")
        for axes in list(grid.flat)[len(panels) :]:  # keeps its label, as the lowest of its column
            axes.tick_params(left=False, labelleft=False)
            axes.spines[:].set_visible(False)
            axes.grid(False)
        for axes in grid[-1]:
            axes.set_xlabel(x_label)
        for axes in grid[:, 0]:
            axes.set_ylabel(y_label)
        _legend(figure, next(axes for axes, s in zip(grid.flat, panels.values(), strict=False) if s), most=6)

    return draw(name, paint, (11.0, 2.1 * down + 0.7))


def dumbbells(name: str, rows: Sequence[str], changes: Mapping[str, Sequence[Any]], x_label: str) -> str | None:
    """``changes[label][i]``: (before, error, after, error) of ``rows[i]``, or None: a hollow and a full dot, joined."""
    if not any(one is not None for found in changes.values() for one in found):
        return None
    many = len(changes)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for k, (label, found) in enumerate(changes.items()):
            colour, shift = PALETTE[k % len(PALETTE)], (k - (many - 1) / 2) * 0.7 / many
            for i, one in enumerate(found):
                if one is None:
                    continue
                (start, start_error, end, end_error), y = one, i + shift
                axes.plot([start, end], [y, y], color=colour, linewidth=2.2, alpha=0.55, zorder=2)
                for at, error, full in ((start, start_error, False), (end, end_error, True)):
                    axes.errorbar(
                        at, y, xerr=error if error >= 0 else None, color=colour, marker="o", markersize=6, capsize=2,
                        fillstyle="full" if full else "none", elinewidth=1, zorder=3,
                    )  # fmt: skip
            axes.plot([], [], color=colour, marker="o", label=f"{label}: before (hollow), after")
        axes.set_yticks(range(len(rows)), list(map(shortened, rows)))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x_label)
        _room(axes, "x")
        _legend(figure, axes, most=2)

    return draw(name, paint, (SIZE[0], 0.9 + 0.22 * len(rows) * (many + 0.6)))


def heatmap(
    name: str, values: np.ndarray, rows: Sequence[str], x: Any, x_label: str, bar_label: str,
    *, texts: np.ndarray | None = None,
) -> str | None:  # fmt: skip
    """``values [rows, columns]`` from 0 to 1 as colours; ``texts`` of the same shape are written on them."""
    if not np.isfinite(values).any():
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if texts is None:
            shown = np.array([thinned(row) for row in values])
            edges = (x[0] - 0.5, x[-1] + 0.5, len(rows) - 0.5, -0.5)
            image = axes.imshow(shown, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", interpolation="none", extent=edges)
            _whole_ticks(axes, x_label)
        else:
            image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
            axes.set_xticks(range(len(x)), x)
            for (i, j), text in np.ndenumerate(texts):
                dark = values[i, j] > 0.55
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="#f6f8fa" if dark else "#1f2328")
        axes.set_yticks(range(len(rows)), list(map(shortened, rows)))
        axes.set_xlabel(x_label)
        bar = figure.colorbar(image, ax=axes, label=bar_label, aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        _percent(bar.ax)

    return draw(name, paint, (SIZE[0], max(SIZE[1], 0.9 + 0.2 * len(rows))))


def draw(name: str, paint: Callable[[Any], None], size: tuple[float, float] = SIZE) -> str:
    """The SVG of what ``paint(figure)`` paints. Figures of a page must differ in name: their parts' ids follow it."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout not applied")  # labels would overlap
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # readers have fonts of their own
        from matplotlib.figure import Figure

        figure = Figure(figsize=size)
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<(g|svg)\b([^>]*?) id="[^"]*"', r"<\1\2", text)  # "axes_1" in every figure
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    return text.replace(INK, "var(--ink)").replace(RULE, "var(--rule)").strip()


def thinned(values: np.ndarray) -> np.ndarray:
    """Means of neighbours where there are too many to draw; NaN is left out."""
    if len(values) <= POINTS:
        return values
    parts = np.array_split(values, POINTS)
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])


def shortened(name: str) -> str:
    """A name with its middle left out where it is too long."""
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[1 - NAME // 2 :]}"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred, shorter at the ends, over what is known; NaN where nothing is."""
    known = np.isfinite(values)
    ones = np.ones(window)
    weight = np.convolve(known, ones, "same")
    total = np.convolve(np.where(known, values, 0.0), ones, "same")
    return np.where(known, total / np.maximum(weight, 1), np.nan)


def _curve(axes: Any, one: Series, smooth: bool) -> None:
    known = np.isfinite(one.x) & np.isfinite(one.y)
    x, y = thinned(one.x[known]), thinned(one.y[known])
    window = max(1, len(x) // 10) if smooth else 1
    style = {"color": one.colour, "linestyle": "--" if one.dashed else "-"}
    style["markerfacecolor"] = "none" if one.dashed else one.colour  # points without a line differ, too
    if window > 1:
        axes.plot(x, y, alpha=0.28, linewidth=0.8, **style)
    marker = "o" if len(x) < 3 or (not smooth and len(x) < 40) else ""
    axes.plot(x, running_mean(y, window), label=one.label, marker=marker, **style)
    if one.error is not None:
        error = np.nan_to_num(thinned(one.error[known]))
        if len(x) == 1:
            axes.errorbar(x, y, error, color=one.colour, capsize=2, elinewidth=1)
        else:
            axes.fill_between(x, y - error, y + error, color=one.colour, alpha=0.13, linewidth=0)


def _room(axes: Any, axis: str) -> None:
    """Where all is one value: from 0, which is less to read into than the last of its digits."""
    low, high = getattr(axes.dataLim, f"interval{axis}")
    if low == high:
        axes.set(**{f"{axis}lim": sorted((0, 2 * low)) if low else (-0.03, 1)})


def _percent(axes: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _whole_ticks(axes: Any, x_label: str) -> None:
    """There is no wave 1.5."""
    if x_label in ("wave", "step"):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _legend(figure: Any, axes: Any, most: int = 4) -> None:
    """Below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:  # a single one says what the title says
        figure.legend(handles, labels, loc="outside lower center", ncols=min(most, len(labels)), handlelength=1.6)
