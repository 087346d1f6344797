"""The `glm4v` command: what it needs, and how it ends.

It exits with 0 when all went well, with 2 where the input is at fault (an option, a file, a prompt, a checkpoint), and
with 1 for everything else, an interruption included. Errors are one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb

from .errors import InputError

EXTRA = "model"
NEEDS = ("typer", "rich", "safetensors", "tokenizers", "jinja2", "PIL", "av")  # what the extra brings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        print(f"glm4v: {', '.join(missing)} must be installed: pip install 'glm4v-ext[{EXTRA}]'", file=sys.stderr)
        sys.exit(1)
    try:
        from .commands import app

        code = app(args=arguments, prog_name="glm4v", standalone_mode=False) or 0
    except (Exception, KeyboardInterrupt) as error:
        code, line = explain(error)
        print(f"glm4v: {line}", file=sys.stderr)
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code of an error, and the line that says what went wrong."""
    import typer

    if isinstance(error, KeyboardInterrupt | typer.Abort):  # typer makes the second of the first
        return 1, "interrupted"
    usage = getattr(error, "format_message", None)  # typer's usage errors have it, whichever click they come from
    if usage is not None:
        return 2, f"{usage().rstrip('.')} (see --help)"
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError | OSError):
        return 2, line
    frames = extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return 1, f"{type(error).__name__}: {line}{where}"
