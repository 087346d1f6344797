"""Supervised training on the packing of RL: a cold start on answers with thinking, or all tokens of documents.

An assistant's turn is learned after the very prompt that it would have at inference: earlier answers without their
thinking, as the chat template keeps them. So a conversation with several turns is several samples.
"""

from __future__ import annotations

import contextlib
import copy
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm4v import Processor
from glm4v.answer import CLOSE_THINK
from glm4v.config import read_generation_config
from glm4v.generate import Settings
from glm4v.processor import PICTURE_TOKENS
from glm4v.prompt import THOUGHTS

from . import parallel
from .admission import watched
from .config import SftConfig
from .data import conversation_of, document_of, expect_unicode, read_rows, roles
from .evaluate import Score
from .feed import Feed
from .learner import sft_loss
from .progress import Bar
from .prompts import Prompt, Prompts, make
from .run import Run
from .shards import BadRows, Row, files_of
from .stream import Position, Stream, from_memory
from .types import Sample

DOCUMENT = """\
[gMASK]<sop>
{%- for message in messages %}{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- elif part.type == 'video' %}{{- '<|begin_of_video|><|video|><|end_of_video|>' }}
{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endfor %}<|endoftext|>"""


@dataclass(frozen=True)
class Lesson:
    """What one sample is made of: messages up to an answer, and the answer; None for a document."""

    id: str
    place: str  # the data file and the row
    messages: list[dict[str, Any]]
    answer: str | None


def lessons_of(messages: list[dict[str, Any]], turns: str, place: str) -> list[Lesson]:
    """One lesson for each of an assistant's turns, or for the last one."""
    at = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not at or at[0] == 0:
        raise ValueError(f"messages must hold an assistant's turn after a user's, got {roles(messages)}")
    found = []
    for i in at if turns == "all" else at[-1:]:
        answer = _text(messages[i]["content"])
        if not answer:  # what a generator of answers leaves where it failed
            raise ValueError("an assistant's content must be a text or parts of text, got an empty one")
        expect_unicode("an answer", answer)
        # An answer's tags are tokens, so these would be too.
        if token := next((token for token in PICTURE_TOKENS.values() if token in answer), None):
            raise ValueError(f"an answer must be without tokens of pictures, which have none there, got {token}")
        found.append(Lesson(f"{place}/{i}", place, messages[:i], answer))
    return found


def _text(content: Any) -> str:
    """What an assistant said, its parts as one, as the processor joins those of earlier turns."""
    expected = "an assistant's content must be a text or parts of text"
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{expected}, got {reprlib.repr(content)}")
    for part in parts:
        if isinstance(part, dict) and part.get("type") != "text":
            raise ValueError(f"{expected}, got a part of type {part.get('type')!r}")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"{expected}, got {reprlib.repr(part)}")
    return "".join(part["text"] for part in parts)


class Samples:
    """``samples(lesson, source) -> (Sample, Prompt)``: token ids, and which of them are learned."""

    def __init__(self, processor: Processor, thinking: bool, stop_ids: Iterable[int]) -> None:
        self.processor, self.thinking, self.stop_ids = processor, thinking, set(stop_ids)
        self.documents = copy.copy(processor)
        self.documents.template = DOCUMENT
        self.config = processor.config
        self.end = processor.codec.specials.get("<|user|>")  # what ends a turn

    def __call__(self, lesson: Lesson, prompt: Prompt, source: int) -> Sample:
        ids = prompt.input_ids.numpy()
        if lesson.answer is None:
            pictures = [*self.config.vision_token_ids]
            learned = ~np.isin(ids, pictures)
            learned[0] = False
            return Sample(ids, learned, np.zeros(len(ids), np.float32), 1.0, source)
        answer = self._answer(lesson.answer)
        learned = np.ones(len(answer), dtype=bool)
        if not self.thinking and CLOSE_THINK in lesson.answer:
            close = self.processor.encode(CLOSE_THINK)[-1]
            learned[: len(answer) - answer[::-1].index(close)] = False
        whole = np.concatenate([ids, np.array(answer, dtype=np.int64)])
        mask = np.concatenate([np.zeros(len(ids), dtype=bool), learned])
        return Sample(whole, mask, np.zeros(len(whole), np.float32), 1.0, source)

    def length(self, lesson: Lesson) -> int:
        """Tokens of a sample, from headers: no picture is decoded.

        Raises:
            ValueError: messages that cannot be read, or a picture whose header cannot.
        """
        (prompt,) = self.prompt_processor(lesson).count_tokens([lesson.messages])  # type: ignore[misc]
        return prompt + (0 if lesson.answer is None else len(self._answer(lesson.answer)))

    def _answer(self, text: str) -> list[int]:
        """Ids of what is learned, up to what ends a turn."""
        ids = self.processor.encode(text)
        return [*ids, self.end] if (not ids or ids[-1] not in self.stop_ids) and self.end is not None else ids

    def expect_to_fit(self, tokens: int, most_tokens: int) -> None:
        """Raises ValueError for a sample of more tokens than a micro-step or the context has."""
        context = self.config.text_config.max_position_embeddings
        for most, whose in ((most_tokens, "of a micro-step"), (context, "of the model's context")):
            if tokens > most:
                raise ValueError(f"prompt and answer must be at most the {most} tokens {whose}, got {tokens}")

    def prompt_processor(self, lesson: Lesson) -> Processor:
        return self.documents if lesson.answer is None else self.processor


