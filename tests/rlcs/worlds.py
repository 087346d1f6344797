"""Worlds of several processes (gloo, on the CPU) for tests: ranks that meet in a file."""

import os
import tempfile

import torch
import torch.distributed
from torch import multiprocessing

from rlcs import parallel

PRELOADED = [
    "rlcs.trainer", "rlcs.supervised", "torch.distributed.fsdp", "torch.distributed.checkpoint",
    "torch.utils.tensorboard.writer", "pytest", "yaml",
]  # fmt: skip


def member(rank, jobs, store, folder):
    """One of several processes: for each job in turn a rank of its world, or nobody."""
    torch.set_num_threads(1)
    for i, (size, call, arguments) in enumerate(jobs):
        if rank < size:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
            parallel.meet(torch.distributed.FileStore(f"{store}/{i}", size))
            call(*arguments, folder=folder)
            parallel.leave()


def in_worlds(jobs, folder):
    """Runs ``(size, call, arguments)`` one after the other, each on so many ranks."""
    multiprocessing.set_forkserver_preload(PRELOADED)  # one import for all
    count = max(size for size, *_ in jobs)
    with tempfile.TemporaryDirectory() as store:
        multiprocessing.start_processes(member, (jobs, store, folder), count, start_method="forkserver")
