"""From a full response to the answer in it, and the gates that a response has to pass first.

``<think>...</think><answer>...</answer>``, each tag once and nothing else around them; inside the answer exactly one
``<|begin_of_box|>...<|end_of_box|>`` where the domain has a short answer, and none where it has not (the paper, section
on rewards: a box in an answer that nothing can verify gets the minimum). Limits of the language and repetition gates
are ours: the paper names the gates, not their numbers.
"""

from __future__ import annotations

import re
from collections import Counter

BOX_BEGIN, BOX_END = "<|begin_of_box|>", "<|end_of_box|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_WHOLE = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_UNSEEN = "\u200b\u2060\ufeff"  # spaces of no width
_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # what generation stops at
_BOX = re.compile(re.escape(BOX_BEGIN) + "(.*?)" + re.escape(BOX_END), re.DOTALL)
_CJK = re.compile(r"[\u3400-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")
_UNSPOKEN = re.compile(
    r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|\\\((?:[^\\]|\\[^()])*\\\)|\\\[(?:[^\\]|\\[^\[\]])*\\\]|`[^`\n]*`|<\|[^|]*\|>"
    r"|\"[^\"\n]*\"|“[^“”]*”|「[^「」]*」|《[^《》]*》",
    re.DOTALL,
)
_UNIT_OF_TEXT = re.compile(r"[\u3400-\u9fff]|\w+|[^\w\s]")

MIXED_LEAST, MIXED_SHARE = 20, 0.3  # words of the rarer language, and their share, from which text counts as mixed
WINDOW, WINDOWS, REPEATS, REPEATED_SHARE = 8, 64, 4, 0.5


class FormatFault(Exception):
    """The response is not of the form that the domain asks for; the text says what is amiss."""


def boxed_answer(response: str) -> str:
    """What stands in the one box of the answer."""
    _, answer = split_response(response)
    if answer.count(BOX_BEGIN) != 1 or answer.count(BOX_END) != 1:
        raise FormatFault(f"the answer must hold exactly one box, got {answer.count(BOX_BEGIN)}")
    found = _BOX.search(answer)
    if found is None:
        raise FormatFault("the box must begin before it ends")
    if not (answer := found[1].strip().strip(_UNSEEN).strip()):
        raise FormatFault("the box must hold something, got nothing")
    return answer


def open_answer(response: str) -> str:
    """The whole answer, where no box is due."""
    _, answer = split_response(response)
    if BOX_BEGIN in answer or BOX_END in answer:
        raise FormatFault("the answer must hold no box here: nothing can verify it")
    if not answer.strip():
        raise FormatFault("the answer must hold something, got nothing")
    return answer.strip()


def split_response(response: str) -> tuple[str, str]:
    """(thinking, answer), after every gate that the domains share."""
    response = response.rstrip()
    while response.endswith(_STOPS):
        response = response[: response.rindex("<|")].rstrip()
    for tag in TAGS:
        if response.count(tag) != 1:
            raise FormatFault(f"the response must hold {tag} once, got {response.count(tag)}")
    whole = _WHOLE.fullmatch(response)
    if whole is None:
        raise FormatFault("the response must be <think>...</think><answer>...</answer> and nothing else")
    # A text in two languages, or a table with equal rows, may be what a picture shows.
    for name, part in (("thinking", whole[1]), ("answer", _BOX.sub(" ", whole[2]))):
        if mixes_languages(part):
            raise FormatFault(f"the {name} mixes Chinese and English")
        if repeats_itself(part):
            raise FormatFault(f"the {name} repeats itself")
    return whole[1], whole[2]


def true_answer(truth: str) -> str:
    """The answer of a truth, which may be a full response, a boxed text or the bare answer."""
    whole = _WHOLE.fullmatch(truth)
    answer = whole[2] if whole else truth
    boxes = _BOX.findall(answer)
    if len(boxes) > 1:
        raise ValueError(f"truth must hold at most one box, got {len(boxes)}")
    return (boxes[0] if boxes else answer).strip()


def mixes_languages(text: str) -> bool:
    """Whether Chinese and English share the running text; formulas, code, quotations and special tokens don't count."""
    if not _CJK.search(text):
        return False
    text = _UNSPOKEN.sub(" ", text)
    chinese = len(_CJK.findall(text)) / 1.7  # characters to a word
    english = len(_LATIN_WORD.findall(text))
    rarer = min(chinese, english)
    return rarer >= MIXED_LEAST and rarer / (chinese + english) > MIXED_SHARE


def repeats_itself(text: str) -> bool:
    """Whether most of the text's windows of eight words stand in it four times or more."""
    if len(text) < 2 * WINDOWS:
        return False
    words = _UNIT_OF_TEXT.findall(text)
    windows = Counter(zip(*(words[i:] for i in range(WINDOW)), strict=False))
    total = sum(windows.values())
    return total >= WINDOWS and sum(n for n in windows.values() if n >= REPEATS) > REPEATED_SHARE * total
