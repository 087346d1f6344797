"""One run on several processes: who takes part, what they tell each other, and tensors of which each has rows.

`torchrun` starts the processes and restarts nothing. A process alone is a world of its own, for which every function
here does next to nothing. How the model lies on them: `fsdp`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from glm4v import InputError
from glm4v.device import device_of

from .bounds import LONGEST_S, WHOLE, expect_above_zero, expect_within
from .launch import local_rank, started_as
from .memory import first_line

if TYPE_CHECKING:  # a second to import, which one process has no use for
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
CUT = re.compile("gloo|nccl|connection (closed|reset)|timed out waiting|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class ParallelSettings:
    """How a run lies on the processes that torchrun has started; a single process needs none of it."""

    replicate: int = 1  # copies of the sharded weights: nodes, say, so that only gradients go between them
    timeout_s: float = 1800.0  # waited so long for, a process is lost and the run ends: longer than any wave takes

    def __post_init__(self) -> None:
        expect_within("parallel", self, replicate=(1, WHOLE))
        expect_above_zero("parallel", self, timeout_s=LONGEST_S)


class Apart(RuntimeError):
    """Ranks that should know the same don't."""


class Lost(RuntimeError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    neighbours: Mapping[int, int] = field(default_factory=dict)  # ranks of the same torchrun, and their processes


_world = World()
_store: dist.Store | None = None


# --- who takes part ---


def meet(store: dist.Store | None = None) -> None:
    """Finds the other processes, through torchrun's store or another one, so that one of them alone tells what ends
    them all: see `first_to_tell`."""
    global _store
    if _store is None and started_as()[1] > 1:
        try:
            _store = next(iter(dist.rendezvous("env://")))[0] if store is None else store
        except ValueError as error:
            due = "RANK, MASTER_ADDR and MASTER_PORT must be as torchrun sets them"
            raise ValueError(f"parallel: {due}: {first_line(error)}") from None


def join(device_name: str, settings: ParallelSettings) -> None:
    """Becomes one of the processes that torchrun has started."""
    global _world
    (rank, size), here = started_as(), device(device_name)
    if size == 1 or _world.size > 1:
        return
    if size % settings.replicate:
        raise ValueError(f"parallel: replicate must divide the {size} processes, got {settings.replicate}")
    from torch.distributed.device_mesh import init_device_mesh

    meet()
    backend = "gloo"
    if here.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(here)
    timeout = datetime.timedelta(seconds=settings.timeout_s)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
    shape: tuple[int, ...] = (settings.replicate, size // settings.replicate)
    if settings.replicate == 1:
        shape = shape[1:]
    _world = World(rank, size, init_device_mesh(here.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
    started_by = os.environ.get("GROUP_RANK")
    told = enumerate(gather((started_by, os.getpid())))
    _world = replace(_world, neighbours={rank: pid for rank, (by, pid) in told if by == started_by})


def leave() -> None:
    """Lets the others go, at the end."""
    global _world, _store
    if _world.size > 1:
        dist.destroy_process_group()
    _world, _store = World(), None


def size() -> int:
    return _world.size


def rank() -> int:
    return _world.rank


def mesh() -> DeviceMesh | None:
    """How ranks lie: copies, where there are several, by the shares of each."""
    return _world.mesh


def copies() -> int:
    """How often all ranks together have the weights."""
    return _world.mesh.size(0) if _world.mesh is not None and _world.mesh.ndim > 1 else 1


def first() -> bool:
    """Whether this is the process that logs, prints and writes."""
    return _world.rank == 0


def by_first(note: Callable[[str], None]) -> Callable[[str], None]:
    """``note`` on the process that prints; it says nothing on the others."""
    return note if started_as()[0] == 0 else lambda line: None


def first_to_tell() -> bool:
    """Whether nobody else has told what ends the run: an error is one line, by the rank that noticed it first."""
    if _store is None:  # they haven't met
        return started_as()[0] == 0
    try:
        return _store.add("rlcs/told", 1) == 1
    except RuntimeError:  # the store is gone with its process
        return True


def expect_neighbours() -> None:
    """To be asked on SIGTERM, by which torchrun also ends the processes that one of them has left behind.

    Raises:
        Lost: one has ended.
    """
    for rank, process in _world.neighbours.items():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            raise Lost(f"rank {rank} has ended") from None


def lost(error: BaseException) -> bool:
    """Whether this is how a process notices that another one of the run has gone."""
    if started_as()[1] == 1:
        return False
    return isinstance(error, Lost | dist.DistError) or CUT.search(str(error)) is not None


def device(name: str) -> torch.device:
    """The device of that name, of several the one that is this process's."""
    try:
        return device_of(f"cuda:{local_rank()}" if name == "cuda" and started_as()[1] > 1 else name)
    except InputError as error:
        raise ValueError(f"model: {error}") from None


# --- what ranks tell each other ---


def gather(value: T) -> list[T]:
    """Everybody's value, by rank."""
    if _world.size == 1:
        return [value]
    found: list[Any] = [None] * _world.size
    dist.all_gather_object(found, value)
    return found


def share(count: int) -> range:
    """Which of so many pieces of work are this rank's."""
    return range(_world.rank, count, _world.size)


def collect(mine: Sequence[T], count: int) -> list[T]:
    """All results in order, of which ``mine`` are those of `share`."""
    found = gather(list(mine))
    return [found[i % _world.size][i // _world.size] for i in range(count)]


def on_first(call: Callable[[], T]) -> T:
    """What ``call`` returns or raises on the first rank, which alone makes it, on all ranks."""
    if _world.size == 1:
        return call()
    said: list[Any] = [None, None]
    if first():
        try:
            said[0] = call()
        except Exception as error:
            said[1] = error
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


def sums(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each over all ranks."""
    if _world.size == 1 or not values:
        return dict(values)
    names = sorted(values)
    stacked = torch.stack([values[name].double() for name in names])
    dist.all_reduce(stacked)
    return dict(zip(names, stacked, strict=True))


def agree(seconds: float, asked: int) -> tuple[float, int]:
    """The first rank's clock, and the highest number of a signal that has asked any rank to stop; 0 for none."""
    if _world.size == 1:
        return seconds, asked
    both = torch.tensor([seconds if first() else 0.0, float(asked)], dtype=torch.float64)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return float(both[0]), int(both[1])


def expect_same(name: str, value: Any) -> None:
    """An error where ranks have different values of what all of them should know."""
    if _world.size == 1:
        return
    found = gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    if other := [rank for rank, one in enumerate(found) if one != found[0]]:
        raise Apart(f"parallel: {name} must be the same on all ranks, got another one on rank {other[0]}")


# --- tensors that lie on them ---


def plain(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie on several ranks."""
    return tensor.full_tensor() if lies_apart(tensor) else tensor


def lies_apart(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks hold rows of a tensor."""
    return hasattr(tensor, "full_tensor")


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """Which rows of a tensor are this rank's: [start, stop)."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    shards = mesh.ndim - 1
    each = -(-rows // mesh.size(shards))
    start = min(rows, each * mesh.get_local_rank(shards))
    return start, min(rows, start + each)


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Gives a tensor the values of ``whole``, or the rows of it that are here."""
    if lies_apart(tensor):
        start, stop = rows_of(tensor)
        tensor.to_local().copy_(whole[start:stop])
    else:
        tensor.copy_(whole)


def like(tensor: DTensor, local: Tensor) -> DTensor:
    """A tensor that lies on the ranks as another one does, of which ``local`` is this rank's share."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
