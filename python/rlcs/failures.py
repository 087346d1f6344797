"""What ends a run although neither its files nor the code are at fault: too little memory, weights that say nothing,
servers that don't answer.

The command tells it in a line, with what to do. Any other error is a fault of the code, which its traceback shows.
"""

from __future__ import annotations

import re

from .engines import EngineFault
from .feed import WorkerDied
from .memory import first_line, out_of_memory
from .parallel import Apart, lost, started_as
from .rollout import NotFinite

PLACE = re.compile(r"^\[[^]]*\] ")  # in gloo's source
LESS = "--rollout.rows or --rollout.cache-tokens (answers at once)"
TRAINING_LESS = f"--tokens (of a micro-step), {LESS}, or take --model.activation-checkpointing"
KEPT = "; what was saved is kept, and the same command goes on from there"


def told(command: str, error: Exception) -> str | None:
    """The line for an error that ended ``rlcs <command>``; None for a fault of the code."""
    training = command in ("sft", "train")
    first = first_line(error)
    if isinstance(error, NotFinite):
        rest = " If training made them so, lower --optimizer.lr and begin with an older checkpoint" if training else ""
        return first + rest
    if isinstance(error, EngineFault):
        return first + KEPT
    if isinstance(error, WorkerDied):
        return f"{first}; too little memory for its pictures? Lower --workers or --ahead{KEPT}"
    if isinstance(error, Apart):
        return f"{first}: a fault of the code{KEPT}"
    if lost(error):
        rank, size = started_as()
        said = PLACE.sub("", first).partition(". ")[0]
        more = "; if it was only slow, raise --parallel.timeout-s" if "timed out" in said.lower() else ""
        return f"rank {rank} of {size} has lost another one, which was killed or hangs ({said}){more}{KEPT}"
    if out_of_memory(error):
        return f"out of memory: {first}; lower {TRAINING_LESS if training else LESS}{KEPT if training else ''}"
    return None
