"""Which figures a report holds: what is drawn of one run, and of several side by side.

Dims: R waves (or steps of SFT), E evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import figures
from .curriculum import TIERS
from .figures import PALETTE, Series, coloured
from .record import Record, Row, before, column, names, number, result, span

TIER_COLOURS = ("#3f9bd6", "#4fb58a", "#d9b23d", "#e8833a", "#cf4a5a")
CATEGORIES = 40  # of a map, at most
POINTS = 100.0  # scores are shown in points of a hundred


@dataclass(frozen=True)
class Panel:
    title: str
    svg: str
    caption: str
    wide: bool = False


def kept(*found: tuple[str, str | None, str] | tuple[str, str | None, str, bool]) -> list[Panel]:
    """Those with something to show."""
    return [Panel(title, svg, *rest) for title, svg, *rest in found if svg is not None]  # type: ignore[arg-type]


# --- held-out scores ---


def held_out(records: Sequence[Record]) -> list[Panel]:
    """Scores before and after, over time, over rollouts, by domain; of all the runs."""
    modes = list(dict.fromkeys(mode for record in records for mode in record.modes))
    domains = list(dict.fromkeys(domain for record in records for domain in record.domains))
    panels = []
    for mode in modes:
        rows = [*domains, "all"]
        changes = {record.name: [_change(record, records, mode, domain) for domain in rows] for record in records}
        svg = figures.dumbbells(f"dumbbells-{mode}", rows, changes, "held-out score, points")
        panels += kept((f"Before and after, {mode}", svg, "Bars are one standard error over tasks."))
    for axis, label in (("seconds", "seconds of training"), ("rollouts", "rollouts")):
        shown = [record for record in records if axis == "seconds" or record.waves]
        series = [one for r in shown for one in _scores(r, records, "all", axis, _colour(records, r))]
        svg = figures.curves(f"held-out-{axis}", series, label, "score, points", smooth=False)
        title = "Held-out score over " + ("time" if axis == "seconds" else "rollouts")
        panels += kept((title, svg, "Mean over domains, one standard error as a band. Solid: sampled; dashed: greedy."))
    small = {
        domain: [one for r in records for one in _scores(r, records, domain, "seconds", _colour(records, r))]
        for domain in domains
    }
    svg = figures.multiples("held-out-domains", small, "seconds of training", "score, points")
    caption = "Solid: sampled at temperature 1, what RL moves. Dashed: greedy, what a user sees."
    return panels + kept(("Held-out score by domain", svg, caption, True))


def _colour(records: Sequence[Record], record: Record) -> str:
    return PALETTE[next(i for i, one in enumerate(records) if one is record) % len(PALETTE)]


def history(record: Record, records: Sequence[Record]) -> list[Row]:
    """A run's evaluations, the one that its gains are counted from in front, if that was made elsewhere."""
    start = before(record, records)
    if start is None or any(start[0] is row for row in record.evals):
        return record.evals
    return [{**start[0], "step": 0, "seconds": 0.0}, *record.evals]


def _scores(record: Record, records: Sequence[Record], domain: str, axis: str, colour: str) -> list[Series]:
    rows, found = history(record, records), []
    x = column(rows, "seconds") if axis == "seconds" else [record.rollouts_at(row.get("step") or 0) for row in rows]
    for mode in record.modes:
        results = [result(row, mode, domain) for row in rows]
        y = np.array([np.nan if one is None else POINTS * one.mean for one in results])
        error = np.array([np.nan if one is None else POINTS * one.error for one in results])
        found.append(Series(f"{record.name}, {mode}", np.asarray(x), y, colour, mode == "greedy", error))
    return found


def _change(
    record: Record, records: Sequence[Record], mode: str, domain: str
) -> tuple[float, float, float, float] | None:
    first, last = span(record, records, mode, domain)
    if last is None:
        return None
    first = first or last
    return POINTS * first.mean, POINTS * first.error, POINTS * last.mean, POINTS * last.error


# --- curves of one run ---


