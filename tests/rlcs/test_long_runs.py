"""Long runs, of 2000 tiny steps, leave neither memory nor open files behind."""

import ctypes
import dataclasses
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import sft_config, train_config

from rlcs import evaluate
from rlcs.learner import Learner
from rlcs.rewards import Verdict
from rlcs.supervised import sft
from rlcs.trainer import train

STEPS = 2000  # of the optimizer
EVERY = 20  # steps memory is looked at


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads glibc's counts and /proc")
@pytest.mark.parametrize("command", ["sft", "train"])
def test_a_long_run_leaves_neither_memory_nor_files(command, demo, tmp_path, capsys):
    """In the second half of the run memory grows by less than a scalar tensor a step, the least that a step can leave
    of what it computes.

    It runs in a process of its own where Python's objects, too, are glibc's blocks: what is held is then known to the
    byte, and what is resident beside it is the allocator's. By the second half every task has been met many times, so
    the prompts that are kept are as many as there will be. A checkpoint is written each hundred steps of SFT, each
    hundred waves of two steps.
    """
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1"}
    process = [sys.executable, __file__, command, demo, tmp_path / "run"]
    done = subprocess.run(process, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(command, found)
    assert found["steps"] >= STEPS
    assert found["held"]["slope"] < found["tensor"] and found["resident"]["slope"] < found["tensor"]
    assert found["files"]["most"] == found["files"]["first"]


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def held():
    """Bytes that have been asked for and not given back, of all of glibc's arenas."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident():
    """What the process has in memory, without what its allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as found:
        return int(found.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len(os.listdir("/proc/self/fd"))


def tensor_bytes(count=1000):
    """What a tensor of one number holds."""
    kept = [None] * count
    before = held()
    for i in range(count):
        kept[i] = torch.zeros(())
    return (held() - before) / count


def measured(command, demo, out):
    """A run, and the memory and the files that it has behind each so many steps."""
    torch.set_num_threads(1)
    steps, seen, update = itertools.count(1), [], Learner.update

    def watched(self, *arguments):
        found, step = update(self, *arguments), next(steps)
        if step % EVERY == 0:
            gc.collect()
            seen.append((step, held(), resident(), open_files()))
        return found

    Learner.update = watched
    turn = itertools.cycle((0.0, 1.0))  # every other answer is right, whatever it says: each group is one to learn from
    evaluate.verify = lambda *_: Verdict("score", next(turn))
    call, config = {
        "sft": lambda: (sft, sft_config(demo, out, batch=2, buffer=16)),
        "train": lambda: (train, train_config(demo, out, groups=2, act_on_alarms=False)),
    }[command]()
    each = 1 if command == "sft" else config.updates
    run = dataclasses.replace(config.run, steps=STEPS // each, save_every=100, keep=2)
    call(dataclasses.replace(config, run=run), lambda _: None)
    step, *kinds = np.array(seen[len(seen) // 2 :]).T
    facts = {"steps": int(step[-1]), "tensor": tensor_bytes()}
    for name, values in zip(("held", "resident", "files"), kinds, strict=True):
        slope = float(np.polyfit(step, values.astype(float), 1)[0])
        facts[name] = {"first": int(values[0]), "most": int(values.max()), "last": int(values[-1]), "slope": slope}
    return facts


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], *map(Path, sys.argv[2:]))))
