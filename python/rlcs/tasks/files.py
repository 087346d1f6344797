"""Tasks as files: JSON lines with pictures beside them, which `rlcs sft`, `rlcs train` and `rlcs eval` read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import whole
from ..types import Task


def write_tasks(
    folder: Path, name: str, tasks: Iterable[tuple[Task, str]], progress: Callable[[int], None] | None = None
) -> tuple[Path, Path]:
    """Writes ``<name>.jsonl``, the tasks, and ``<name>-answers.jsonl``, the same with full answers to learn from.

    Pictures in memory go to ``<name>/`` as PNG; a video as a list of frames.
    """
    pictures = folder / name
    pictures.mkdir(parents=True, exist_ok=True)
    tasks_path, answers_path = folder / f"{name}.jsonl", folder / f"{name}-answers.jsonl"
    with (
        whole(tasks_path) as task_part,
        whole(answers_path) as answer_part,
        open(task_part, "w") as task_file,
        open(answer_part, "w") as answer_file,
    ):
        for number, (task, response) in enumerate(tasks, 1):
            messages = [
                {
                    **message,
                    "content": [_part(part, pictures, f"{task.id}-{i}") for i, part in enumerate(message["content"])],
                }
                for message in task.messages
            ]
            row = {
                "id": task.id,
                "domain": task.domain,
                "category": task.category,
                "tier": task.tier,
                "messages": messages,
                "truth": task.truth,
                "question": task.question,
            }
            task_file.write(json.dumps(row) + "\n")
            answer_file.write(json.dumps({"messages": [*messages, {"role": "assistant", "content": response}]}) + "\n")
            if progress is not None:
                progress(number)
    return tasks_path, answers_path


def _part(part: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "image": _save(part["image"], folder, name)}
    if part["type"] == "video":
        frames = [_save(frame, folder, f"{name}-{i}") for i, frame in enumerate(part["video"])]
        return {"type": "video", "video": frames, "fps": part["fps"]}
    return part


def _save(picture: np.ndarray, folder: Path, name: str) -> str:
    """The path relative to where the JSON lines lie."""
    Image.fromarray(picture).save(folder / f"{name}.png")
    return f"{folder.name}/{name}.png"
