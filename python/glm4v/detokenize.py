"""Token ids to text as they come: whole characters only, and nothing of a stop string.

A byte-level token is a run of bytes, and a character may span several tokens. Bytes are therefore decoded by Python's
incremental UTF-8 decoder, which holds back an unfinished character. Text that may be the beginning of a stop string is
held back too, until it is clear that it is not.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from typing import Protocol


class Vocabulary(Protocol):
    """The one thing asked of a tokenizer here; `tokenizers.Tokenizer` has it."""

    def id_to_token(self, id: int) -> str | None: ...


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte, which byte-level vocabularies are written in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(vocabulary: Vocabulary, token: int) -> bytes:
    """Bytes of one token: none for an id that only pads the vocabulary."""
    text = vocabulary.id_to_token(token) or ""
    try:
        return bytes(_byte_of()[character] for character in text)
    except KeyError:  # an added token, which is plain text
        return text.encode()


class TextStream:
    """Text of a growing list of tokens. The pieces together are the whole text, cut before the first stop string."""

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.stop = stop
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Text that this token settles; ``stopped`` is true from the token on that completes a stop string."""
        return self._settle(self._decoder.decode(token_bytes(self.vocabulary, token)))

    def finish(self) -> str:
        """What was held back. An unfinished character becomes U+FFFD."""
        text = self._settle(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _settle(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            settled, self._held = self._held[: min(found)], ""
            return settled
        longest = max(map(len, self.stop), default=1)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self.stop):
                break
        else:
            start = len(self._held)
        settled, self._held = self._held[:start], self._held[start:]
        return settled
