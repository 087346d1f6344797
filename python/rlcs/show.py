"""`rlcs show`: a wave's prompts with their pictures, answers and verdicts, in the terminal or as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import page
from .gallery import card, page_of, verdict
from .pictures import blocks, opened
from .record import Record, Row, mean_score, pictures, said

if TYPE_CHECKING:
    from rich.console import Console

Only = Literal["wrong", "score", "format", "error", "forced"]
COLOURS = {"score": "green", "wrong": "red", "format": "magenta", "error": "yellow"}
LARGEST = (72, 40)  # pixels of a picture; a terminal's row shows two


def show(
    run: Path,
    /,
    step: int | None = None,
    domain: str | None = None,
    only: Only | None = None,
    limit: int = 8,
    html: bool = False,
) -> None:
    """Prints what a wave asked and what the model answered.

    Args:
        run: Folder that `rlcs train` wrote.
        step: Which wave. Without it, the last one.
        domain: Only tasks of this domain.
        only: Only answers with this outcome, or those whose thinking was cut (forced).
        limit: At most so many tasks.
        html: Write a page beside the rollouts instead, with the pictures in full colour, and print its path.

    Raises:
        ValueError: no such run, wave or domain.
    """
    if limit < 1:
        raise ValueError(f"show: limit must be 1 or more, got {limit}")
    record = Record.read(run)
    if not record.steps_shown:
        raise ValueError(f"show: {run} must hold rollouts, got none")
    step = record.steps_shown[-1] if step is None else step
    found = chosen(record.groups(step), domain, only)
    title = f"{record.name}, wave {step}: {len(found)} {'task' if len(found) == 1 else 'tasks'}" + (
        f", the first {limit}" if len(found) > limit else ""
    )
    if html:
        cards = [card([(step, group)], run, answers) for group, answers in found[:limit]]
        print(page.write(run / "rollouts" / f"{step:06d}.html", page_of(title, cards)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(title, style="bold", markup=False)
    for group, answers in found[:limit]:
        print_group(console, group, answers, run)


def chosen(groups: Sequence[Row], domain: str | None, only: Only | None) -> list[tuple[Row, list[Row]]]:
    """Groups of a domain that have such answers, and these answers."""
    domains = sorted({str(group.get("domain")) for group in groups})
    if domain is not None and domain not in domains:
        raise ValueError(f"show: domain must be one of {', '.join(domains)} in this wave, got {domain}")
    found = []
    for group in groups:
        answers = [a for a in group.get("answers") or [] if only is None or only in (a.get("outcome"), _cut(a))]
        if answers and domain in (None, group.get("domain")):
            found.append((group, answers))
    return found


def print_group(console: Console, group: Row, answers: Sequence[Row], folder: Path) -> None:
    """One task: where it is from, its pictures, its prompt and truth, and the answers with their verdicts."""
    from rich.text import Text

    facts = [str(group[name]) for name in ("domain", "category", "tier", "used") if group.get(name)]
    facts.append(f"mean score {mean_score(group):.2f}")
    console.print()
    console.rule(Text(f"{plain(group.get('task'))}  {plain(', '.join(facts))}"), align="left", characters="─")
    for kind, files in pictures(group, folder):
        console.print(_picture(console, kind, files), no_wrap=True, crop=True)
    console.print(Text(plain(said(group))))
    console.print(Text.assemble(("truth: ", "dim"), (plain(group.get("truth")), "bold")))
    for answer in answers:
        colour = COLOURS.get(str(answer.get("outcome")), "")
        console.print(Text.assemble(("● ", colour), (plain(verdict(answer)), colour)))
        console.print(_indented(plain(answer.get("text"))))


def plain(value: Any) -> str:
    """Text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(value))


def _cut(answer: Row) -> str | None:
    return "forced" if answer.get("forced") else None


def _picture(console: Console, kind: str, files: Sequence[Path]) -> Any:
    """Half blocks where the terminal has colours, else the file's name."""
    from rich.text import Text

    if console.color_system is None:
        return Text(plain(f"[{kind}: {', '.join(map(str, files))}]"), style="dim")
    try:
        return blocks(opened(kind, files, LARGEST), console.width)
    except ValueError as error:
        return Text(plain(f"[{kind} not shown: {error}]"), style="dim")


def _indented(text: str) -> Any:
    """An answer, set off from its verdict; its thinking dim."""
    from rich.padding import Padding
    from rich.text import Text

    at = text.find("</think>")
    cut = at + len("</think>") if at >= 0 else 0
    return Padding(Text.assemble((text[:cut], "dim"), text[cut:]), (0, 0, 0, 2))
