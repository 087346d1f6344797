"""`rlcs demo`: a tiny GLM-4.1V learns to see and answer, in minutes on two CPU cores.

The setting is the paper's in small: a cold start on few scans, with thinking traces; then reinforcement learning with
curriculum sampling on more prompts, with answers only. Beside it, for the same time on the other core, the control goes
on with the cold start. Both are held to scans that neither has seen. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import latest
from .config import EvalSettings, ModelSettings, RunSettings, SftConfig, TrainConfig, plain
from .curriculum import Settings as CurriculumSettings
from .files import write_text
from .logs import read_metrics
from .optimizer import OptimizerSettings
from .progress import Bar
from .rollout import RolloutSettings

COLD_SCANS, COLD_SAMPLES = 300, 6000
PROMPTS, HELD_OUT = 6000, 200  # prompts of RL, and held-out tasks of each domain
COLD_SHARE = 0.34  # of the budget; the rest is RL, beside the control
COLD_LR, LR, CONTROL_LR = 1e-3, 3e-4, 5e-4
LOOK = 600.0  # seconds of training from which on a demo also looks at itself on the way ...
LOOK_EVERY = {"rlcs": 50, "control": 250}  # ... after so many waves or steps, about half a minute
ROLLOUT = RolloutSettings(max_new_tokens=64, thinking_budget=40)


def demo(out: Path = Path("runs/demo"), budget: float = 5.8, seed: int = 0, full: bool = False) -> None:
    """Teaches a tiny GLM-4.1V to see and answer: cold start, RLCS beside a control, report, one answer.

    Args:
        out: where everything is written; a demo that is there is replaced.
        budget: minutes of training, cold start and RL together.
        seed: of the model, the tasks and the sampling.
        full: also GUI actions and comparisons of several images.
    """
    if not budget > 0:
        raise ValueError(f"demo: --budget must be above 0, got {budget}")
    if seed < 0:
        raise ValueError(f"demo: --seed must be 0 or more, got {seed}")
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").exists():
        raise ValueError(f"demo: --out must be empty or an earlier demo, got {out}")
    cold, *_ = configurations(out, 60 * budget, seed, out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_text(out / "demo.json", json.dumps({"budget": budget, "seed": seed, "full": full}) + "\n")
    prepare(out, seed, full)
    _write(cold, out / "cold.yaml")
    _say(
        f"1  cold start: {cold.run.seconds:.0f} s of SFT on {COLD_SAMPLES} samples of {COLD_SCANS} scans, with thinking"
    )
    _watch([_start("sft", out / "cold.yaml", core=None)], ["cold start"], [cold.run])
    start = latest(cold.run.out / "checkpoints")
    assert start is not None, "a run that ended well has a checkpoint"
    _, rl, control = configurations(out, 60 * budget, seed, start.folder)
    _write(rl, out / "rlcs.yaml")
    _write(control, out / "control.yaml")
    _say(
        f"2  for {rl.run.seconds:.0f} s: RLCS on {PROMPTS} prompts with answers only; the cold start's data as control"
    )
    names, runs = ["RLCS", "control"], [rl.run, control.run]
    commands = [("train", out / "rlcs.yaml"), ("sft", out / "control.yaml")]
    if (os.cpu_count() or 1) > 1:
        started = [_start(command, file, core) for core, (command, file) in enumerate(commands)]
        _watch(started, names, runs)
    else:
        for (command, file), name, run in zip(commands, names, runs, strict=True):
            _watch([_start(command, file, None)], [name], [run])
    from .report import report

    page = report((out / "cold", out / "rlcs", out / "control"), out=out / "report.html")
    final = latest(rl.run.out / "checkpoints")
    assert final is not None, "a run that ended well has a checkpoint"
    model = out / "final"
    shutil.copytree(final.folder, model, ignore=shutil.ignore_patterns("trainer.safetensors", "state.json"))
    _summary(out)
    _answer(model, out / "test.jsonl", seed)
    _say(f"report: {page}\nmodel, in Hugging Face layout: {model}\nrollouts: rlcs show {rl.run.out}")


def prepare(out: Path, seed: int, full: bool) -> None:
    """Writes tasks and the untrained model."""
    from .tasks import FULL, MAKERS, make_tasks
    from .tasks.files import write_tasks
    from .tiny import make_checkpoint

    makers = FULL if full else MAKERS
    with Bar("tasks") as bar:
        total, done = COLD_SAMPLES + PROMPTS + HELD_OUT * len(makers), 0

        def progress(_: int) -> None:
            nonlocal done
            done += 1
            bar(done, total)

        cold = list(make_tasks(COLD_SAMPLES, 10 * seed, makers=makers, scan_count=COLD_SCANS))
        write_tasks(out, "cold", cold, progress)
        write_tasks(out, "train", make_tasks(PROMPTS, 10 * seed + 1, makers=makers), progress)
        write_tasks(out, "test", make_tasks(HELD_OUT * len(makers), 10 * seed + 2, "test", makers), progress)
    make_checkpoint(out / "model", [text for task, response in cold for text in (task.question or "", response)], seed)


def configurations(out: Path, seconds: float, seed: int, start: Path) -> tuple[SftConfig, TrainConfig, SftConfig]:
    """Cold start, RLCS and control of a demo; the latter two begin with the checkpoint ``start``.

    Where there is time, their scores on the way are known too, for curves.
    """
    held_out = EvalSettings(out / "test.jsonl")
    run = RunSettings(out=out / "cold", seconds=seconds * COLD_SHARE, seed=seed, save_every=0, threads=1, keep=1)
    cold = SftConfig(
        data=out / "cold-answers.jsonl",
        model=ModelSettings(path=out / "model"),
        run=run,
        optimizer=OptimizerSettings(lr=COLD_LR, decay="constant"),  # its rate falls at the end of what follows
        eval=held_out,
        rollout=ROLLOUT,
        batch=32,
    )
    started = ModelSettings(path=start)
    rest = dataclasses.replace(run, seconds=seconds * (1 - COLD_SHARE))
    every = LOOK_EVERY if seconds >= LOOK else dict.fromkeys(LOOK_EVERY, 0)
    rl = TrainConfig(
        tasks=out / "train.jsonl",
        model=started,
        run=dataclasses.replace(rest, out=out / "rlcs", eval_every=every["rlcs"]),
        optimizer=OptimizerSettings(lr=LR, decay="tail", warmup=0.0, final=0.1),
        eval=held_out,
        rollout=ROLLOUT,
        curriculum=CurriculumSettings(group_size=8),
        groups=32,
        updates=2,
    )
    control = dataclasses.replace(
        cold,
        model=started,
        run=dataclasses.replace(rest, out=out / "control", eval_every=every["control"]),
        optimizer=OptimizerSettings(lr=CONTROL_LR, decay="tail", warmup=0.0),
    )
    return cold, rl, control


def _write(config: SftConfig | TrainConfig, path: Path) -> None:
    import yaml

    write_text(path, yaml.safe_dump(plain(config), sort_keys=False))


def _start(command: str, config: Path, core: int | None) -> subprocess.Popen[bytes]:
    """A run as a process of its own, on one core; what it says goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "rlcs.cli", command, "--config", str(config)]
    with open(config.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
    if core is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, {cores[core % len(cores)]})
    return process


