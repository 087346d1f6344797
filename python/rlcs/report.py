"""`rlcs report`: what was trained and how well it went, as one HTML file; several runs stand side by side.

Scores are in points of a hundred with one standard error over tasks. A change's error is that of two independent
samples; both evaluations answer the same tasks, so it is too large rather than too small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from . import panels
from .files import expect_writable
from .gallery import gallery
from .page import document, figure, folded, table, tile, write
from .panels import POINTS
from .record import Record, Result, Row, before, by_flag, column, span

SURE = 2.0  # standard errors from which a difference is told as one
GALLERY = (
    "Of each domain the task that gained most and the one that goes worst, among those asked early and late; "
    "of each wave the best and the worst answer. In grounding, green is the truth and orange the answer."
)
SEED_AND_FILES = ("run.seed", "run.out", "run.resume", "model.path", "data", "tasks", "eval.tasks")
MODES = {"sampled": "At temperature 1", "greedy": "Greedy"}


def report(runs: tuple[Path, ...], /, out: Path | None = None) -> Path:
    """Writes what one or several runs have shown as one HTML page, and returns its path.

    Give a run and its control (say, RLCS and continued SFT of the same length) to see them side by side. Runs that
    still go on can be reported, too.

    Args:
        runs: Folders that `rlcs train` or `rlcs sft` wrote.
        out: The page. Without it, report.html in the first run's folder.

    Raises:
        ValueError: a folder is no run.
    """
    if not runs:
        raise ValueError("report: runs must hold a folder, got none")
    records = [Record.read(run) for run in {run.resolve(): run for run in runs}.values()]
    names = _told_apart([record.folder.resolve().parts for record in records])
    records = [replace(record, name=name) for record, name in zip(records, names, strict=True)]
    out = out or runs[0] / "report.html"
    expect_writable(out)
    return write(out, page_of(records))


def _told_apart(folders: Sequence[Sequence[str]]) -> list[str]:
    """The end of each path, as long as it takes to be no other's."""
    ends = [[path[-n:] for n in range(1, len(path) + 1)] for path in folders]
    return ["/".join(next(end for end in own if sum(end in other for other in ends) == 1)) for own in ends]


def page_of(records: Sequence[Record]) -> str:
    title = _listed([record.name for record in records])
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f"<p>{headline(record)}</p>" for record in records]
    body += [f'<p class="verdict">{escape(sentence)}</p>' for sentence in verdicts(records)]
    if len(records) > 1:
        body += [f'<p class="soft">Of {escape(records[0].name)}:</p>']
    body += ['<div class="tiles">', *tiles(records[0], records), "</div>"]
    body += ["<h2>Held-out scores</h2>", *scores(records)]
    body += _figures(panels.held_out(records))
    if len(records) > 1 and (rows := differences(records)):
        body += ["<h2>Settings that differ</h2>", rows]
    for i, record in enumerate(records):
        body += [f"<h2>{escape(record.name)}: {escape(record.method)}</h2>"]
        body += alarms(record)
        for heading, found in panels.sections(record, f"run-{i}").items():
            body += [f"<h3>{heading}</h3>", *_figures(found)]
        if cards := gallery(record):
            body += ["<h3>Tasks and answers, early and late</h3>"]
            body.append(f'<p class="soft">{GALLERY}</p>')
            body += ['<div class="cards">', *cards, "</div>"]
        if record.config:
            body.append(folded("Settings", f"<pre>{escape(_yaml(record.config))}</pre>"))
    return document(f"rlcs: {title}", body)


# --- in words ---


def headline(record: Record) -> str:
    """What was trained, for how long, how much; HTML."""
    model = f"<code>{escape(str(record.model))}</code>" if record.model else "a model"
    parts = []
    if record.waves:
        parts += [_count(record.steps, "wave"), _count(record.total("rollouts"), "rollout")]
        parts += [f"{_short(record.total('sampled_tokens'))} tokens sampled"]
        parts += [f"{_short(record.total('trained_tokens'))} trained on"]
        parts += [_count(record.total("optimizer_steps"), "optimizer step")]
    elif record.sft:
        samples = np.nan_to_num(column(record.sft, "samples")).max()
        trained = np.nan_to_num(column(record.sft, "trained_tokens")).sum()
        parts += [_count(record.steps, "optimizer step"), _count(samples, "sample")]
        parts += [f"{_short(trained)} tokens trained on"]
    done = f": {', '.join(parts)}" if parts else ""
    text = f"<b>{escape(record.name)}</b> trained {model} by {escape(record.method)} for {clock(record.seconds)}{done}."
    if record.waves and (prompts := _prompts(record)):
        text += f" {_count(prompts, 'prompt')} of {_count(len(record.domains), 'domain')}."
    if record.progress < 1:
        text += f" It still goes on: {record.progress:.0%} are behind it."
    if bad := int(np.nansum(column(record.waves or record.sft, "skipped"))):
        text += f" {_count(bad, 'step')} moved nothing: the gradient was not finite."
    return text


