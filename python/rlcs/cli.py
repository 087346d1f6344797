"""The `rlcs` command: exits with 0 when all is well, 2 where the input is at fault, 130 where it was stopped, else 1.

Errors are one line. `sft` and `train` take a YAML file by ``--config`` and any setting as a flag over it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from glm4v.output import let_go

from .launch import started_as

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

NEEDS = (
    "tyro", "rich", "yaml", "pydantic", "tensorboard", "matplotlib", "pyarrow", "sympy", "math_verify", "pint",
    "safetensors", "tokenizers", "jinja2", "PIL", "av",
)  # fmt: skip
"""What the extra [rlcs] brings."""

DISTRIBUTED = ("sft", "train")
"""Commands that torchrun may start in several processes."""

AGAIN = {"verify": ("--domain",)}
"""Flags of commands that may stand more than once; each time adds a value."""

FLAG = re.compile(r"--[a-z][\w.-]*")

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        _tell(f"rlcs: {', '.join(missing)} must be installed: pip install 'glm4v-ext[rlcs]'")
        sys.exit(1)
    try:
        rank, size = started_as()
    except ValueError as error:
        print(f"rlcs: {error}", file=sys.stderr)
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it has no sign for is no reason to lose a table of scores
        sys.stdout.reconfigure(errors="backslashreplace")
    several = size > 1
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    threading.excepthook = functools.partial(_of_a_thread, threading.excepthook)
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    try:
        code = _run(name, given[1:], several)
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would be told with a traceback, by what runs at exit
        _tell(f"rlcs {name}: interrupted{f': {stop}' if str(stop) else ''}")
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        let_go()
        sys.exit(1)
    except (ValueError, OSError) as error:
        _tell(f"rlcs: {error}")
        let_go()
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        from .failures import told

        if (said := told(name, error)) is None:
            raise
        _tell(f"rlcs: {said}")
        sys.exit(1)


def _of_a_thread(others: Callable[[threading.ExceptHookArgs], Any], ended: threading.ExceptHookArgs) -> None:
    """What ends a thread is told with a traceback; but where TensorBoard's cannot write, the trainer is told too, and
    says it in a line."""
    if not (issubclass(ended.exc_type, OSError) and type(ended.thread).__module__.startswith("tensorboard.")):
        others(ended)


def _run(name: str, arguments: list[str], several: bool) -> Any:
    """Exit code of a command, also where it leaves by itself, as behind its --help."""
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        from glm4v_ext import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        _tell(f"rlcs: the command must be one of {', '.join(COMMANDS)}, got {name}")
        return 2
    if several and name not in DISTRIBUTED:
        _tell(f"rlcs: torchrun must start one of {', '.join(DISTRIBUTED)}, got {name}")
        return 2
    _expect_once(name, arguments)
    try:
        return (_with_others(COMMANDS[name], arguments) if several else COMMANDS[name](arguments)) or 0
    except SystemExit as end:
        return end.code


def _expect_once(name: str, arguments: Sequence[str]) -> None:
    """Refuses a flag that stands twice, of which the parser takes the last, a list's values with it. A setting's flag
    and its ``--no-`` are one."""
    found = set[str]()
    for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
        flag = argument.partition("=")[0].replace("_", "-")
        if not FLAG.fullmatch(flag) or flag in AGAIN.get(name, ()):
            continue
        before, dot, last = flag.removeprefix("--").rpartition(".")
        setting = f"--{before}{dot}{last.removeprefix('no-')}"
        if setting in found:
            several = "all values of a list stand behind one"
            raise ValueError(f"{name}: a flag must stand once ({several}), got {setting} twice")
        found.add(setting)


def _with_others(command: Callable[[list[str]], Any], arguments: list[str]) -> int:
    """One of torchrun's processes; it takes its leave only where all is well, since else nobody may be there."""
    from . import parallel

    def ask(number: int, frame: Any) -> None:
        parallel.expect_neighbours()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    parallel.meet()
    signal.signal(signal.SIGTERM, ask)
    try:
        code = command(arguments) or 0
    except SystemExit as end:  # by SIGTERM, say, with all saved
        if end.code:
            raise
        code = 0
    parallel.leave()
    if not code:
        _end()
    return code


def _end() -> NoReturn:
    """The end of one of several processes where all is well, past Python's own: DTensor's caches keep groups that are
    left, and with them threads of gloo's, of which one that then drops a tensor aborts the process (pytorch#190489)."""
    sys.stdout.flush()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tell(line: str) -> None:
    """What ends the command; of several processes by one."""
    parallel = sys.modules.get(f"{__package__}.parallel")
    if started_as()[0] == 0 if parallel is None else parallel.first_to_tell():
        print(line, file=sys.stderr)


