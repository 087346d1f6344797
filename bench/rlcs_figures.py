"""Figures of ``bench/results/rlcs.jsonl``: what the tables of ``rlcs_report.py`` say, to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rlcs_report import GAIN, Results, change, seeds_of

COLOURS = {
    "rlcs": "#3b82f6", "uniform": "#8b949e", "refill": "#e8833a", "alarms": "#22a06b", "none": "#e5534b",
    "cold": "#8b949e", "control": "#c99a1e",
}  # fmt: skip
POINTS = 200  # of a mean curve


def figures(results: Results, folder: Path) -> dict[str, str]:
    """Draws ``rlcs-SECTION.svg`` for each section that has rows; file names by section."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {}
    style = {"svg.fonttype": "none", "svg.hashsalt": "rlcs", "axes.spines.top": False, "axes.spines.right": False}
    makers: dict[str, tuple[str, Callable[[Results], Any]]] = {
        "compare": ("compare/", _compare),
        "matrix": ("matrix/", _matrix),
        "hack": ("hack/", _hack),
        "demo": ("demo/long/", _demo),
    }
    for name, (beginning, make) in makers.items():
        if any(row.startswith(beginning) for row in results):
            with pyplot.rc_context(style):
                figure = make(results)
                file = folder / f"rlcs-{name}.svg"
                figure.savefig(file, metadata={"Date": None})
                pyplot.close(figure)
            drawn[name] = file.name
    return drawn


def _compare(results: Results) -> Any:
    """Held-out score over what it cost."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for arm in ("rlcs", "uniform", "refill"):
        runs = [row["metrics"]["curve"] for row in seeds_of(results, f"compare/{arm}").values()]
        for axes, what in zip(panels, ("rollouts", "waves", "seconds"), strict=True):
            curves = [([p.get(what, 0) for p in run], [_gained(run, i) for i in range(len(run))]) for run in runs]
            _bundle(axes, curves, arm)
    for axes, what in zip(panels, ("rollouts", "sampling waves", "seconds of training"), strict=True):
        axes.axhline(100 * GAIN, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(what)
        axes.locator_params(axis="x", nbins=5)  # labels of six digits touch
    panels[0].set_ylabel("held-out points gained")
    panels[0].legend(frameon=False)
    return figure


def _gained(run: Sequence[Mapping[str, Any]], i: int) -> float:
    return 100 * (run[i]["scores"]["all"] - run[0]["scores"]["all"])


def _bundle(axes: Any, curves: Sequence[tuple[Sequence[float], Sequence[float]]], arm: str) -> None:
    """Every run thin, their mean thick as far as all of them go."""
    for x, y in curves:
        axes.plot(x, y, color=COLOURS[arm], linewidth=0.7, alpha=0.35)
    if curves:
        grid = np.linspace(0, min(x[-1] for x, _ in curves), POINTS)
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], 0)
        axes.plot(grid, mean, color=COLOURS[arm], linewidth=2, label=arm)


def _matrix(results: Results) -> Any:
    """Points gained on each domain (columns) by training on each (rows)."""
    from matplotlib import pyplot

    arms = list(dict.fromkeys(name.split("/")[1] for name in results if name.startswith("matrix/")))
    runs = {arm: [r["metrics"]["curve"] for r in seeds_of(results, f"matrix/{arm}").values()] for arm in arms}
    domains = list(runs[arms[0]][0][0]["scores"])
    values = np.array([[100 * np.mean([change(c, d) for c in runs[arm]]) for d in domains] for arm in arms])
    figure, axes = pyplot.subplots(figsize=(1.1 * len(domains) + 1.5, 0.6 * len(arms) + 1.2), layout="constrained")
    most = np.abs(values).max()
    axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axes.text(
            j, i, f"{value:+.1f}", ha="center", va="center", color="white" if abs(value) > 0.6 * most else "black"
        )
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlabel("held-out points gained on")
    axes.set_ylabel("trained on")
    return figure


def _hack(results: Results) -> Any:
    """What the hacked verifier pays, and what is learned, with the alarms acting and without."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    titles = ("training reward of the lax verifier", "held out: counting, strict", "held out: mean of all domains")
    for arm in ("none", "alarms"):
        runs = [row["metrics"]["curve"] for row in seeds_of(results, f"hack/{arm}").values()]
        reward = [[(p["step"], 100 * r) for p in run for d, r in p["rewards"].items() if "lax" in d] for run in runs]
        _bundle(panels[0], [([s for s, _ in pairs], [r for _, r in pairs]) for pairs in reward if pairs], arm)
        for axes, domain in zip(panels[1:], ("counting", "all"), strict=True):
            curves = [([p["step"] for p in run], [100 * p["scores"][domain] for p in run]) for run in runs]
            _bundle(axes, curves, arm)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("wave")
    panels[0].set_ylabel("points")
    panels[1].legend(frameon=False, title="alarms' actions")
    return figure


def _demo(results: Results) -> Any:
    """Held-out scores of a long demo over the seconds of its training, the cold start's before them."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8.5, 3.6), sharey=True, layout="constrained")
    for row in seeds_of(results, "demo/long").values():
        curves = row["metrics"]["curves"]
        start = curves["cold"][-1]
        for axes, mode in zip(panels, ("sampled", "greedy"), strict=True):
            for arm in ("rlcs", "control"):
                points = [(0.0, start), *((point["seconds"], point) for point in curves[arm] if point["step"])]
                scores = [100 * point[f"{mode}/all"] for _, point in points]
                axes.plot([s for s, _ in points], scores, color=COLOURS[arm], marker="o", markersize=3, label=arm)
            axes.set_title(f"{mode} answers", fontsize=10)
            axes.set_xlabel("seconds of training behind the cold start")
    panels[0].set_ylabel("held-out score")
    panels[1].legend(frameon=False)
    return figure
