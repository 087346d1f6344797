"""What each row of `bench_rlcs.py` does, and with which settings.

A row is ``(work folder, run folder, seed, settings, quick) -> metrics``, called in a process of its own. All rows of a
seed begin with the same cold start.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

GROUP, GROUPS, WAVES = 8, 32, 150  # answers to a prompt, valid groups of a step, steps of a run
COLD_STEPS, COLD_BATCH = 700, 32
EVAL_EVERY, EVAL_LIMIT, EVAL_SAMPLES = 10, 100, 2
ABLATE_WAVES, MATRIX_WAVES = 80, 100
# Of `matrix`, whose steps are of few groups, and of `hack`, which the demo's rate ends in eight waves.
SLOW = {"lr": 1e-4}
HACK_WAVES, HACK_EVAL, HACK_LIMIT = 60, 2, 200  # looked at closely: the verifier is found out soon
DOMAINS = ("ocr", "counting", "math", "chart", "grounding", "video")
ARMS: dict[str, dict[str, Any]] = {  # of `compare`: changes to the training settings
    "rlcs": {},
    # Its steps have half the rollouts of the others' or fewer: as many more of them, as often looked at.
    "uniform": {"curriculum": {"weighting": False, "expansion": "off"}, "run": {"steps": 300, "eval_every": 20}},
    "refill": {"curriculum": {"weighting": False, "expansion": "off"}, "refill": True},
}
ABLATIONS: dict[str, dict[str, Any]] = {  # `compare/rlcs` is what they are held against
    "no-weights": {"curriculum": {"weighting": False}},
    "no-expansion": {"curriculum": {"expansion": "off"}},
    "no-forcing": {"rollout": {"thinking_budget": None}},
    "symmetric-clip": {"loss": {"clip_high": 0.2}},
    "kl": {"loss": {"kl": 0.05}},
    "top-p": {"rollout": {"top_p": 0.9}},
    "milder-weights": {"curriculum": {"tier_weights": (0.2, 0.7, 1.0, 0.9, 0.5), "category_floor": 0.6}},
}
HACKED = "counting_lax"  # a verifier that takes any number that is not too small
DEMO_SECONDS = 60 * 5.8  # the demo's own budget
LONG = 2.0  # budgets of the demo that goes further


def rows() -> dict[str, tuple[Callable[..., dict[str, Any]], int, dict[str, Any]]]:
    """Name -> (what runs, seed, its settings), in the order in which they should be made."""
    found: dict[str, tuple[Callable[..., dict[str, Any]], int, dict[str, Any]]] = {}
    found |= {f"speed/threads{n}": (speed, 0, {"threads": n}) for n in (1, 2)}
    found |= {f"compare/{arm}/seed{s}": (trained, s, change) for s in range(5) for arm, change in ARMS.items()}
    found |= {
        f"hack/{arm}/seed{s}": (hacked, s, {"act_on_alarms": arm == "alarms"})
        for s in range(3)
        for arm in ("alarms", "none")
    }
    found |= {
        f"ablate/{arm}/seed{s}": (trained, s, {**change, "run": {"steps": ABLATE_WAVES}})
        for s in range(3)
        for arm, change in ABLATIONS.items()
    }
    found |= {
        f"matrix/{domain}/seed{s}": (matrix, s, {"domain": domain}) for s in range(3) for domain in ("mix", *DOMAINS)
    }
    found |= {f"demo/seed{s}": (demonstrated, s, {}) for s in range(3)}
    found |= {"demo/long/seed0": (demonstrated, 0, {"budget": LONG})}
    return found


def prepared(work: Path, seed: int, quick: bool) -> tuple[Path, Path]:
    """The seed's files and its cold start, made once; other rows of the seed wait for the first."""
    from rlcs import demo
    from rlcs.checkpoint import latest
    from rlcs.supervised import sft

    folder = work / f"{'quick' if quick else 'cold'}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / "start"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not start.exists():
            if quick:
                demo.COLD_SAMPLES, demo.PROMPTS, demo.HELD_OUT = 60, 60, 4
            demo.prepare(folder, seed, full=False)
            cold, *_ = demo.configurations(folder, 1.0, seed, start)
            run = dataclasses.replace(cold.run, out=folder / "sft", seconds=None, steps=3 if quick else COLD_STEPS)
            shutil.rmtree(run.out, ignore_errors=True)
            sft(dataclasses.replace(cold, run=run, batch=COLD_BATCH))
            saved = latest(run.out / "checkpoints")
            assert saved is not None, "a run that ended well has a checkpoint"
            shutil.copytree(saved.folder, folder / "start.part", dirs_exist_ok=True)
            (folder / "start.part").rename(start)
    return folder, start