def verdicts(records: Sequence[Record]) -> list[str]:
    """Plain sentences: what one run has gained, or which of several gains more."""
    found, told = [], [record for record in records if any(change(record, records, m, "all") for m in record.modes)]
    for mode, words in MODES.items():
        gains = {record.name: gain for record in told if (gain := change(record, records, mode, "all"))}
        if len(gains) == 1:
            found.append(_alone(next(r for r in told if r.name in gains), records, mode, words))
        elif gains:
            found.append(_side_by_side(_arms([r for r in told if r.name in gains], gains), words))
    if len(told) > 1:
        times = [record.seconds for record in told]
        if min(times) < 0.9 * max(times):
            found.append("Training times differ: " + ", ".join(f"{r.name} {clock(r.seconds)}" for r in told) + ".")
        asked = [_asked(record.config) for record in told if record.config]
        if any(one != asked[0] for one in asked):
            found.append("The runs were evaluated with different settings: their scores do not compare.")
    return found


def _asked(config: Row) -> Row:
    """What an evaluation's scores hang on: the tasks, and how long answers may be."""
    rollout = config.get("rollout") or {}
    return {"eval": config.get("eval"), **{name: rollout.get(name) for name in ("max_new_tokens", "thinking_budget")}}


def _alone(record: Record, records: Sequence[Record], mode: str, words: str) -> str:
    first, last = span(record, records, mode, "all")
    assert first is not None and last is not None
    gain = last - first
    text = f"{words} the mean held-out score of {record.name} went from {POINTS * first.mean:.1f} "
    text += f"to {POINTS * last.mean:.1f}: {signed(gain)} points, {_sureness(gain)}."
    moves = {domain: one for domain in record.domains if (one := change(record, records, mode, domain))}
    for word, sign in (("Up", 1), ("Down", -1)):
        clear = [f"{domain} {signed(one)}" for domain, one in moves.items() if sign * one.mean > SURE * one.error]
        text += f" {word} beyond twice the error: {', '.join(clear) or 'none'}."
    return text


def _arms(records: Sequence[Record], gains: Mapping[str, Result]) -> dict[str, Result]:
    """Gains by arm: runs that differ in seed and files alone are one, with the standard error over its runs."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        settings = {key: value for key, value in by_flag(record.config).items() if key not in SEED_AND_FILES}
        arms.setdefault(f"{settings or record.name}", []).append(record)
    found = {}
    for runs in arms.values():
        ours = [gains[record.name] for record in runs]
        means = [gain.mean for gain in ours]
        error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else ours[0].error
        label = f"{runs[0].method} ({', '.join(record.name for record in runs)})"
        found[label] = Result(float(np.mean(means)), error, ours[0].tasks)
    return found


def _side_by_side(arms: Mapping[str, Result], words: str) -> str:
    ranked = sorted(arms, key=lambda label: -arms[label].mean)
    best, gain = ranked[0], arms[ranked[0]]
    if len(ranked) == 1:
        return f"{words}, {best}: {signed(gain)} points, {_sureness(gain)} over runs."
    gap = gain - arms[ranked[1]]
    others = _listed([f"{signed(arms[label])} of {label}" for label in ranked[1:]])
    if gap.mean > SURE * gap.error:
        text = f"{words}, {best} gains more: {signed(gain)} points against {others}"
    else:
        text = f"{words}, none gains more beyond the error: {signed(gain)} points of {best}, {others}"
    return f"{text}; a difference of {signed(gap)}, {_sureness(gap)}."


def _sureness(gap: Result) -> str:
    if not gap.error > 0:
        return "its error not known"
    return f"{abs(gap.mean) / gap.error:.1f} standard errors"


def change(record: Record, records: Sequence[Record], mode: str, domain: str) -> Result | None:
    """The score after less the score before."""
    first, last = span(record, records, mode, domain)
    return None if first is None or last is None else last - first


# --- numbers ---


def tiles(record: Record, records: Sequence[Record]) -> list[str]:
    found = []
    for mode in record.modes:
        gain, last = change(record, records, mode, "all"), span(record, records, mode, "all")[1]
        if last is None:
            continue
        kind = "" if gain is None else _kind(gain)
        detail = signed(gain) if gain else f"± {POINTS * last.error:.1f}" if last.error >= 0 else ""
        found.append(tile(f"{mode} score", f"{POINTS * last.mean:.1f}", detail, kind))
    found.append(tile("training", clock(record.seconds), _count(record.steps, "wave" if record.waves else "step")))
    if record.waves:
        found.append(
            tile("rollouts", _short(record.total("rollouts")), f"{_short(record.total('sampled_tokens'))} tokens")
        )
        found.append(tile("trained on", _short(record.total("trained_tokens")), "tokens"))
        for label, name in (("valid groups", "valid_share"), ("forced answers", "forced"), ("bad format", "format")):
            late = column(record.waves[-10:], name)
            if np.isfinite(late).any():
                found.append(tile(label, f"{np.nanmean(late):.0%}", f"last {_count(len(late), 'wave')}"))
    elif record.sft:
        loss = column(record.sft, "loss")
        if np.isfinite(loss).any():
            found.append(tile("loss", f"{loss[np.isfinite(loss)][-1]:.3f}", "last step"))
    return found


def scores(records: Sequence[Record]) -> list[str]:
    """A table for each way of answering: before, after and change by domain, for all runs."""
    modes = list(dict.fromkeys(mode for record in records for mode in record.modes))
    domains = list(dict.fromkeys(domain for record in records for domain in record.domains))
    if not modes:
        return ["<p>Nothing was evaluated so far.</p>"]
    found = []
    for mode in modes:
        head = [[("", 2), *((record.name, 3) for record in records)]] if len(records) > 1 else []
        head.append(
            [("domain", 1), ("tasks", 1), *[(text, 1) for _ in records for text in ("before", "after", "change")]]
        )
        rows = [
            ("total" if domain == "all" else "", [escape(domain), *_cells(records, mode, domain)])
            for domain in [*domains, "all"]
        ]
        found += [f"<h3>{mode.capitalize()}{' at temperature 1' if mode == 'sampled' else ''}</h3>", table(head, rows)]
    starts = {record.name: start[1] for record in records if (start := before(record, records))}
    told = "; ".join(f"{name}: {words}" for name, words in starts.items())
    came = f"Before is, for {escape(told)}." if told else "Nothing was evaluated before."
    found.append(
        '<p class="soft">Points of a hundred ± one standard error over tasks; coloured where a change is beyond twice '
        f"its error, which takes the evaluations as independent. {came}</p>"
    )
    return found


def _cells(records: Sequence[Record], mode: str, domain: str) -> list[str]:
    cells, tasks = [], float("nan")
    for record in records:
        first, last = span(record, records, mode, domain)
        gain = last - first if first and last else None
        known = last or first
        tasks = tasks if tasks >= 0 or known is None else known.tasks
        cells += [_points(first), _points(last)]
        cells.append(f'<td class="{_kind(gain)}">{signed(gain)}</td>' if gain else "")
    return [f"{tasks:.0f}" if tasks >= 0 else "", *cells]


def alarms(record: Record) -> list[str]:
    """Each domain's signals: from when to when, how often, what was said last."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in record.of("alarm"):
        parts = str(row.get("alarm")).split(": ", 2)
        found.setdefault((parts[0], parts[1] if len(parts) > 2 else ""), []).append(row)
    if not found:
        return ["<p>No alarm was raised.</p>"] if record.waves else []
    rows = []
    for (domain, signal), ones in found.items():
        last = str(ones[-1].get("alarm")).split(": ", 2)[-1]
        steps = [ones[0].get("step"), ones[-1].get("step")]
        when = f"{steps[0]}" if steps[0] == steps[1] else f"{steps[0]} to {steps[1]}"
        cells = [escape(domain), escape(signal), when, str(len(ones)), escape(last)]
        rows.append(("", cells))
    head = [[("domain", 1), ("alarm", 1), ("waves", 1), ("times", 1), ("last", 1)]]
    return ["<h3>Alarms</h3>", table(head, rows, "words")]