def samples_of(processor: Processor, config: SftConfig) -> Samples:
    """As the checkpoint's answers end."""
    stop_ids = Settings.read(read_generation_config(processor.folder, processor.config)).stop_ids
    return Samples(processor, config.thinking, stop_ids)


class Making:
    """``making((lesson, pixels)) -> (Sample, Prompt)``, here or in another process: pickled it is the folder of the
    tokenizer. Without ``pixels`` the prompt is an outline; of None nothing is made."""

    def __init__(self, prompts: Prompts, samples: Samples, folder: Path, most_tokens: int) -> None:
        self.prompts, self.samples, self.folder, self.most_tokens = prompts, samples, folder, most_tokens

    def __call__(self, asked: tuple[Lesson, bool] | None) -> tuple[Sample, Prompt] | None:
        if asked is None:
            return None
        lesson, pixels = asked
        how = self.samples.prompt_processor(lesson)
        if pixels:
            prompt = self.prompts(lesson.id, lesson.messages, how)
        else:
            prompt = make(lesson.messages, how, pixels=False)
        sample = self.samples(lesson, prompt, 0)
        self.samples.expect_to_fit(len(sample), self.most_tokens)
        return sample, prompt

    def __reduce__(self) -> Any:
        samples = self.samples
        how = (samples.processor.dtype, samples.thinking, tuple(samples.stop_ids))
        return _making_elsewhere, (self.folder, *how, self.most_tokens)


def _making_elsewhere(
    folder: Path, dtype: torch.dtype, thinking: bool, stop_ids: Sequence[int], most_tokens: int
) -> Making:
    processor = Processor.from_pretrained(folder, dtype=dtype)
    return Making(Prompts(processor, most_bytes=0), Samples(processor, thinking, stop_ids), folder, most_tokens)


def lessons_in(config: SftConfig, row: Row) -> list[Lesson]:
    """What a row teaches."""
    content, folder = row.content(), row.file.parent
    if config.all_tokens:
        messages = document_of(content, folder) if "text" in content else conversation_of(content, folder)
        return [Lesson(row.place, row.place, messages, None)]
    lessons = lessons_of(conversation_of(content, folder), config.turns, row.place)
    for lesson in lessons:
        _expect_whole(content["messages"][len(lesson.messages)])
    return lessons


def _expect_whole(turn: Mapping[str, Any]) -> None:
    """Refuses thinking that stands beside the content, as servers return it: the answer would be learned without."""
    if beside := next((name for name in THOUGHTS if turn.get(name)), None):
        expected = "an assistant's thinking must stand in the content, as <think>...</think> before the answer"
        raise ValueError(f"{expected}, got {beside} beside it")


def read_lessons(config: SftConfig, bad: BadRows) -> list[Lesson]:
    """All lessons of the data, in their order."""
    return [lesson for found in read_rows(config.data, partial(lessons_in, config), bad) for lesson in found]


@dataclass
class Drawn:
    """A step's samples, and the position behind them."""

    lessons: list[Lesson] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    position: Position = field(default_factory=dict)