def _watch(processes: Sequence[subprocess.Popen[bytes]], names: Sequence[str], runs: Sequence[RunSettings]) -> None:
    """Bars that follow the runs' metrics until all have ended.

    Raises:
        ValueError: a run has failed; the text holds its last line.
    """
    from contextlib import ExitStack

    try:
        with ExitStack() as stack:
            bar = stack.enter_context(Bar(", ".join(names)))
            updates = [bar.inner(name) for name in names] if len(names) > 1 else []
            while any(process.poll() is None for process in processes):
                shares = []
                for i, run in enumerate(runs):
                    rows = read_metrics(run.out)
                    seconds = rows[-1]["seconds"] if rows else 0.0
                    shares.append(min(1.0, seconds / (run.seconds or 1)))
                    if updates:
                        updates[i](int(1000 * shares[-1]), 1001)
                bar(min(shares), 1.0, "then held-out tasks" if min(shares) == 1 else "")
                time.sleep(0.5)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    for process, name, run in zip(processes, names, runs, strict=True):
        if process.returncode:
            log = run.out.parent / f"{run.out.name}.log"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing said"]
            raise ValueError(f"demo: {name} ended with {process.returncode}: {last[0]} ({log})")


def _summary(out: Path) -> None:
    """Held-out scores of the three runs, side by side."""
    from rich.console import Console
    from rich.table import Table

    names = ("cold", "rlcs", "control")
    rows = {name: [row for row in read_metrics(out / name) if row["kind"] == "eval"][-1] for name in names}

    def cell(row: dict[str, float], key: str) -> str:
        return f"{100 * row[key]:.1f} ± {100 * row[f'{key}/error']:.1f}"

    table = Table("held-out scans", "", "cold start", "+ RLCS", "+ SFT as long")
    for mode in ("sampled", "greedy"):
        for key in [key for key in rows["cold"] if key.startswith(f"{mode}/") and key.count("/") == 1]:
            domain, style = key.split("/")[1], "bold" if key.endswith("/all") else ""
            table.add_row(domain, mode, *(cell(row, key) for row in rows.values()), style=style)
    Console().print(table)
    gains = {name: 100 * (rows[name]["sampled/all"] - rows["cold"]["sampled/all"]) for name in names[1:]}
    gap = gains["rlcs"] - gains["control"]
    more = "RLCS gains more" if gap > 0 else "the control gains more"
    if abs(gap) < 2 * 100 * math.hypot(*(rows[name]["sampled/all/error"] for name in names[1:])):
        more = "none gains more beyond twice the error"
    _say(f"points at temperature 1: RLCS {gains['rlcs']:+.1f}, continued SFT {gains['control']:+.1f}: {more}")


def _answer(folder: Path, tasks: Path, seed: int) -> None:
    """Answers one held-out image in the terminal."""
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from glm4v import Glm4v

    from .data import read_tasks
    from .pictures import blocks, opened

    console = Console(highlight=False)
    task = [t for t in read_tasks(tasks) if t.domain == "ocr"][int(np.random.default_rng(seed).integers(HELD_OUT))]
    image = next(part["image"] for part in task.messages[0]["content"] if part["type"] == "image")
    if console.color_system is None:
        console.print(Text(f"[image: {image}]"))
    else:
        console.print(blocks(opened("image", [Path(image)], (112, 28)), min(console.width, 112)))
    model = Glm4v.from_pretrained(folder)
    (found,) = model.generate(task.messages, max_new_tokens=64, temperature=0)
    asked, truth = f"{task.question}  thinks: {found.thinking}  answers: ", f"  (truth: {task.truth})"
    console.print(Text.assemble(asked, (str(found.box), "bold"), truth))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