def sft(arguments: list[str]) -> None:
    """Supervised training: a cold start on answers with thinking, or (--all-tokens) pre-training on documents."""
    from .config import PRESETS, SftConfig
    from .supervised import sft as run

    preset = _take(arguments, "--preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"sft: --preset must be one of {', '.join(PRESETS)}, got {preset}")
    _print_scores(run(_configuration(SftConfig, "sft", sft, arguments, PRESETS.get(preset or "", {}))))


def train(arguments: list[str]) -> None:
    """Reinforcement learning with curriculum sampling."""
    from .config import TrainConfig
    from .trainer import train as run

    _print_scores(run(_configuration(TrainConfig, "train", train, arguments)))


def evaluate(arguments: list[str]) -> None:
    """Answers held-out tasks, sampled and greedy, and prints scores with their errors."""
    from .evaluate import evaluate_files as run

    _print_scores(_called(run, "eval", arguments))


def verify(arguments: list[str]) -> int:
    """Checks verifiers on golden cases and their rewritings: false positives and negatives."""
    from .verify import verify as run

    return _called(run, "verify", arguments)


def show(arguments: list[str]) -> None:
    """Prints prompts, pictures, answers and verdicts of one wave."""
    from .show import show as run

    _called(run, "show", arguments)


def report(arguments: list[str]) -> None:
    """Makes one HTML page, plots inline, of one run or several side by side."""
    from .report import report as run

    print(_called(run, "report", arguments))


def demo(arguments: list[str]) -> None:
    """Teaches a tiny GLM-4.1V to see and answer, in minutes on a CPU: cold start, RLCS, control, report."""
    from .demo import demo as run

    _called(run, "demo", arguments)


def plan(arguments: list[str]) -> None:
    """Says what a run on N GPUs costs, by arithmetic: memory, FLOPs, communication, seconds of a wave."""
    from tyro.conf import OmitArgPrefixes

    from .plan import plan_command as run

    _called(run, "plan", arguments, config=(OmitArgPrefixes,))


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "sft": sft, "train": train, "eval": evaluate, "verify": verify, "show": show, "report": report, "demo": demo,
    "plan": plan,
}  # fmt: skip


def _overview() -> str:
    lines = [f"  {name:8}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    usage = "usage: rlcs COMMAND [--help] ..., rlcs --version"
    return "\n".join([usage, "", "Reinforcement learning with curriculum sampling.", "", *lines])


def _configuration(
    kind: type[T], name: str, command: Callable[..., Any], arguments: list[str], preset: dict[str, Any] | None = None
) -> T:
    """The settings of a command: those of ``--config FILE``, over a preset's, under the flags."""
    from .config import read

    path = _take(arguments, "--config")
    default = read(kind, None if path is None else Path(path), preset)
    extra = "--config FILE: settings from a YAML file; flags go over them."
    if preset is not None:
        extra += " --preset pretrain|long-context|sft: the paper's stages."
    return _parsed(kind, name, arguments, default=default, description=f"{command.__doc__}\n\n{extra}")


def _called(function: Callable[..., T], name: str, arguments: list[str], **options: Any) -> T:
    """The function with the arguments that its flags say."""

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], T]:
        return functools.partial(function, *args, **kwargs)

    return _parsed(bound, name, arguments, **options)()


def _parsed(target: Callable[..., T], name: str, arguments: list[str], **options: Any) -> T:
    """What the flags make of ``target``; the parser's framed errors become one line."""
    import tyro
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.primitive_rule(_path_rule)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, args=arguments, prog=f"rlcs {name}", registry=registry, **options)
    except SystemExit as end:
        if not end.code:
            raise
        found = [row.strip("│ ") for row in said.getvalue().splitlines()[1:]]  # behind the title
        rows = itertools.dropwhile(_is_rule, found)  # one is under it where the output's encoding has no frames
        words = itertools.takewhile(lambda row: not _is_rule(row), rows)
        raise ValueError(f"{' '.join(words)} (see rlcs {name} --help)") from None


def _path_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path | None] | None:
    """Paths as the parser has them, but none of an empty text, which a shell makes of a variable that is not set: it
    would be the folder one is in."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type not in (Path, Path | None):
        return None
    optional = info.type is not Path

    def read(values: list[str]) -> Path | None:
        if not values[0]:
            raise ValueError("must be a path, got ''")
        return None if optional and values == ["None"] else Path(values[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|PATH" if optional else "PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path) or (optional and value is None),
        str_from_instance=lambda path: [str(path)],
    )


def _is_rule(row: str) -> bool:
    return set(row) <= {"─", "-"}


def _take(arguments: list[str], flag: str) -> str | None:
    """Removes ``flag VALUE`` (or ``flag=VALUE``) from the arguments."""
    for i, argument in enumerate(arguments):
        if argument == flag:
            if i + 1 == len(arguments):
                raise ValueError(f"{flag} must have a value, got none")
            value = arguments[i + 1]
            del arguments[i : i + 2]
        elif argument.startswith(flag + "="):
            value = arguments.pop(i).partition("=")[2]
        else:
            continue
        if not value:
            raise ValueError(f"{flag} must have a value, got ''")
        return value
    return None


def _print_scores(scores: Sequence[Any]) -> None:
    from . import parallel
    from .evaluate import table

    if scores and parallel.first():
        from rich.console import Console

        Console().print(table(scores))


if __name__ == "__main__":
    main()