class Lessons:
    """``take()``: the samples of the next step that can be made, with their prompts, from memory or from a stream of
    the files. Of several ranks each decodes the pictures that it will read; the other prompts are outlines."""

    def __init__(self, config: SftConfig, bad: BadRows) -> None:
        self.config, self.bad = config, bad
        self.position: Position = {}
        self.skipped = set[str]()  # ids of lessons that cannot be made
        self._good = 0  # the pass of the latest good one
        seed = config.run.seed
        self._lessons = list[Lesson]()  # in memory
        if config.buffer is None:
            self._lessons = read_lessons(config, bad)
            self._behind: Callable[[Position], Iterator[tuple[Lesson, Position]]] = lambda position: from_memory(
                self._lessons, seed, position
            )
        else:
            self._behind = Stream(
                files_of(config.data), lambda row: lessons_in(config, row), config.buffer, seed, bad
            ).behind

    def check(self, processor: Processor) -> None:
        """Meets, before anything is computed, what of memory cannot be made or is too long, as far as headers tell;
        each rank looks at some of it. What a stream brings is met on the way."""
        samples, errors = samples_of(processor, self.config), dict[int, str]()
        for i in watched(parallel.share(len(self._lessons)), "checking data"):
            try:
                samples.expect_to_fit(samples.length(self._lessons[i]), self.config.tokens)
            except ValueError as error:
                errors[i] = str(error)
                if self.bad.rule == "fatal":
                    break
        errors = {i: error for of_rank in parallel.gather(errors) for i, error in of_rank.items()}
        for i in sorted(errors):
            self._skip(self._lessons[i], ValueError(errors[i]), {"epoch": 0})

    def start(self, position: Position, making: Making, share: Share | None = None) -> None:
        """Goes on behind a position that a checkpoint holds. ``share`` says which of a step's samples, by outlines of
        their prompts, this rank will read; None: all of them."""
        self.position = {name: position[name] for name in POSITION if name in position}
        self._share = share
        self._feed = Feed(making, self.config.workers, self.config.ahead)
        self._begin()

    def _begin(self) -> None:
        self._good = self.position.get("epoch", 0)
        self._made = self._feed(((one[0], self._share is None), one) for one in self._wanted())
        self._decoded = self._feed(self._mine())

    def _wanted(self) -> Iterator[tuple[Lesson, Position]]:
        for lesson, position in self._behind(self.position):
            if lesson.id not in self.skipped:
                yield lesson, position
            else:
                self._expect_good(position)

    def take(self) -> tuple[list[Sample], list[Prompt]]:
        drawn = self._draw() if self._share is None else self._draw_decoded()
        self.position = drawn.position
        return drawn.samples, drawn.prompts

    def _draw(self) -> Drawn:
        drawn = Drawn()
        while len(drawn.samples) < self.config.batch:
            _, made, (lesson, drawn.position) = next(self._made)
            if isinstance(made, ValueError):
                self._skip(lesson, made, drawn.position)
                continue
            assert made is not None
            self._good = drawn.position["epoch"]
            drawn.lessons.append(lesson)
            drawn.samples.append(replace(made[0], source=len(drawn.prompts)))
            drawn.prompts.append(made[1])
        return drawn

    def _skip(self, lesson: Lesson, error: ValueError, position: Position) -> None:
        self.skipped.add(lesson.id)
        self.bad(lesson.place, error)
        self._expect_good(position)

    def _expect_good(self, position: Position) -> None:
        """An error where a whole pass has none."""
        if len(self.skipped) == len(self._lessons) or position["epoch"] > self._good + 1:
            raise ValueError(f"data: {self.config.data} must hold a good row, got none")

    def _mine(self) -> Iterator[tuple[tuple[Lesson, bool] | None, tuple[int, Drawn]]]:
        """What this rank decodes, step after step; None behind each."""
        assert self._share is not None
        while True:
            drawn = self._draw()
            for i in self._share(drawn.samples, drawn.prompts):
                if drawn.prompts[i].patches:
                    yield (drawn.lessons[i], True), (i, drawn)
            yield None, (0, drawn)

    def _draw_decoded(self) -> Drawn:
        """A step whose pictures all ranks can decode: where one cannot, all draw it again without that sample."""
        while True:
            errors = dict[int, str]()
            for asked, made, (i, drawn) in self._decoded:
                if asked is None:
                    break
                if isinstance(made, ValueError):
                    errors[i] = str(made)
                elif made is not None:
                    drawn.prompts[i] = made[1]
            errors = {i: error for of_rank in parallel.gather(errors) for i, error in of_rank.items()}
            if not errors:
                return drawn
            for i in sorted(errors):
                self._skip(drawn.lessons[i], ValueError(errors[i]), drawn.position)
            self._begin()

    @property
    def epoch(self) -> float:
        """Passes over the data; whole ones where its size isn't known."""
        return self.position["position"] / len(self._lessons) if self._lessons else self.position["epoch"]

    def close(self) -> None:
        self._feed.close()


Share = Callable[[Sequence[Sample], Sequence[Prompt]], list[int]]
POSITION = ("position", "epoch", "block", "file", "row", "taken")  # of `Position`, in a checkpoint


def sft(config: SftConfig, note: Callable[[str], None] = print) -> list[Score]:
    """Trains, saves, evaluates; returns the last scores. Takes up the run that is in the folder."""
    note = parallel.by_first(note)
    bad = BadRows(config.bad_rows, config.max_bad_rows, note)
    lessons = Lessons(config, bad)
    run = Run(config, note, lessons.check)
    making = Making(run.prompts, samples_of(run.prompts.processor, config), config.model.path, config.tokens)
    lessons.start(run.state, making, run.learner.share if parallel.size() > 1 else None)
    run.begin()
    scores = list[Score]()
    with Bar("SFT", quiet=not parallel.first()) as bar, run.stoppable(), contextlib.closing(lessons):
        bad.note = bar.note
        bar(run.progress, 1.0)
        if run.step and run.owes_evaluation:
            scores = run.evaluate(bar)
        while run.progress < 1:
            with run.training():
                samples, prompts = lessons.take()
                facts = run.learner.update(samples, prompts, sft_loss, run.rate())
                run.step += 1
                run.count_skipped(bool(facts["skipped"]))
            done = lessons.position["position"]
            run.log.write("sft", run.step, run.seconds, {**facts, "samples": done, "epoch": lessons.epoch})
            bar(run.progress, 1.0, f"loss {facts['loss']:.3f}, {done / max(run.seconds, 1e-9):.0f} samples/s")
            if run.due(run.settings.save_every):
                run.save(dict(lessons.position))
            if run.due(run.settings.eval_every):
                scores = run.evaluate(bar)
            if run.stopped:
                run.save(dict(lessons.position))
                run.obey()
        run.save(dict(lessons.position))
        scores = run.evaluate(bar)
    run.log.close()
    return scores
