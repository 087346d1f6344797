"""The page of ``bench/results/rlcs.jsonl``: tables with intervals, and which rows are missing.

Intervals are the middle 95 % of means over seeds drawn again with replacement, pairs kept together (paired bootstrap);
from one or two seeds there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

GAIN = 0.05  # of the mean held-out score over the cold start's: the target of `compare`
LATE = 3  # evaluations that a comparison at the end is the mean of
DRAWS = 10_000
Results = Mapping[str, Mapping[str, Any]]
Curve = Sequence[Mapping[str, Any]]


def page(results: Results, names: Sequence[str], figures: Mapping[str, str]) -> str:
    """All sections as Markdown; ``figures`` are file names by section."""
    results = {name: row for name, row in results.items() if name in names}
    parts = {"speed": _speed, "compare": _compare, "ablate": _ablate, "matrix": _matrix, "hack": _hack, "demo": _demo}
    sections = [_head(results)]
    for name, part in parts.items():
        sections.append(part(results) + (f"\n\n![{name}]({figures[name]})" if name in figures else ""))
    return "\n\n".join([*sections, _missing(results, names)]) + "\n"


def cost_to(curve: Curve, gain: float, what: str) -> tuple[float, bool]:
    """What a run had spent when its score, as a running maximum, first was ``gain`` above its start, linear in between;
    and whether it ever was: if not, it would have spent more than the whole run, which is what is given."""
    best, spent, target = curve[0]["scores"]["all"], 0.0, curve[0]["scores"]["all"] + gain
    for point in curve[1:]:
        score, cost = point["scores"]["all"], point[what]
        if score >= target:
            return spent + (cost - spent) * (target - best) / (score - best), True
        best, spent = (score, cost) if score > best else (best, cost)
    return curve[-1][what], False


def interval(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray]) -> str:
    """95 % of the statistic over seeds drawn again; ``values`` is [seeds, ...]."""
    if len(values) < 3:
        return "no interval"
    table = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(len(table), size=(DRAWS, len(table)))
    low, high = np.percentile(statistic(table[chosen]), [2.5, 97.5])
    return f"{low:.2f} to {high:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seeds_of(results: Results, beginning: str) -> dict[int, Mapping[str, Any]]:
    return {row["seed"]: row for name, row in results.items() if name.rsplit("/", 1)[0] == beginning}


def _head(results: Results) -> str:
    rows = list(results.values())
    kinds = sorted(
        {(row["hardware"], ", ".join(f"{name} {version}" for name, version in row["versions"].items())) for row in rows}
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    said = "\n".join(f"- {hardware}; {versions}" for hardware, versions in kinds)
    title = "# RLCS: the evidence\n\nWritten by `python bench/bench_rlcs.py --report`."
    return f"{title} Commits: {commits or 'none'}.\n\n{said}"


def _speed(results: Results) -> str:
    head = "## A step of GRPO: speed\n\n"
    rows = [name for name in results if name.startswith("speed/")]
    return head + ("\n\n".join(_race(results[name]) for name in rows) or "Missing.")


def _race(row: Mapping[str, Any]) -> str:
    m = row["metrics"]
    rows = [
        [
            name,
            f"{s['step_s']:.2f}",
            f"{s['rollout_tokens_per_s']:.0f}",
            f"{s['trained_tokens_per_s']:.0f}",
            f"{s['steps']:.0f}",
        ]
        for name, s in m["sides"].items()
    ]
    over = {
        "rollouts over `generate` (at least 2.5)": m["rollout_over_generate"],
        "step over TRL, same samples (at least 5)": m["step_over_trl"],
        "step over TRL, groups without gradient left out": m["spread_step_over_trl"],
        "step over the plain loop": m["step_over_plain"],
        "training over the padded loop": m["training_over_padded"],
    }
    ratios = "\n".join(
        f"- {name}: {value:.2f}x" if value else f"- {name}: not measured" for name, value in over.items()
    )
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    said = f"Every side with {threads}; log-probabilities of the same tokens differ by at most {m['agreement']:.1e}."
    columns = ("side", "s/step", "rollout tokens/s", "trained tokens/s", "steps")
    return f"{said}\n\n{table(columns, rows)}\n\n{ratios}"


def _compare(results: Results) -> str:
    head = f"## RLCS, uniform GRPO, refill: to {100 * GAIN:.0f} points above the cold start (temperature 1)\n\n"
    arms = {arm: seeds_of(results, f"compare/{arm}") for arm in ("rlcs", "uniform", "refill")}
    kinds = ("rollouts", "waves", "seconds")
    rows = []
    for arm, seeds in arms.items():
        costs = {k: {s: cost_to(row["metrics"]["curve"], GAIN, k) for s, row in seeds.items()} for k in kinds}
        reached = [s for s, (_, there) in costs["rollouts"].items() if there]
        more = ">" if len(reached) < len(seeds) else ""
        cells = [f"{more}{np.mean([cost for cost, _ in costs[k].values()]):.0f}" if seeds else "-" for k in kinds]
        ratios = []
        for k in kinds:
            pairs = [
                (cost_to(arms["rlcs"][s]["metrics"]["curve"], GAIN, k)[0], costs[k][s][0])
                for s in sorted(seeds.keys() & arms["rlcs"].keys())
            ]
            mean = np.mean(pairs, 0) if pairs else None
            said = interval(pairs, lambda t: t[..., 0].sum(-1) / t[..., 1].sum(-1))
            ratios.append("-" if arm == "rlcs" or mean is None else f"{mean[0] / mean[1]:.2f} ({said})")
        rows.append([arm, str(len(seeds)), str(len(reached)), *cells, *_gain(seeds), *ratios])
    names = ("arm", "seeds", "reached", *kinds, "points gained in all", *(f"RLCS {kind} / its" for kind in kinds))
    said = (
        "A run that never reached the target counts with all that it spent, too little: means then are marked with >. "
        "Seconds are those of rollouts, verdicts and steps; runs shared the machine two by two."
    )
    return f"{head}{table(names, rows)}\n\n{said}"


def _gain(seeds: Mapping[int, Mapping[str, Any]]) -> list[str]:
    gains = [100 * change(row["metrics"]["curve"], "all") for row in seeds.values()]
    return [f"{np.mean(gains):+.1f} ({interval(gains, lambda t: t.mean(-1))})" if gains else "-"]


def change(curve: Curve, domain: str) -> float:
    return curve[-1]["scores"][domain] - curve[0]["scores"][domain]


def _ablate(results: Results) -> str:
    base, rows = seeds_of(results, "compare/rlcs"), []
    for arm in dict.fromkeys(name.split("/")[1] for name in results if name.startswith("ablate/")):
        seeds = seeds_of(results, f"ablate/{arm}")
        pairs = []
        for s in sorted(seeds.keys() & base.keys()):
            curves = [run[s]["metrics"]["curve"] for run in (seeds, base)]
            steps = min(curve[-1]["step"] for curve in curves)
            pairs.append([_late(curve, steps) for curve in curves])
        if not pairs:
            continue
        gains = np.array(pairs)
        apart = gains[:, 0] - gains[:, 1]
        cells = [f"{v.mean():+.1f} ({interval(v.tolist(), lambda t: t.mean(-1))})" for v in (gains[:, 0], apart)]
        rows.append([arm, str(len(pairs)), f"{steps}", cells[0], f"{gains[:, 1].mean():+.1f}", cells[1]])
    head = "## Ablations: one thing changed in RLCS, same number of steps\n\n"
    said = (
        f"Points gained are means of the last {LATE} evaluations over the start. Intervals over three seeds are rough."
    )
    names = ("changed", "seeds", "steps", "points gained", "RLCS there", "against RLCS, paired")
    return head + (f"{said}\n\n{table(names, rows)}" if rows else "Missing.")


def _late(curve: Curve, steps: int) -> float:
    """Points gained at the end of so many steps."""
    found = [point["scores"]["all"] for point in curve if point["step"] <= steps][-LATE:]
    return 100 * (float(np.mean(found)) - curve[0]["scores"]["all"])


def _matrix(results: Results) -> str:
    rows, domains = [], list[str]()
    for arm in dict.fromkeys(name.split("/")[1] for name in results if name.startswith("matrix/")):
        curves = [row["metrics"]["curve"] for row in seeds_of(results, f"matrix/{arm}").values()]
        domains = list(curves[0][0]["scores"])
        cells = [f"{100 * np.mean([change(curve, domain) for curve in curves]):+.1f}" for domain in domains]
        rows.append([arm, str(len(curves)), *cells])
    head = "## Trained on (rows), points gained on (columns)\n\n"
    return head + (table(["trained on", "seeds", *domains], rows) if rows else "Missing.")


def _hack(results: Results) -> str:
    rows = []
    for arm in ("none", "alarms"):
        for seed, row in seeds_of(results, f"hack/{arm}").items():
            curve = row["metrics"]["curve"]
            scores = [[100 * point["scores"][d] for point in curve] for d in ("counting", "all")]
            cells = [f"{s[0]:.1f}, {max(s):.1f}, {s[-1]:.1f}" for s in scores]
            rows.append([arm, str(seed), *cells, str(len(row["metrics"]["alarms"]))])
    names = ("acting", "seed", "counting, strict: start, best, end", "all: start, best, end", "alarms")
    return "## A verifier that can be hacked\n\n" + (table(names, rows) if rows else "Missing.")


def _demo(results: Results) -> str:
    kinds = {"demo": "", "demo/long": "twice as long, "}
    runs = [(said, seed, row) for kind, said in kinds.items() for seed, row in sorted(seeds_of(results, kind).items())]
    rows, domains = [], list[str]()
    for said, seed, row in runs:
        for mode in ("sampled", "greedy"):
            before = row["metrics"]["ends"]["cold"]
            domains = [key.split("/")[1] for key in before if key.startswith(mode) and key.count("/") == 1]
            for arm, scores in row["metrics"]["ends"].items():
                cells = []
                for key in (f"{mode}/{domain}" for domain in domains):
                    gain = "" if arm == "cold" else f" ({100 * (scores[key] - before[key]):+.1f})"
                    cells.append(f"{100 * scores[key]:.1f} ± {100 * scores[f'{key}/error']:.1f}{gain}")
                rows.append([f"{said}{seed}", mode, arm, *cells])
    head = "## The demo: cold start, then RLCS, or SFT on the cold start's data as long\n\n"
    said = (
        "200 held-out tasks of each domain, points ± standard error over tasks, gains over the cold start in brackets."
    )
    return head + (f"{said}\n\n{table(['seed', 'answers', 'run', *domains], rows)}" if rows else "Missing.")


def _missing(results: Results, names: Sequence[str]) -> str:
    gone = [name for name in names if name not in results]
    kinds = [f"- {kind}: {', '.join(found)}" for kind, found in groupby(gone, lambda name: name.split("/")[0])]
    if not gone:
        return f"All {len(names)} rows are there."
    return f"## Missing: {len(gone)} of {len(names)} rows\n\n" + "\n".join(kinds)
