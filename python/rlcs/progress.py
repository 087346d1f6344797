"""Progress bars with an estimate of the rest, on stderr where somebody looks; plain lines else."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10  # a plain line for each tenth of the way


class Bar:
    """``with Bar("training") as bar: bar(done, total, "loss 0.31")``; a quiet one says nothing."""

    def __init__(self, name: str, quiet: bool = False) -> None:
        self.name = name
        self.console = Console(stderr=True, quiet=quiet)
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[facts]}"),
        )  # fmt: skip
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._main = self._progress.add_task(name, total=1.0, facts="")
        self._inner: dict[str, int] = {}
        self._told = -1

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, done: float, total: float, facts: str = "") -> None:
        self._progress.update(self._main, completed=done, total=total, facts=facts)
        tenth = int(EVERY * done / total)
        if not self.console.is_terminal and tenth > self._told:
            self._told = tenth
            self.console.out(f"{self.name}: {done / total:.0%} {facts}", highlight=False)

    def note(self, line: str) -> None:
        """A line above the bar, as it is: brackets in it are no markup."""
        self.console.out(line, highlight=False)

    def inner(self, name: str) -> Callable[[int, int], None]:
        """A second bar for a stage; it goes when the stage is done."""

        def update(done: int, total: int) -> None:
            if name not in self._inner:
                self._inner[name] = self._progress.add_task(f"  {name}", total=total, facts="")
            task = self._progress.tasks[self._progress.task_ids.index(self._inner[name])]  # type: ignore[arg-type]
            self._progress.update(task.id, completed=done, total=total, visible=done < total)

        return update