class Sheet:
    """Panels of one run as they are drawn; what holds nothing is left out.

    ``key`` tells the run's figures from those of others in a page.
    """

    def __init__(self, record: Record, key: str) -> None:
        self.record, self.key = record, key
        self.rows = record.waves or record.sft
        self.over = "wave" if record.waves else "step"
        self.x = self("step")
        self.marks = sorted({float(row["step"]) for row in record.of("alarm") if isinstance(row.get("step"), int)})
        self.panels: list[Panel] = []

    def __call__(self, name: str) -> np.ndarray:
        """[R] what the rows hold by this name."""
        return column(self.rows, name)

    def change(self, name: str) -> np.ndarray:
        """[R] how much a running total grew; the first row's is known where the run starts with it."""
        return np.diff(self(name), prepend=0.0 if len(self.x) and self.x[0] <= 1 else np.nan)

    def add(self, title: str, svg: str | None, caption: str) -> None:
        if svg is not None:
            self.panels.append(Panel(title, svg, caption))

    def curves(
        self, title: str, caption: str, y_label: str, lines: Mapping[str, np.ndarray], all: np.ndarray | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """Lines by label; ``all`` is one more, in the page's ink."""
        series = coloured(self.x, {label: y for label, y in lines.items() if np.isfinite(y).any()})
        series += [] if all is None else [Series("all", self.x, all, figures.INK)]
        self.add(title, figures.curves(f"{self.key}/{title}", series, self.over, y_label, **options), caption)

    def stack(
        self,
        title: str,
        caption: str,
        y_label: str,
        parts: Mapping[str, np.ndarray],
        colours: Sequence[str],
        share: bool,
    ) -> None:
        svg = figures.stack(f"{self.key}/{title}", self.x, parts, colours, self.over, y_label, share=share)
        self.add(title, svg, caption)


def reward(sheet: Sheet) -> None:
    for name, title, caption in (
        (
            "reward",
            "Training reward",
            "Over a wave's rollouts. The curriculum changes what is asked: see held-out scores.",
        ),
        ("pass_at_k", "Pass@k", "Mean over prompts of the best reward among a prompt's rollouts."),
    ):
        lines = {domain: sheet(f"{name}/{domain}") for domain in names(sheet.rows, f"{name}/")}
        sheet.curves(title, caption, title.lower(), lines, sheet(name), marks=sheet.marks)


def curriculum(sheet: Sheet) -> None:
    drawn, expected = sheet("curriculum/drawn"), sheet("curriculum/expected_valid")
    invalid = sheet("curriculum/not_valid_sample_rate_ema")
    invalid[:1] = np.where(invalid[:1] > 0, invalid[:1], np.nan)  # nothing was observed before
    shares = {
        "valid share": sheet("valid_share"),
        "expected": _ratio(expected, drawn),
        "average so far": 1 - invalid,
    }
    ratios = {
        "drawn / wanted": sheet("curriculum/expansion"),
        "expansion_ratio_ema": sheet("curriculum/expansion_ratio_ema"),
    }
    counts = {"valid": sheet("valid"), "expected": expected, "trained on": sheet("trained_groups")}
    sheet.curves(
        "Valid share",
        "Groups neither all right nor all wrong: the others teach nothing.",
        "groups",
        shares,
        percent=True,
    )
    caption = "Prompts rolled out for each group wanted, and 1 / (1 - not_valid_sample_rate) of the averaged rate."
    sheet.curves("Expansion", caption, "ratio", ratios)
    wanted = ("wanted", number(sheet.record.config.get("groups")))
    sheet.curves("Valid groups of a wave", "Below the dotted line a wave ended short.", "groups", counts, level=wanted)
    for what, title, caption in (
        ("drawn", "Tiers drawn", "Difficulty of the prompts that each wave rolled out, by the ledger at that time."),
        ("ledger", "Tiers in the ledger", "Of all prompts: as the model gets better, the hard ones thin out."),
    ):
        parts = {tier: sheet(f"curriculum/{what}/{tier}") for tier in TIERS}
        sheet.stack(title, caption, "share of prompts", parts, TIER_COLOURS, share=True)
    size = {"prompts": sheet("curriculum/effective_sample_size")}
    sheet.curves("Effective sample size", "1 / Σ share² of a draw's weights.", "prompts", size)
    _maps(sheet)


def _maps(sheet: Sheet) -> None:
    """Categories over waves, and by tier."""
    categories = sorted(names(sheet.rows, "curriculum/pass_rate/"))[:CATEGORIES]
    ends = [name.split("/", 1)[-1] for name in categories]
    short = {name: end if ends.count(end) == 1 else name for name, end in zip(categories, ends, strict=True)}
    over = np.array([sheet(f"curriculum/pass_rate/{name}") for name in categories]).reshape(
        len(categories), len(sheet.rows)
    )
    title, caption = (
        "Pass rate by category",
        "The ledger's mean of each category over the waves: green is solved, red is not.",
    )
    labels = list(short.values())
    sheet.add(title, figures.heatmap(f"{sheet.key}/{title}", over, labels, sheet.x, "wave", "pass rate"), caption)
    ledger = [row for row in sheet.record.ledger if row.get("tier") in TIERS and isinstance(row.get("category"), str)]
    rates: dict[str, list[float]] = {}
    for row in ledger:
        rates.setdefault(row["category"], []).append(number(row.get("pass_rate")))
    here = sorted(rates)[:CATEGORIES]
    held = [(row["category"], row["tier"]) for row in ledger]
    counts = np.array([[held.count((name, tier)) for tier in TIERS] for name in here]).reshape(len(here), len(TIERS))
    labels = [f"{short.get(name, name)} ({np.mean(rates[name]):.0%})" for name in here]
    title, texts = "Prompts by category and tier", np.where(counts > 0, counts.astype(str), "")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    svg = figures.heatmap(f"{sheet.key}/{title}", shares, labels, TIERS, "tier", "share of prompts", texts=texts)
    sheet.add(title, svg, "In the ledger at the end, with each category's mean pass rate.")


def answers(sheet: Sheet) -> None:
    sheet.curves("Length", "Mean length of an answer.", "tokens", {"tokens": sheet("length")})
    shares = {
        "forced": sheet("forced"),
        "unfinished": sheet("unfinished"),
        "bad format": sheet("format"),
        "verifier error": sheet("verifier_errors"),
    }
    caption = "Forced: thinking cut at its budget. A verifier error is left out, never a zero."
    sheet.curves("What went wrong", caption, "share of rollouts", shares, percent=True, marks=sheet.marks)
    if np.isfinite(forced := sheet("reward_forced")).any():
        caption = "Answers whose thinking was cut, against all."
        sheet.curves("Reward of forced answers", caption, "reward", {"forced": forced}, sheet("reward"))


def optimisation(sheet: Sheet) -> None:
    """Of RL and SFT alike."""
    if sheet.record.sft:
        caption = "Mean negative log-likelihood of the trained tokens."
        sheet.curves("Loss", caption, "nats", {"loss": sheet("loss")})
    sheet.curves("Entropy", "Mean over the trained tokens.", "nats", {"entropy": sheet("entropy")})
    clipped = {"above": sheet("clip_high"), "below": sheet("clip_low")}
    sheet.curves("Clip fractions", "Trained tokens whose ratio was clipped.", "share", clipped)
    sheet.curves("Gradient norm", "Before clipping.", "norm", {"norm": sheet("grad_norm")}, log=True)
    gaps = {"all steps": sheet("mismatch"), "first step": sheet("mismatch_first")}
    caption = "Mean |log-probability of the trainer − of the rollout|. In a wave's first step it should be rounding, "
    caption += "unless groups were carried from the wave before."
    sheet.curves("Mismatch", caption, "nats", gaps, log=True)
    sheet.curves("Learning rate", f"Of each {sheet.over}.", "rate", {"rate": sheet("rate")}, smooth=False)


def speed(sheet: Sheet) -> None:
    if not sheet.record.waves:
        seconds = sheet.change("seconds")
        rates = {"tokens": _ratio(sheet("tokens"), seconds), "trained": _ratio(sheet("trained_tokens"), seconds)}
        caption = "Tokens of a step, and those learned from, over its time."
        sheet.curves("Throughput", caption, "tokens a second", rates)
        return
    phases = {name: sheet(f"seconds/{name}") for name in names(sheet.rows, "seconds/")}
    caption = "By phase; evaluations and checkpoints left out."
    if "wait" in phases:  # answers were made beside the update
        phases["rollout"] = np.where(np.isfinite(phases["wait"]), np.nan, phases["rollout"])
        caption += " Of answers that were made ahead it is the wait for them."
    sheet.stack("Time of a wave", caption, "seconds", phases, PALETTE, share=False)
    rates = {
        "sampled": _ratio(sheet.change("total/sampled_tokens"), sheet("seconds/rollout")),
        "trained": _ratio(sheet("trained_tokens"), sheet("seconds/update")),
    }
    caption = "Tokens sampled over the time of rollouts, judging included; tokens trained on over the time of updates."
    sheet.curves("Throughput", caption, "tokens a second", rates)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0)


SFT_SECTIONS = {"Optimisation": optimisation, "Speed": speed}
RL_SECTIONS = {"Reward": reward, "Curriculum": curriculum, "Answers": answers, **SFT_SECTIONS}


def sections(record: Record, key: str) -> dict[str, list[Panel]]:
    """All panels of one run by heading."""
    found = {}
    for heading, draw in (RL_SECTIONS if record.waves else SFT_SECTIONS).items():
        sheet = Sheet(record, key)
        draw(sheet)
        if sheet.panels:
            found[heading] = sheet.panels
    return found
