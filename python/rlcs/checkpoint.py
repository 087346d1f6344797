"""Checkpoints of a run: a folder that is there whole or not at all, without pickle.

``checkpoints/step-000040/`` holds the model in Hugging Face layout, ``trainer.safetensors`` (moments, masters) and
``state.json`` (everything else that the next step depends on).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import PART, sync

OLD = ".old"
NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    folder: Path

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step-"))

    def state(self) -> dict[str, Any]:
        path = self.folder / "state.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None

    def tensors(self) -> dict[str, Tensor]:
        path = self.folder / "trainer.safetensors"
        try:
            return load_file(path)
        except Exception as error:  # the library raises its own and OS errors
            raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None


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
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    part = final.with_name(final.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        write_model(part)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "trainer.safetensors")
        (part / "state.json").write_text(json.dumps(state))
        for path in (*part.rglob("*"), part):
            sync(path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise OSError(f"checkpoint: {final} cannot be written: {why}; older ones are as they were") from None
        raise
    if final.exists():  # the same step again: the older one goes only now, and `latest` brings it back after a crash
        os.rename(final, old := final.with_name(final.name + OLD))
        os.rename(part, final)
        _remove(old)
    else:
        os.rename(part, final)
    sync(folder)
    for saved in every(folder)[:-keep]:
        _remove(saved.folder)
    return Saved(final)


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
