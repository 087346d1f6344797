"""Checkpoints of a run: a folder that is there whole or not at all, without pickle.

``checkpoints/step-000040/`` holds the model in Hugging Face layout, ``trainer.safetensors`` (moments, masters) and
``state.json`` (everything else that the next step depends on). Several processes write ``trainer/`` in place of
``trainer.safetensors``: a distributed checkpoint, a file of each. Any number of processes reads either, and the folder
of a run is one that all of them see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import parallel
from .files import PART, sync
from .memory import first_line, out_of_memory

OLD = ".old"
NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step-"))

    @property
    def state_file(self) -> Path:
        return self.folder / "state.json"

    def state(self) -> dict[str, Any]:
        path = self.state_file
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None

    def tensors(self, like: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
        """What the optimizer has kept, each read into what ``like(name)`` gives: of a sharded tensor, the rows that are
        here. Without it, whole."""
        path, shards = self.folder / "trainer.safetensors", self.folder / "trainer"
        path = shards if shards.exists() else path
        try:
            return _read_shards(shards, like) if path is shards else _read_file(path, like)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the libraries raise their own, some of which are no Exception, and OS errors
            if parallel.lost(error) or out_of_memory(error):
                raise
            raise ValueError(f"checkpoint: {path} cannot be read: {first_line(error)}") from None


def _read_file(path: Path, like: Callable[[str], Tensor] | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            room = None if like is None else like(name)
            if room is not None and parallel.lies_apart(room):
                parallel.fill(room, file.get_slice(name))
                found[name] = room
            else:
                found[name] = file.get_tensor(name)
    return found


def _read_shards(folder: Path, like: Callable[[str], Tensor] | None) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(folder))
    known = {
        name: about
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }
    if like is None:
        found = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in known.items()}
    else:
        found = {name: like(name) for name in known}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(found, storage_reader=reader, no_dist=parallel.size() == 1)
    return found


def save(
    folder: Path,
    step: int,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Saved:
    """Writes ``step-<step>`` beside its final name, down to the disk, renames it, and removes all but ``keep``.

    A crash at any moment leaves the older checkpoints as they were.

    Raises:
        OSError: it cannot be written; the text names the folder.
    """
    final = folder / f"step-{step:06d}"
    part = final.with_name(final.name + PART)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()

    def end() -> None:
        (part / "state.json").write_text(json.dumps(state))
        for path in (*part.rglob("*"), part):
            sync(path)

    try:
        parallel.on_first(begin)
        write_model(part)
        _write_tensors(part, tensors)
        parallel.on_first(end)
    except BaseException as error:
        if parallel.first():  # which waits for nobody: others may not be there, or not know of it
            shutil.rmtree(part, ignore_errors=True)
        failures = getattr(error, "failures", {})  # of several processes: what the first of them says
        first = next(iter(failures.values()))[0] if failures else error
        if isinstance(first, OSError | SafetensorError):
            why = getattr(first, "strerror", None) or first_line(first)
            raise OSError(f"checkpoint: {final} cannot be written: {why}; older ones are as they were") from None
        raise
    parallel.on_first(lambda: _name(part, final, keep))
    return Saved(final)


def _write_tensors(part: Path, tensors: Mapping[str, Tensor]) -> None:
    if parallel.size() == 1:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "trainer.safetensors")
    else:
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(part / "trainer"), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)


def _name(part: Path, final: Path, keep: int) -> None:
    """Gives a whole checkpoint its name, and removes those that are too many."""
    if final.exists():  # the same step again: the older one goes only now, and `latest` brings it back after a crash
        os.rename(final, old := final.with_name(final.name + OLD))
        os.rename(part, final)
        _remove(old)
    else:
        os.rename(part, final)
    sync(final.parent)
    for saved in every(final.parent)[:-keep]:
        _remove(saved.folder)


def every(folder: Path) -> list[Saved]:
    """Whole checkpoints, oldest first."""
    found = [Saved(path) for path in folder.glob("step-*") if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda saved: saved.step)


def latest(folder: Path) -> Saved | None:
    """The newest whole checkpoint, if any; what a crash has left half-written goes."""
    if folder.is_dir():
        for path in folder.glob(f"*{PART}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in folder.glob(f"*{OLD}"):
            final = path.with_name(path.name.removesuffix(OLD))
            _remove(path) if final.exists() else os.rename(path, final)
    found = every(folder)
    return found[-1] if found else None


def _remove(folder: Path) -> None:
    """Under a name that no checkpoint has, so that half of it never passes for one."""
    part = folder.with_name(folder.name + PART)
    os.rename(folder, part)
    shutil.rmtree(part)
