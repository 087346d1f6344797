"""What a server said, token by token: its own ids and log-probabilities where it gives them, else the text read again.

Servers differ. vLLM and SGLang name the ids (``token_ids``); older vLLM writes them into the log-probabilities
(``token_id:17``), llama.cpp as ``id``; others give each token's bytes; some the text alone, without its stop token.
Dims: L tokens of one reply.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm4v import Processor
from glm4v.detokenize import token_bytes

from ..endpoint import Fault, shown

ID = "token_id:"


@dataclass(frozen=True)
class Reply:
    """One completion."""

    token_ids: list[int]  # [L], the stop token included where the server shows it
    logprobs: list[float]  # [L], NaN where unknown
    ended: bool  # by a stop token; otherwise there was no room for more
    prompt_tokens: int | None  # as the server counts them
    read_again: bool  # ids are the text's, not the server's
    version: str | None  # of the weights, where the server says so


class Reader:
    """Reads the replies of servers that have the tokenizer of this processor."""

    def __init__(self, processor: Processor, stop_ids: Sequence[int], banned: Sequence[int], vocabulary: int) -> None:
        self.codec, self.tokenizer = processor.codec, processor.tokenizer
        self.stop_ids, self.banned, self.vocabulary = frozenset(stop_ids), frozenset(banned), vocabulary
        added = self.tokenizer.get_added_tokens_decoder()
        self._controls = {id: token.content for id, token in added.items() if token.special}
        self._bytes: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}

    def __call__(self, body: Any, asked: int) -> Reply:
        """The first choice of a chat completion of at most ``asked`` tokens.

        Raises:
            Fault: the reply isn't one, or was cut off by the server.
        """
        try:
            return self._read(body, asked)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise Fault(f"expected a chat completion, got {shown(str(body))}", passes=True) from None

    def _read(self, body: Any, asked: int) -> Reply:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, reason = choice["message"], choice["finish_reason"]
        text = message.get("content") or ""
        if reason not in ("stop", "length"):  # aborted while weights changed, say: the next try may end well
            raise Fault(f"finish_reason must be stop or length, got {reason!r}", passes=True)
        content = (choice.get("logprobs") or {}).get("content") or []
        ids, logprobs = self._named(choice, content, text)
        read_again = ids is None
        if ids is None:
            apart = message.get("reasoning_content") or message.get("reasoning")
            if apart:
                raise Fault("thinking must stay in content, got it apart: start the server without a reasoning parser")
            ids = self.encode(text)
            logprobs = [math.nan] * len(ids)
        last = choice.get("stop_reason") if choice.get("matched_stop") is None else choice["matched_stop"]
        if reason == "stop" and isinstance(last, int) and last in self.stop_ids and last not in ids[-1:]:
            ids, logprobs = [*ids, last], [*logprobs, math.nan]
        if not all(isinstance(id, int) and 0 <= id < self.vocabulary for id in ids):
            raise Fault(f"token ids must be below {self.vocabulary}, the model's vocabulary, got {shown(str(ids))}")
        if not read_again and len(ids) > asked + 1:
            raise Fault(f"at most {asked} tokens were asked for, got {len(ids)}")
        for i, id in enumerate(ids):  # what follows a stop token, or stands for a picture, was not asked for
            if id in self.banned:
                ids, logprobs, reason = ids[:i], logprobs[:i], "length"
                break
            if id in self.stop_ids:
                ids, logprobs, reason = ids[: i + 1], logprobs[: i + 1], "stop"
                break
        version = body.get("metadata")
        version = version.get("weight_version") if isinstance(version, Mapping) else None
        return Reply(ids, logprobs, reason == "stop", usage.get("prompt_tokens"), read_again, version)

    def _named(self, choice: Mapping[str, Any], content: list[Any], text: str) -> tuple[list[int] | None, list[float]]:
        """Ids as the server has them, and their log-probabilities; None where it names none."""
        values = [math.nan if (value := one.get("logprob")) is None else float(value) for one in content]
        ids = choice.get("token_ids")
        if ids is None and content:
            ids = self._from_content(content, text)
        if ids is None:
            return None, []
        if not values:
            values = [math.nan] * len(ids)
        if len(values) != len(ids):
            raise Fault(f"log-probabilities must be as many as tokens ({len(ids)}), got {len(values)}")
        # Temperature 0 and rounding give 0 or a little more; what is lower than any sampled token can be says nothing.
        return list(ids), [min(x, 0.0) if x > -9000 else math.nan for x in values]

    def _from_content(self, content: list[Any], text: str) -> list[int] | None:
        names = [str(one.get("token", "")) for one in content]
        if all(name.startswith(ID) and name[len(ID) :].isdigit() for name in names):
            return [int(name[len(ID) :]) for name in names]
        if all(isinstance(one.get("id"), int) for one in content):
            return [one["id"] for one in content]
        found = [self._id_of(one.get("bytes"), name) for one, name in zip(content, names, strict=True)]
        ids = [id for id in found if id is not None]
        # A token of half a character has no text of its own: then the bytes are not the token's.
        return ids if len(ids) == len(found) and self.text(ids) in (text, text + self.text(ids[-1:])) else None

    def _id_of(self, data: Any, name: str) -> int | None:
        if not self._ids:
            self._ids = {self.bytes_of(id): id for id in range(self.tokenizer.get_vocab_size()) if self.bytes_of(id)}
        ok = isinstance(data, list) and all(isinstance(x, int) and 0 <= x < 256 for x in data)
        return self._ids.get(bytes(data) if ok else name.encode())

    def bytes_of(self, id: int) -> bytes:
        if id not in self._bytes:
            self._bytes[id] = token_bytes(self.tokenizer, id)
        return self._bytes[id]

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.bytes_of(id) for id in ids).decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        """Ids of what a model has said. Tags are tokens; what reads like a control token is plain characters, since
        servers don't show those."""
        pieces = self.codec.split(text)
        return self.codec.join(self._controls.get(p, p) if isinstance(p, int) else p for p in pieces)

    def whole(self, ids: Sequence[int]) -> int:
        """How many of the ids end with a whole character: what a text can say of them."""
        decoder, kept = codecs.getincrementaldecoder("utf-8")("replace"), 0
        for n, id in enumerate(ids, 1):
            decoder.decode(self.bytes_of(id))
            if not decoder.getstate()[0]:
                kept = n
        return kept


def closed(ids: Sequence[int], tags: tuple[list[int], list[int], list[int]]) -> int | None:
    """After how many tokens the thinking has ended by itself, at ``</think>`` or ``<answer>``; None where it hasn't."""
    _, *ends = tags
    for n in range(1, len(ids) + 1):
        if any(n >= len(tag) and list(ids[n - len(tag) : n]) == tag for tag in ends):
            return n
    return None


def cut(ids: Sequence[int], budget: int, tags: tuple[list[int], list[int], list[int]]) -> int | None:
    """After how many tokens `glm4v.generate.ThinkingBudget` ends the thinking of an answer that begins with ``ids``;
    None where it ended by itself before, or is not yet so long. ``tags`` are those that open the thinking, close it,
    and open the answer."""
    opening = tags[0]
    begins = list(ids[: len(opening)]) == opening and budget >= len(opening)  # the tag itself doesn't count
    at, end = budget + len(opening) * begins, closed(ids, tags)
    return at if at <= len(ids) and (end is None or end > at) else None


def unknown(values: Sequence[float]) -> int:
    """How many are NaN."""
    return int(np.isnan(np.asarray(values, dtype=np.float64)).sum())
