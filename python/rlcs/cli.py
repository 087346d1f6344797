"""The `rlcs` command: exits with 0 when all is well, 2 where the input is at fault, else 1; errors are one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NEEDS = ("typer", "rich", "numpy", "sympy", "math_verify", "pint")  # what the extra [rlcs] brings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        print(f"rlcs: {', '.join(missing)} must be installed: pip install 'glm4v-ext[rlcs]'", file=sys.stderr)
        sys.exit(1)
    import typer

    app = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="RLCS for GLM-4.1V."
    )
    app.callback()(_program)
    app.command()(verify)
    try:
        app(None if arguments is None else list(arguments), prog_name="rlcs")
    except (ValueError, OSError) as error:
        print(f"rlcs: {error}", file=sys.stderr)
        sys.exit(2)


def _program() -> None:
    """Reinforcement learning with curriculum sampling."""


def verify(
    domain: list[str] | None = None, verifier: str | None = None, cases: Path | None = None, show: int = 5
) -> None:
    """Checks verifiers on golden cases and their rewritings, and prints false positives and negatives.

    --domain D: only these (may be given several times). --verifier module:name: another verifier in their place.
    --cases FILE: JSON lines with domain, answer, truth, expect (a score) and perhaps question, in place of the golden
    ones. --show N: faults printed per domain. Exit code 1 when a verdict was wrong.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from . import rewards
    from .rewards import kit

    rows = kit.read_cases(cases or kit.GOLDEN)
    if domain:
        known = {row["domain"] for row in rows}
        if unknown := [name for name in domain if name not in known]:
            raise ValueError(f"verify: --domain must be one of {', '.join(sorted(known))}, got {unknown[0]}")
        rows = [row for row in rows if row["domain"] in domain]

    def judging(name: str, response: str, truth: str, question: str | None) -> rewards.Verdict:
        return rewards.verify(verifier or name, response, truth, question)

    every = list(kit.cases_of(rows))
    errors = Console(stderr=True)
    tallies = kit.check(
        judging, track(every, "verdicts", console=errors, transient=True, disable=not errors.is_terminal)
    )
    table = Table("domain", "cases", "false positives", "false negatives", "errors")
    for name, tally in tallies.items():
        rates = (f"{n} ({n / tally.cases:.1%})" for n in (tally.false_positives, tally.false_negatives))
        table.add_row(name, str(tally.cases), *rates, str(tally.errors))
    Console().print(table)
    for name, tally in tallies.items():
        for fault in tally.faults[:show]:
            print(f"{name}: {fault}")
    if any(tally.faults for tally in tallies.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