def settings_of(work: Path, out: Path, seed: int, changes: dict[str, Any], quick: bool) -> Any:
    """The demo's settings of RL, bounded by steps, at a constant rate, with evaluations on the way, and ``changes``.

    Alarms are written down and act on nothing, but where a row is about them.
    """
    from rlcs import demo

    folder, start = prepared(work, seed, quick)
    _, config, _ = demo.configurations(folder, 1.0, seed, start)
    shutil.rmtree(out, ignore_errors=True)
    steps, every = (2, 1) if quick else (WAVES, EVAL_EVERY)
    run = dataclasses.replace(config.run, out=out, seconds=None, steps=steps, eval_every=every)
    config = dataclasses.replace(
        config,
        run=run,
        optimizer=dataclasses.replace(config.optimizer, decay="constant", warmup=0.0),
        eval=dataclasses.replace(config.eval, limit=4 if quick else EVAL_LIMIT, samples=EVAL_SAMPLES, greedy=False),
        groups=4 if quick else GROUPS,
        act_on_alarms=False,
    )
    return changed(config, {name: change for name, change in changes.items() if not (quick and name == "run")})


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A frozen configuration with some settings replaced, in its parts too."""
    found = {name: getattr(config, name) for name in changes}
    parts = {k: changed(found[k], v) if dataclasses.is_dataclass(found[k]) else v for k, v in changes.items()}
    return dataclasses.replace(config, **parts)


def trained(work: Path, out: Path, seed: int, changes: dict[str, Any], quick: bool) -> dict[str, Any]:
    """A run of RL: held-out scores on the way, with what each had cost; scores before and after by domain."""
    from rlcs.logs import read_metrics
    from rlcs.trainer import train

    train(settings_of(work, out, seed, changes, quick), lambda line: None)
    curve, totals, seconds, rewards = [], dict[str, float](), 0.0, defaultdict[str, list[float]](list)
    for row in read_metrics(out):
        if row["kind"] == "wave":
            totals = {name: row[f"total/{name}"] for name in ("waves", "rollouts", "sampled_tokens", "trained_tokens")}
            seconds = row["seconds"]
            for name in [name for name in row if name.startswith("reward/")]:
                rewards[name.split("/")[1]].append(row[name])
        elif row["kind"] == "eval":
            scores = {k.split("/")[1]: v for k, v in row.items() if k.startswith("sampled/") and k.count("/") == 1}
            since = {domain: sum(found) / len(found) for domain, found in rewards.items()}  # of training
            curve.append({"step": row["step"], "seconds": seconds, **totals, "scores": scores, "rewards": since})
            rewards.clear()
    waves = [row for row in read_metrics(out) if row["kind"] == "wave"]
    means = ("reward", "valid_share", "draws", "forced", "trained_groups", "tokens_per_s/rollout", "entropy")
    return {
        "curve": curve,
        "means": {
            name: mean(known) if (known := [row[name] for row in waves if name in row]) else None for name in means
        },
        "alarms": [row["alarm"] for row in read_metrics(out) if row["kind"] == "alarm"],
    }


def matrix(work: Path, out: Path, seed: int, changes: dict[str, Any], quick: bool) -> dict[str, Any]:
    """RL on one domain or on the mix, each domain with as many groups a step; draws are uniform: equal shares."""
    domain = changes["domain"]
    folder, _ = prepared(work, seed, quick)
    tasks = folder / f"train-{domain}.jsonl"
    if not tasks.exists():
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        part = tasks.with_suffix(f".{os.getpid()}")
        part.write_text("".join(line for line in lines if domain in ("mix", json.loads(line)["domain"])))
        part.rename(tasks)
    groups = 1 if quick else 8
    uniform = {
        "tasks": tasks,
        "groups": groups * (len(DOMAINS) if domain == "mix" else 1),
        "updates": 1,
        "curriculum": {"weighting": False, "expansion": "off"},
        "run": {"steps": MATRIX_WAVES},
        "optimizer": SLOW,
    }
    return trained(work, out, seed, uniform, quick)


def hacked(work: Path, out: Path, seed: int, changes: dict[str, Any], quick: bool) -> dict[str, Any]:
    """RL where counting is judged by a verifier that can be hacked; held-out counting is judged strictly."""
    from rlcs.rewards import Verdict, graded, register

    def lax(answer: str, truth: str, question: str | None) -> Verdict:
        numbers = re.findall(r"\d+", answer)
        return graded(float(bool(numbers) and int(numbers[0]) >= int(truth)))

    register(HACKED, lax)
    folder, _ = prepared(work, seed, quick)
    tasks = folder / "train-hack.jsonl"
    if not tasks.exists():
        part = tasks.with_suffix(f".{os.getpid()}")
        part.write_text((folder / "train.jsonl").read_text().replace('"domain": "counting"', f'"domain": "{HACKED}"'))
        part.rename(tasks)
    run = {"steps": HACK_WAVES, "eval_every": HACK_EVAL}
    settings = {
        **changes,
        "tasks": tasks,
        "proxies": {HACKED: "counting"},
        "run": run,
        "optimizer": SLOW,
        "alarms": {"patience": 1},
        "eval": {} if quick else {"limit": HACK_LIMIT, "samples": 1},
    }
    return trained(work, out, seed, settings, quick)


def demonstrated(work: Path, out: Path, seed: int, changes: dict[str, Any], quick: bool) -> dict[str, Any]:
    """The demo's three runs with its own settings, one after the other: scores by domain, sampled and greedy, at the
    end and, in a long one, on the way."""
    from rlcs import demo
    from rlcs.checkpoint import latest
    from rlcs.logs import read_metrics
    from rlcs.supervised import sft
    from rlcs.trainer import train

    seconds = 6.0 if quick else DEMO_SECONDS * changes.get("budget", 1.0)
    if quick:
        demo.COLD_SAMPLES, demo.PROMPTS, demo.HELD_OUT = 60, 60, 4
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    demo.prepare(out, seed, full=False)
    cold, *_ = demo.configurations(out, seconds, seed, out)
    sft(cold)
    start = latest(cold.run.out / "checkpoints")
    assert start is not None, "a run that ended well has a checkpoint"
    _, rl, control = demo.configurations(out, seconds, seed, start.folder)
    train(rl)
    sft(control)
    found = {name: [r for r in read_metrics(out / name) if r["kind"] == "eval"] for name in ("cold", "rlcs", "control")}

    def kept(key: str) -> bool:
        return key.startswith(("sampled/", "greedy/")) and (key.count("/") == 1 or key.endswith("/error"))

    ends = {name: {key: value for key, value in seen[-1].items() if kept(key)} for name, seen in found.items()}
    known = ("step", "seconds", "sampled/all", "greedy/all")
    curves = {name: [{key: row[key] for key in known} for row in seen] for name, seen in found.items()}
    return {"ends": ends, "curves": curves}


def speed(work: Path, out: Path, seed: int, changes: dict[str, Any], quick: bool) -> dict[str, Any]:
    from rlcs_speed import speed as race

    config = settings_of(work, out, seed, {}, quick)
    config = changed(config, {"run": {"threads": changes["threads"]}})  # the run sets them
    return race(config, *((4, 1) if quick else (32, 4)))
