"""Ranks that die: the others say so, and the run goes on from what was saved."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranked_runs import expect_equal, rl_config, rows_of, tensors_of
from torch import multiprocessing
from worlds import in_worlds

from rlcs import checkpoint, parallel
from rlcs.config import ParallelSettings, plain
from rlcs.failures import told
from rlcs.run import Run

pytestmark = pytest.mark.long


def torchrun(config, count, folder):
    """A run by torchrun."""
    file = folder / f"{config.run.out.name}.yaml"
    file.write_text(json.dumps(plain(config)))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    return subprocess.Popen(
        [*command, "-m", "rlcs", "train", "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def worker_of(process, rank):
    """The process that torchrun has started for a rank."""
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{number}/environ").read_bytes().split(b"\0"):
            return int(number)
    raise AssertionError(f"no rank {rank}")


def bereft_job(*, folder):
    """The second rank is killed while the first one works for itself, which hears of it by SIGTERM, as by torchrun."""
    parallel.join("cpu", ParallelSettings())
    notes = []
    run = SimpleNamespace(asked=0, note=notes.append)
    with pytest.raises(parallel.Lost) as lost, Run.stoppable(run):
        parallel.expect_neighbours()
        parallel.gather(None)
        if parallel.rank():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    assert not notes and not run.asked
    (folder / "told").write_text(told("train", lost.value))
    os._exit(0)  # nobody is there to take leave of


def test_a_rank_that_is_left_behind_says_so_wherever_it_is(tmp_path):
    with pytest.raises(multiprocessing.ProcessExitedException, match="SIGKILL"):
        in_worlds([(2, bereft_job, ())], tmp_path)
    assert (
        "rank 0 of 2 has lost another one, which was killed or hangs (rank 1 has ended); what was saved"
        in (tmp_path / "told").read_text()
    )


def test_a_rank_that_was_only_slow(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = told("train", RuntimeError("[/gloo/buffer.cc:71] Timed out waiting 60000ms for send operation to complete"))
    assert "to complete); if it was only slow, raise --parallel.timeout-s; what was saved is kept" in said


def test_a_checkpoint_is_not_to_blame_where_a_rank_is_lost(tmp_path, monkeypatch):
    def cut(*_):
        raise RuntimeError("[/third_party/gloo/pair.cc:553] Connection closed by peer [::1]. This is a long story")

    monkeypatch.setattr(checkpoint, "_read_file", cut)
    saved = checkpoint.Saved(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.safetensors cannot be read"):
        saved.tensors()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="Connection closed") as error:
        saved.tensors()
    assert "which was killed or hangs (Connection closed by peer [::1]); " in told("train", error.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_and_it_goes_on_to_the_bit(rank, demo, tmp_path):
    whole, cut = (rl_config(demo, tmp_path / name, steps=4) for name in ("whole", "cut"))
    process = torchrun(whole, 2, tmp_path)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    process = torchrun(cut, 2, tmp_path)
    while process.poll() is None and len(checkpoint.every(cut.run.out / "checkpoints")) < 2:
        time.sleep(0.02)
    os.kill(worker_of(process, rank), signal.SIGKILL)
    start = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - start < 60
    lines = [line for line in said.splitlines() if line.startswith("rlcs: ")]
    assert len(lines) == 1 and f"rank {1 - rank} of 2 has lost another one" in lines[0], said
    process = torchrun(cut, 2, tmp_path)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert rows_of(cut.run.out) == rows_of(whole.run.out)
    expect_equal(tensors_of(cut.run.out), tensors_of(whole.run.out))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [None, 1])
def test_sigterm_saves_and_torchrun_alone_calls_it_a_failure(rank, demo, tmp_path):
    """It raises when it gets the signal, whatever its workers return; where a worker gets it, all end with 0."""
    config = rl_config(demo, tmp_path / "run", steps=400)
    process = torchrun(config, 2, tmp_path)
    while process.poll() is None and len(checkpoint.every(config.run.out / "checkpoints")) < 1:
        time.sleep(0.02)
    os.kill(process.pid if rank is None else worker_of(process, rank), signal.SIGTERM)
    out, said = process.communicate(timeout=120)
    step = checkpoint.latest(config.run.out / "checkpoints").step
    assert f"step {step} is saved in" in out and "has lost another one" not in said
    assert process.returncode == (1 if rank is None else 0), said
