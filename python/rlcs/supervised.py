"""Supervised training on the packing of RL: a cold start on answers with thinking, or all tokens of documents.

An assistant's turn is learned after the very prompt that it would have at inference: earlier answers without their
thinking, as the chat template keeps them. So a conversation with several turns is several samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from glm4v import InputError, Processor
from glm4v.processor import BORDERS

from .config import SftConfig
from .data import conversation_of, document_of, read_rows
from .evaluate import Score
from .learner import sft_loss
from .progress import Bar
from .prompts import Prompt
from .rollout import NotFinite
from .run import Run
from .types import Sample

DOCUMENT = """\
[gMASK]<sop>
{%- for message in messages %}{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- elif part.type == 'video' %}{{- '<|begin_of_video|><|video|><|end_of_video|>' }}
{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endfor %}<|endoftext|>"""
CLOSE_THINK = "</think>"
MOST_SKIPPED = 10  # steps in a row that move nothing, since the gradient is not finite
PICTURE_TOKENS = BORDERS.values()  # an answer's tags are tokens, so these would be too


@dataclass(frozen=True)
class Lesson:
    """What one sample is made of: messages up to an answer, and the answer; None for a document."""

    id: str
    line: int  # of the data file
    messages: list[dict[str, Any]]
    answer: str | None


def lessons_of(messages: list[dict[str, Any]], turns: str, line: int) -> list[Lesson]:
    """One lesson for each of an assistant's turns, or for the last one."""
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not at or at[0] == 0:
        raise ValueError("messages must hold an assistant's turn after a user's, got none")
    found = []
    for i in at if turns == "all" else at[-1:]:
        answer = messages[i]["content"]
        if not isinstance(answer, str):
            raise ValueError("an assistant's content must be a text, got parts")
        if token := next((token for token in PICTURE_TOKENS if token in answer), None):
            raise ValueError(f"an answer must be without tokens of pictures, which have none there, got {token}")
        found.append(Lesson(f"{line}/{i}", line, messages[:i], answer))
    return found


class Samples:
    """``samples(lesson, source) -> (Sample, Prompt)``: token ids, and which of them are learned."""

    def __init__(self, processor: Processor, thinking: bool, stop_ids: Sequence[int]) -> None:
        self.processor, self.thinking, self.stop_ids = processor, thinking, set(stop_ids)
        self.documents = copy.copy(processor)
        self.documents.template = jinja2.Environment().from_string(DOCUMENT)
        self.config = processor.config
        self.end = processor.codec.specials.get("<|user|>")  # what ends a turn

    def __call__(self, lesson: Lesson, prompt: Prompt, source: int) -> Sample:
        ids = prompt.input_ids.numpy()
        if lesson.answer is None:
            pictures = [*self.config.vision_token_ids]
            learned = ~np.isin(ids, pictures)
            learned[0] = False
            return Sample(ids, learned, np.zeros(len(ids), np.float32), 1.0, source)
        answer = self.processor.encode(lesson.answer)
        if (not answer or answer[-1] not in self.stop_ids) and self.end is not None:
            answer = [*answer, self.end]
        learned = np.ones(len(answer), dtype=bool)
        if not self.thinking and CLOSE_THINK in lesson.answer:
            close = self.processor.encode(CLOSE_THINK)[-1]
            learned[: len(answer) - answer[::-1].index(close)] = False
        whole = np.concatenate([ids, np.array(answer, dtype=np.int64)])
        mask = np.concatenate([np.zeros(len(ids), dtype=bool), learned])
        return Sample(whole, mask, np.zeros(len(whole), np.float32), 1.0, source)

    def prompt_processor(self, lesson: Lesson) -> Processor:
        return self.documents if lesson.answer is None else self.processor


def read_lessons(config: SftConfig, note: Callable[[str], None]) -> list[Lesson]:
    """All lessons of the data file, in its order."""

    def row_of(row: Mapping[str, Any], folder: Path, line: int) -> list[Lesson]:
        if config.all_tokens:
            messages = document_of(row, folder) if "text" in row else conversation_of(row, folder)
            return [Lesson(f"{line}", line, messages, None)]
        return lessons_of(conversation_of(row, folder), config.turns, line)

    return [lesson for found in read_rows(config.data, row_of, config.bad_rows, note) for lesson in found]


def order(count: int, seed: int, start: int) -> Iterator[int]:
    """Indices from position ``start`` on: a fresh permutation for every pass over the data."""
    epoch, at = divmod(start, count)
    while True:
        shuffled = np.random.default_rng([seed, epoch]).permutation(count)
        yield from shuffled[at:].tolist()
        epoch, at = epoch + 1, 0


def sft(config: SftConfig, note: Callable[[str], None] = print) -> list[Score]:
    """Trains, saves, evaluates; returns the last scores. Takes up the run that is in the folder."""
    lessons = read_lessons(config, note)
    run = Run(config, note)
    stop = run.model.generation_config.get("eos_token_id") or []
    make = Samples(run.prompts.processor, config.thinking, stop if isinstance(stop, list) else [stop])
    position, scores = int(run.state.get("position", 0)), list[Score]()
    indices = order(len(lessons), config.run.seed, position)
    skipped, lost = set[int](), 0
    with Bar("SFT") as bar, run.stoppable():
        bar(run.progress, 1.0)
        while run.progress < 1:
            with run.training():
                samples, prompts = list[Sample](), list[Prompt]()
                while len(samples) < config.batch:
                    index = next(indices)
                    position += 1
                    if index in skipped:
                        continue
                    lesson = lessons[index]
                    try:
                        prompt = run.prompts(lesson.id, lesson.messages, make.prompt_processor(lesson))
                        sample = make(lesson, prompt, len(prompts))
                        if len(sample) > config.tokens:
                            raise ValueError(f"tokens must be at most {config.tokens}, got {len(sample)}")
                    except (InputError, ValueError) as error:
                        said = f"data: {config.data}, line {lesson.line}: {error}"
                        if config.bad_rows == "fatal":
                            raise ValueError(said) from None
                        skipped.add(index)
                        if len(skipped) == len(lessons):
                            raise ValueError(f"data: {config.data} must hold a good row, got none") from None
                        bar.note(said)
                        continue
                    samples.append(sample)
                    prompts.append(prompt)
                facts = run.learner.update(samples, prompts, sft_loss, run.rate())
                run.step += 1
                lost = lost + 1 if facts["skipped"] else 0
                if lost == MOST_SKIPPED:
                    raise NotFinite(f"sft: gradients must be finite, got {lost} steps without; are the weights whole?")
            run.log.write(
                "sft", run.step, run.seconds, {**facts, "samples": position, "epoch": position / len(lessons)}
            )
            bar(run.progress, 1.0, f"loss {facts['loss']:.3f}, {position / max(run.seconds, 1e-9):.0f} samples/s")
            if run.due(run.settings.save_every):
                run.save({"position": position})
            if run.due(run.settings.eval_every):
                scores = run.evaluate(bar)
            if run.stopped:
                run.save({"position": position})
                run.obey()
        run.save({"position": position})
        scores = run.evaluate(bar)
    run.log.close()
    return scores