def differences(records: Sequence[Record]) -> str:
    """Settings that all runs have and in which they differ, as a table."""
    flat = [by_flag(record.config) for record in records]
    keys = [key for key in flat[0] if key != "run.out" and all(key in one for one in flat)]
    unlike = [key for key in keys if len({repr(one[key]) for one in flat}) > 1]
    rows = [("", [escape(key), *(escape(str(one[key])) for one in flat)]) for key in unlike]
    return table([[("setting", 1), *((record.name, 1) for record in records)]], rows, "words") if rows else ""


# --- formats ---


def signed(gain: Result) -> str:
    """+11.9 ± 1.6, in points."""
    return f"{POINTS * gain.mean:+.1f}" + (f" ± {POINTS * gain.error:.1f}" if gain.error >= 0 else "")


def clock(seconds: float) -> str:
    """3 h 05 min, 4 min 00 s, 41 s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])


def _points(one: Result | None) -> str:
    if one is None:
        return "–"
    return f"{POINTS * one.mean:.1f}" + (f" ± {POINTS * one.error:.1f}" if one.error >= 0 else "")


def _kind(gain: Result) -> str:
    if not abs(gain.mean) > SURE * gain.error:
        return ""
    return "up" if gain.mean > 0 else "down"


def _count(number: float, thing: str) -> str:
    return f"{int(number):,} {thing}{'' if int(number) == 1 else 's'}"


def _short(number: float) -> str:
    """1.23 M, 45.6 k, 789."""
    number = float(f"{number:.3g}") if number >= 1e4 else number  # before the unit is chosen: 999,900 is 1 M
    for size, name in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (size if size > 1e4 else 1e3):.3g}{name}"
    return f"{int(number):,}"


def _prompts(record: Record) -> int:
    """How many the ledger holds."""
    held = sum(v for k, v in record.waves[-1].items() if k.startswith("curriculum/ledger/") and isinstance(v, float))
    return int(held) or len(record.ledger)


def _figures(found: Sequence[panels.Panel]) -> list[str]:
    shown = [figure(one.title, one.svg, one.caption, one.wide) for one in found]
    return ['<div class="figures">', *shown, "</div>"] if shown else []


def _yaml(config: Row) -> str:
    import yaml

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
