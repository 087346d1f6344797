"""The `glm4v` command: what it needs, and how it ends.

It exits with 0 when all went well, with 2 where the input is at fault (an option, a file, a prompt, a checkpoint), and
with 1 for everything else: an interruption, a reader that left, a full disk. Errors are one line on stderr.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from traceback import extract_tb

from .errors import InputError
from .output import let_go

NEEDS = ("typer", "rich", "safetensors", "tokenizers", "jinja2", "PIL", "av")  # what the extra [model] brings


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        print(f"glm4v: {', '.join(missing)} must be installed: pip install 'glm4v-ext[model]'", file=sys.stderr)
        sys.exit(1)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    warnings.formatwarning = lambda message, *_, **__: f"glm4v: {message}\n"
    try:
        code = run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the answer has left
        code = 1
    except (Exception, KeyboardInterrupt) as error:
        code, line = explain(error)
        print(f"glm4v: {line}", file=sys.stderr)
    let_go()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Parses and invokes. Typer's own `main` would answer errors and Ctrl-C in its way."""
    import typer

    from .commands import app

    command = typer.main.get_command(app)
    try:
        with command.make_context("glm4v", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:  # --help, --version
        return end.exit_code
    return 0


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code of an error, and the line that says what went wrong."""
    if isinstance(error, KeyboardInterrupt):
        return 1, "interrupted"
    usage = getattr(error, "format_message", None)  # typer's usage errors have it, whichever click they come from
    if usage is not None:
        return 2, f"{usage().rstrip('.')} (see --help)"
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError) or (isinstance(error, OSError) and error.filename is not None):
        return 2, line
    frames = extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return 1, f"{type(error).__name__}: {line}{where}"


if __name__ == "__main__":
    main()
