"""What the model said, taken apart: thinking, answer, box.

A well-formed output is ``<think>...</think><answer>...</answer>``, with a verifiable result once inside
``<|begin_of_box|>...<|end_of_box|>``. Outputs are also cut short, miss tags or repeat them; the rules in `separate`
give every text one reading, in which no tag is ever part of the thinking, the answer or the box.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"
OPEN_ANSWER, CLOSE_ANSWER = "<answer>", "</answer>"
OPEN_BOX, CLOSE_BOX = "<|begin_of_box|>", "<|end_of_box|>"
TAGS = (OPEN_THINK, CLOSE_THINK, OPEN_ANSWER, CLOSE_ANSWER, OPEN_BOX, CLOSE_BOX)

FinishReason = Literal["stop", "length", "budget"]


@dataclass(frozen=True)
class Generation:
    """One answer.

    Args:
        text: all that was said, tags included, without the stop token and cut before a stop string.
        thinking: what stands between the think tags; empty without thinking.
        answer: the answer without any tag; empty where the thinking never ended.
        box: the content of the last whole box in the answer; None without one.
        token_ids: every generated token, the stop token and forced ones included.
        prompt_tokens: length of the prompt.
        finish_reason: ``length`` when ``max_new_tokens`` (or the context) ran out. Otherwise the answer came to its
            end: ``budget`` where the thinking budget had cut the thinking short, ``stop`` where it had not.
        forced: positions in ``token_ids`` of tokens that the thinking budget put there. They were not sampled.
        logprobs: of each token of ``token_ids``, when asked for: the model's own distribution at temperature 1, before
            bans, penalties and cuts.
    """

    text: str
    thinking: str
    answer: str
    box: str | None
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    forced: list[int]
    logprobs: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``glm4v generate --json`` prints."""
        names = ("text", "thinking", "answer", "box", "token_ids", "prompt_tokens", "finish_reason")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Parts:
    thinking: str
    answer: str
    box: str | None


def separate(text: str, ended: bool = True) -> Parts:
    """Reads an output.

    The thinking goes to the first ``</think>``, or, where that is missing, to the first ``<answer>``, or to the end; it
    needs one of the two think tags. The answer goes from the first ``<answer>`` after that, or from the thinking's end,
    to ``</answer>`` or the end; further thoughts in it are dropped. Case and spaces inside a tag don't matter.

    Args:
        text: the output.
        ended: the model finished. A text that was cut off may stop in the middle of a tag, of which then nothing stays.
    """
    thinking, rest = _split_thinking(text)
    if opening := _find(OPEN_ANSWER, rest):
        rest = rest[opening.end() :]
    rest = _THOUGHT.sub("", rest)
    if closing := _find(CLOSE_ANSWER, rest):
        rest, ended = rest[: closing.start()], True
    boxes = _BOX.findall(rest)
    box = _without_tags(boxes[-1], ended=True) if boxes else None
    return Parts(_without_tags(thinking, ended), _without_tags(rest, ended), box)


def _split_thinking(text: str) -> tuple[str, str]:
    opening = _find(OPEN_THINK, text)
    if closing := _find(CLOSE_THINK, text):
        thinking, rest = text[: closing.start()], text[closing.end() :]
        opening = _find(OPEN_THINK, thinking)
    elif answer := _find(OPEN_ANSWER, text):
        thinking, rest = text[: answer.start()] if opening else "", text[answer.start() :]
        opening = _find(OPEN_THINK, thinking)
    elif opening:
        thinking, rest = text, ""
    else:
        thinking, rest = "", text
    return thinking[opening.end() :] if opening else thinking, rest


def _pattern(tag: str) -> str:
    """A regular expression for ``tag``, however it is spaced."""
    words = re.findall(r"<\|?|/|\w+|\|?>", tag)
    return r"\s*".join(re.escape(word) for word in words)


def _find(tag: str, text: str) -> re.Match[str] | None:
    return _PATTERNS[tag].search(text)


def _without_tags(text: str, ended: bool) -> str:
    """``text`` without whole tags, also such as appear when others are taken out, and without the beginning of one."""
    before = None
    while before != text:
        before, text = text, _ANY_TAG.sub("", text)
    end = len(text)
    while (start := text.rfind("<", 0, end)) >= 0 and _begins_a_tag(text[start:end], ended):
        end = start  # and perhaps another one before it
    return text[:end].strip()


def _begins_a_tag(tail: str, ended: bool) -> bool:
    """An answer may well end in "x < a", so a finished text loses only what is clearly a tag."""
    tail = "".join(tail.split()).lower()
    return len(tail) >= (4 if ended else 1) and any(tag.startswith(tail) for tag in TAGS)


_PATTERNS = {tag: re.compile(_pattern(tag), re.IGNORECASE) for tag in TAGS}
_ANY_TAG = re.compile("|".join(map(_pattern, TAGS)), re.IGNORECASE)
_THOUGHT = re.compile(f"{_pattern(OPEN_THINK)}.*?(?:{_pattern(CLOSE_THINK)}|\\Z)", re.IGNORECASE | re.DOTALL)
_BOX = re.compile(
    f"{_pattern(OPEN_BOX)}((?:(?!{_pattern(OPEN_BOX)}).)*?){_pattern(CLOSE_BOX)}", re.IGNORECASE | re.DOTALL
)
