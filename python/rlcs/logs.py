"""What a run writes down: ``metrics.jsonl`` and TensorBoard always, wandb where asked for, and every rollout.

A row of metrics is flat: ``kind`` (sft, wave, eval, alarm), ``step``, ``seconds`` of training so far, and numbers by
name. Rollouts stand by wave in ``rollouts/000040.jsonl``, one group a line, its pictures beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm4v.source import scheme

from .data import stands_inside
from .files import named, whole, write_text
from .types import Group

WANDB_ID = "wandb-id.txt"


class Log:
    """Appends rows to ``folder``; rows and rollouts after ``since``, of a run that was cut off, are dropped first.

    A finished run that is taken up evaluates its last step again; what stands there is not written twice.
    """

    def __init__(self, folder: Path, since: int = 0, wandb: str | None = None, config: Any = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= since] if since else []
        self._evaluated = {row["step"] for row in kept if row["kind"] == "eval"}
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        for rollouts in (folder / "rollouts").glob("*.jsonl"):
            if rollouts.stem.isdecimal() and int(rollouts.stem) > since:  # others are not the run's
                rollouts.unlink()
        if not since:  # of other tasks, perhaps
            shutil.rmtree(folder / "rollouts" / "pictures", ignore_errors=True)
        self._file = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (held until close)
        self._path, self._events = path, folder / "tensorboard"
        with named(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=since + 1 if since else 0)
        self._wandb = None
        if wandb is not None:
            import wandb as library

            place = folder / WANDB_ID  # of the run there, which goes on with this one
            name = place.read_text().strip() if since and place.exists() else None
            self._wandb = library.init(project=wandb, dir=str(folder), config=config, id=name, resume="allow")
            write_text(place, f"{self._wandb.id}\n")

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """One row. Numbers that are not finite become null: JSON has no name for them."""
        if kind == "eval":
            if step in self._evaluated:
                return
            self._evaluated.add(step)
        row = {"kind": kind, "step": step, "seconds": round(seconds, 3)}
        for name, value in values.items():
            if isinstance(value, float):
                value = float(f"{value:.6g}") if math.isfinite(value) else None
            row[name] = value
        with named(self._path):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k not in ("kind", "step")}
        with named(self._events):
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation of this step stands here."""
        return step in self._evaluated

    def rollouts(self, wave: int, groups: Iterable[Group], trained: Iterable[Group], carried: Iterable[Group]) -> None:
        """All groups of one wave, whether they were trained on, and the pictures they are about."""
        folder = self.folder / "rollouts"
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        now, later = {id(group) for group in trained}, {id(group) for group in carried}
        rows = []
        for group in groups:
            task = group.task
            rows.append(
                {
                    "task": task.id,
                    "domain": task.domain,
                    "category": task.category,
                    "tier": task.tier,
                    "prompt": [_shown(part, folder, task.id, i) for i, part in enumerate(_parts(task.messages))],
                    "truth": task.truth,
                    "used": "trained" if id(group) in now else "carried" if id(group) in later else "recorded",
                    "answers": [
                        {
                            "text": r.text,
                            "outcome": r.verdict.outcome,
                            "score": r.verdict.score,
                            "detail": r.verdict.detail,
                            "tokens": len(r.token_ids),
                            "forced": r.forced,
                            "finish_reason": r.finish_reason,
                        }
                        for r in group.rollouts
                    ],
                }
            )
        write_text(folder / f"{wave:06d}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def flush(self) -> None:
        """Brings all rows down to the disk."""
        with named(self._path):
            os.fsync(self._file.fileno())
        with named(self._events):
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Silence:
    """The log of a process that writes none: another one of the same run does."""

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None: ...
    def rollouts(
        self, wave: int, groups: Iterable[Group], trained: Iterable[Group], carried: Iterable[Group]
    ) -> None: ...
    def evaluated(self, step: int) -> bool:
        return False

    def flush(self) -> None: ...
    def close(self) -> None: ...


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics; a last line that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")  # splitlines knows ends that stand in a text
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f"metrics: {path}, line {number}: is not JSON") from None
            break
        if not (isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get("step"), int)):
            due = "must be an object with a kind and a step"
            raise ValueError(f"metrics: {path}, line {number}: {due}, got {row!r:.60}")
        rows.append(row)
    return rows


def file_name(id: str) -> str:
    """A task's id as (part of) a file's name; different ids have different names."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", id):
        return id
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', id)[:80]}-{hashlib.sha256(id.encode()).hexdigest()[:12]}"


def _parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All parts of all messages, with the role in front where there is more than one message."""
    out: list[dict[str, Any]] = []
    for message in messages:
        if len(messages) > 1:
            out.append({"type": "text", "text": f"[{message['role']}]"})
        content = message["content"]
        out += [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return out


def _from(folder: Path, source: str | Path) -> str:
    """A file as ``folder`` sees it, from wherever the rollouts are read; URLs as they are."""
    return str(source) if scheme(source) else os.path.relpath(os.path.realpath(source), os.path.realpath(folder))


def _shown(part: Mapping[str, Any], folder: Path, name: str, index: int) -> dict[str, Any]:
    """A part as JSON: what stands in no file is written once; a picture as a PNG, a video's frames side by side."""
    kind = part.get("type")
    if kind not in ("image", "video"):
        return {"type": "text", "text": part.get("text", "")}
    source = part[kind]
    each = list(source) if kind == "video" and not isinstance(source, str | bytes | Path) else [source]
    if all(isinstance(one, str | Path) and not stands_inside(one) for one in each):
        files = [_from(folder, one) for one in each]
        return {"type": kind, kind: files[0] if each[0] is source else files}
    from PIL import Image

    from glm4v.image import Picture
    from glm4v.source import find

    film = kind == "video" and each[0] is source
    file = Path("pictures") / f"{file_name(name)}-{index}.{'mp4' if film else 'png'}"
    if not (folder / file).exists():
        with whole(folder / file) as place:
            if film:
                place.write_bytes(find(kind, source).data)  # type: ignore[arg-type]
            else:
                found = [Picture(one) for one in each]
                array = np.concatenate([picture.pixels(picture.height, picture.width) for picture in found], axis=1)
                Image.fromarray(array).save(place, "PNG")
    return {"type": "video", "video": str(file)} if film else {"type": "image", "image": str(file)}
