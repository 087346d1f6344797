"""Questions about a photograph and a video, answered by glm4v and by transformers: same files, same tokens.

Makes a checkpoint on the spot: the released model's widths, two layers of each tower, random weights, so the text is
noise. Then it asks about a photograph that scikit-learn brings and about a film that pans over two such photographs,
prints the tokens as they come, and runs transformers on the same files in float32. Exits with 1 where a token differs.

    python examples/demo.py [--tokens N] [--size tiny]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import av
import numpy as np
import torch
from make_checkpoint import make_checkpoint
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from transformers import AutoTokenizer, Glm4vForConditionalGeneration
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from glm4v import Batch, Glm4v, Processor
from glm4v.chat import visible

PHOTOS = [Path(str(files("sklearn.datasets.images") / name)) for name in ("china.jpg", "flower.jpg")]
console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """Tokens of one answer, how long the first one took, and how many came per second after it."""

    tokens: list[int]
    first_s: float
    rate: float

    @classmethod
    def of(cls, tokens: list[int], times: list[float]) -> Run:
        """``times`` are those of the tokens, in seconds since the question."""
        return cls(tokens, times[0], (len(times) - 1) / max(times[-1] - times[0], 1e-9))


def encode_film(path: Path, seconds: int = 4, rate: int = 24, width: int = 336, height: int = 252) -> Path:
    """A camera that moves over both photographs, half of the time each."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    photos = [np.asarray(Image.open(photo).convert("RGB")) for photo in PHOTOS]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(count := seconds * rate):
            photo = photos[i * len(photos) // count]
            left = (photo.shape[1] - width) * (2 * i % count) // count
            crop = np.ascontiguousarray(photo[:height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(crop, format="rgb24")))
        container.mux(stream.encode())
    return path


def answer(model: Glm4v, batch: Batch, tokens: int) -> Run:
    """glm4v's answer, printed as it comes."""

    start, found, times = time.perf_counter(), [], []
    for piece in model.stream(batch, max_new_tokens=tokens, temperature=0):
        times.append(time.perf_counter() - start)
        found.append(piece.token_id)
        console.out(visible(piece.text), end="")
    run = Run.of(found, times)
    console.print(f"\n[dim]{len(run.tokens)} tokens, {run.rate:.1f} tokens/s after {run.first_s:.1f} s for the prompt")
    return run


class Clock:
    """A transformers streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        pass


def transformers_answer(model: Glm4vForConditionalGeneration, inputs: dict, banned: list[int], tokens: int) -> Run:
    clock, ids = Clock(), inputs["input_ids"]
    output = model.generate(
        **inputs,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        bad_words_ids=[[token] for token in banned],
        streamer=clock,
    )
    return Run.of(output[0, ids.shape[1] :].tolist(), clock.times[1:])  # the first is the prompt's


def photo_inputs(folder: Path, messages: list[dict]) -> dict:
    """The photograph's prompt and pixels by transformers' own template, tokenizer and image processor."""
    pixels = Glm4vImageProcessorPil.from_pretrained(folder)(Image.open(PHOTOS[0]), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    image_tokens = int(pixels["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image|>", "<|image|>" * image_tokens), return_tensors="pt").input_ids
    types = (ids == tokenizer.convert_tokens_to_ids("<|image|>")).int()
    return {"input_ids": ids, "mm_token_type_ids": types, **pixels}


def film_inputs(batch: Batch, image_token: int) -> dict:
    """The film's prompt and patches as glm4v made them: transformers needs torchvision to decode."""
    return {
        "input_ids": batch.input_ids[None],
        "mm_token_type_ids": 2 * (batch.input_ids == image_token).int()[None],
        "pixel_values_videos": batch.pixel_values_videos,
        "video_grid_thw": batch.video_grid_thw,
    }


def load(folder: Path) -> Glm4v:
    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("weights", total=None)
        return Glm4v.from_pretrained(
            folder, torch.float32, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def report(names: list[str], ours: list[Run], theirs: list[Run]) -> bool:
    table = Table(title=f"float32, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("question", "by", "tokens", "first token", "tokens/s", "same tokens"):
        table.add_column(column, justify="left" if column in ("question", "by") else "right")
    for name, a, b in zip(names, ours, theirs, strict=True):
        for by, run, same in (("glm4v", a, ""), ("transformers", b, "yes" if a.tokens == b.tokens else "NO")):
            table.add_row(name, by, str(len(run.tokens)), f"{run.first_s:.2f} s", f"{run.rate:.1f}", same)
    console.print(table)
    return all(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--size", choices=["wide", "tiny"], default="wide")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        with console.status("making a checkpoint and a film"):
            folder = make_checkpoint(Path(scratch) / "checkpoint", arguments.size, dtype=torch.bfloat16)
            film = encode_film(Path(scratch) / "film.mp4")
        questions = {
            "photo": [{"type": "image", "image": str(PHOTOS[0])}, {"type": "text", "text": "What is in this picture?"}],
            "video": [{"type": "video", "video": str(film)}, {"type": "text", "text": "What happens first?"}],
        }
        processor = Processor.from_pretrained(folder)
        conversations = [[{"role": "user", "content": content}] for content in questions.values()]
        batches = [processor(messages) for messages in conversations]
        model = load(folder)
        model.processor = processor
        console.print("The weights are random, so the text is noise; that it is the same noise is the point.")
        ours = []
        for (media, question), batch in zip(questions.values(), batches, strict=True):
            file = Path(media[media["type"]]).name
            console.print(f"\n[bold]{file}: {question['text']}[/] [dim]{len(batch.input_ids)} tokens[/]")
            ours.append(answer(model, batch, arguments.tokens))
        banned = list(model.config.vision_token_ids)
        inputs = [photo_inputs(folder, conversations[0]), film_inputs(batches[1], model.config.image_token_id)]
        del model
        gc.collect()
        with console.status("transformers answers the same questions"):
            reference = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
            theirs = [transformers_answer(reference, one, banned, arguments.tokens) for one in inputs]
        console.print()
        same = report(list(questions), ours, theirs)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
