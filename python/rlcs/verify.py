"""`rlcs verify`: the golden cases of every domain, rewritten in many ways, against the verifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction

from . import rewards
from .rewards import kit


def verify(
    domain: Annotated[tuple[str, ...], UseAppendAction] = (),
    verifier: str | None = None,
    cases: Path | None = None,
    show: int = 5,
) -> int:
    """Checks verifiers on golden cases and their rewritings, and prints false positives and negatives.

    Args:
        domain: only these domains.
        verifier: another verifier in their place, as module:name; with --domain or --cases, which say what it judges.
        cases: a file of JSON lines with domain, answer, truth, expect (a score) and perhaps question, in place of the
            golden ones.
        show: faults printed per domain.

    Returns:
        1 when a verdict was wrong, else 0: the exit code.

    Raises:
        ValueError: a verifier cannot be loaded, has no judge or nothing that it should judge, or a file or a domain is
            not what it must be.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    rows = kit.read_cases(cases or kit.GOLDEN)
    if domain:
        known = {row["domain"] for row in rows}
        if unknown := [name for name in domain if name not in known]:
            raise ValueError(f"verify: --domain must be one of {', '.join(sorted(known))}, got {unknown[0]}")
        rows = [row for row in rows if row["domain"] in domain]
    for name in (verifier,) if verifier else dict.fromkeys(row["domain"] for row in rows):
        rewards.check(name)  # one that cannot be loaded would be an error in every case
    if verifier and not domain and cases is None:
        raise ValueError("verify: --verifier must come with --cases of its own, or with the --domain that it replaces")

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
    return int(any(tally.faults for tally in tallies.values()))
