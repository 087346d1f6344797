"""Answers on a terminal: one as it comes, and a conversation of several turns."""

from __future__ import annotations

import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .answer import Generation, separate
from .errors import InputError
from .generate import Piece
from .prompt_cache import PromptCache

if TYPE_CHECKING:
    from .model import Glm4v
    from .processor import Measured

HELP = """\
/image F   adds an image to the next question     /think   shows the last thinking
/video F   adds a video to the next question      /reset   forgets the conversation
/help      shows this list                        /quit    leaves, as Ctrl-D does; Ctrl-C stops what runs"""


def visible(text: str) -> str:
    """``text`` without the control characters that a terminal obeys."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def encodable(text: str) -> str:
    """``text`` with a question mark for what stdout has no code for."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


class Growing:
    """Writes what is new of a text that grows. One that turns out to be another text starts on a new line."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.shown = ""

    def show(self, text: str) -> None:
        if not text.startswith(self.shown):
            self.write("\n")
            self.shown = ""
        self.write(text[len(self.shown) :])
        self.shown = text


def shown(pieces: Iterable[Piece], notes: Console, folded: bool = False) -> Iterator[Piece]:
    """Writes one answer while its pieces pass: the answer to stdout, the thinking to ``notes``, or only its length."""
    clean = visible if sys.stdout.isatty() else encodable
    answer = Growing(lambda text: print(clean(text), end="", flush=True))
    thinking = Growing(lambda text: notes.out(visible(text), style="dim", highlight=False, end=""))
    text, thoughts = "", 0
    for count, piece in enumerate(pieces, 1):
        text += piece.text
        parts = piece.generation or separate(text, ended=False)
        if not parts.answer:
            answer.show("")  # what looked like the answer was thinking
        if not folded:
            thinking.show(parts.thinking)
        elif not parts.answer:
            thoughts = count
            if notes.is_terminal and parts.thinking:
                notes.out(f"thinking, {count} tokens", style="dim", highlight=False, end="\r")
        if parts.answer and not answer.shown and parts.thinking:
            notes.out(f"thought for {thoughts} tokens" if folded else "\n", style="dim", highlight=False)
        answer.show(parts.answer)
        yield piece
    print(flush=True)


def timed(pieces: Iterator[Piece], notes: Console) -> Iterator[Piece]:
    """The pieces; on a terminal a clock runs until the first one, while the model reads the prompt."""
    columns = (SpinnerColumn(), TextColumn("reading"), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as clock:
        clock.add_task("reading")
        first = next(pieces)
    yield first
    yield from pieces


def whole(pieces: Iterable[Piece]) -> Generation:
    """The answer that one request's pieces come to."""
    (generation,) = [piece.generation for piece in interruptible(pieces) if piece.generation is not None]
    return generation


def interruptible(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces until Ctrl-C. Its exception is lost where Python runs a destructor or a callback that cannot be left
    by one; then the next piece ends the answer."""
    struck = []

    def strike(number: int, frame: object) -> None:
        struck.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, strike)
    try:
        for piece in pieces:
            if struck:
                raise KeyboardInterrupt
            yield piece
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation. ``ask`` reads a line; ``options`` are those of `Glm4v.generate`."""

    def __init__(
        self,
        model: Glm4v,
        system: str | None = None,
        ask: Callable[[str], str] = input,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.start = [{"role": "system", "content": system}] if system else []
        self.ask = ask
        self.seed = seed
        self.options = options
        self.notes = Console(stderr=True)
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = list(self.start)
        self.files: list[Measured] = []  # of the next question
        self.last: Generation | None = None
        self.read = PromptCache()

    def run(self) -> None:
        """Takes lines until the user leaves. What is wrong with a line doesn't end the conversation, nor does Ctrl-C
        while one is worked on: it is as if that line had not been."""
        self.note(HELP)
        while True:
            try:
                line = self.ask("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                self.take(line)
            except (InputError, OSError) as error:
                self.note(f"glm4v: {error}")
            except KeyboardInterrupt:
                self.note("\nstopped; the line is forgotten")

    def take(self, line: str) -> None:
        """Does what one line says."""
        command, _, argument = line.partition(" ")
        match command:
            case "":
                pass
            case "/image" | "/video":
                self.attach(command[1:], argument.strip().strip("'\""))
            case "/think":
                self.note((self.last and self.last.thinking) or "nothing was thought")
            case "/reset":
                self.reset()
            case "/help":
                self.note(HELP)
            case _ if command.startswith("/"):
                self.note(f"glm4v: {command} is not a command; /help lists them")
            case _:
                self.answer(line)

    def attach(self, kind: str, file: str) -> None:
        """Adds a file to the next question, if it can be read and the context has room for it."""
        picture = self.model.processor.measure(kind, os.path.expanduser(file))
        files = [*self.files, picture]
        before, behind = (
            len(self.model.processor([*self.messages, _message(each)], pixels=False).input_ids)
            for each in (self.files, files)
        )
        self.files = files
        self.note(f"{kind} {file}: {behind - before} tokens")

    def answer(self, question: str) -> None:
        """Asks the model. Where the text is at fault, and after Ctrl-C, the files stay for the next question.

        Files are decoded once, for all turns. Those that cannot be, though their headers could be read, are dropped:
        every question would fail like this one.
        """
        readable = [file for file in self.files if self.is_readable(file)]
        if len(readable) < len(self.files):
            self.files = readable
            return
        messages = [*self.messages, _message(self.files, question)]
        seed = None if self.seed is None else [(self.seed, len(messages))]
        pieces = timed(self.model.stream(messages, seed=seed, prompt_cache=self.read, **self.options), self.notes)
        self.last = whole(shown(pieces, self.notes, folded=True))
        if not self.last.answer:
            self.note(f"no answer within {len(self.last.token_ids)} tokens")
        self.messages = [*messages, {"role": "assistant", "content": self.last.answer}]
        self.files = []

    def is_readable(self, file: Measured) -> bool:
        """Whether a file can be decoded, which it then is."""
        try:
            file.keep()
        except InputError as error:
            self.note(f"glm4v: {error}; it is dropped, ask again")
            return False
        return True

    def note(self, text: str) -> None:
        self.notes.out(visible(text), highlight=False)


def _message(files: Iterable[Measured], *texts: str) -> dict[str, Any]:
    pictures = [{"type": file.kind, file.kind: file} for file in files]
    return {"role": "user", "content": [*pictures, *({"type": "text", "text": text} for text in texts)]}
