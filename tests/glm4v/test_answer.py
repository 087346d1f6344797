"""Every output has one reading, and no tag is ever part of it."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v.answer import TAGS, Parts, separate

T, _T, A, _A, B, _B = TAGS


@pytest.mark.parametrize(
    "text, thinking, answer, box",
    [
        # As trained
        (f"{T}why{_T}{A}so{_A}", "why", "so", None),
        (f"{T}why{_T}{A}so", "why", "so", None),  # </answer> is a stop token of the released model
        (f"{T}\nwhy\n{_T}\n{A}\nso\n{_A}\n", "why", "so", None),
        (f"{T}why{_T}{A}It is {B}42{_B}.{_A}", "why", "It is 42.", "42"),
        (f"{T}{_T}{A}so{_A}", "", "so", None),
        # Boxes
        (f"{T}{B}1{_B}{_T}{A}so{_A}", "1", "so", None),  # one in the thinking is not the result
        (f"{T}why{_T}{A}{B}1{_B} or {B}2{_B}{_A}", "why", "1 or 2", "2"),
        (f"{T}why{_T}{A}{B}1{_B} or {B}2{_A}", "why", "1 or 2", "1"),
        (f"{T}why{_T}{A}{B}1{B}2{_B}{_A}", "why", "12", "2"),
        (f"{T}why{_T}{A}1{_B}{_A}", "why", "1", None),
        (f"{T}why{_T}{A}{B}{_B}{_A}", "why", "", ""),
        (f"{T}why{_T}{A}{B} [1, 2]\n{_B}{_A}", "why", "[1, 2]", "[1, 2]"),
        (f"{T}why{_T}{A}{B}<{_B}{_A}", "why", "<", "<"),
        # Tags missing
        ("so", "", "so", None),
        (f"{A}so{_A}", "", "so", None),
        (f"Well: {A}so{_A} it is", "", "so", None),
        (f"{T}why{_T}so", "why", "so", None),
        (f"why{_T}{A}so{_A}", "why", "so", None),
        (f"why{_T}so", "why", "so", None),
        (f"{T}why{A}so{_A}", "why", "so", None),
        (f"{T}why so", "why so", "", None),
        (f"{T}", "", "", None),
        ("", "", "", None),
        (f"so{_A}", "", "so", None),
        (f"{T}why{_T}", "why", "", None),
        (f"{T}why{_T}{A}", "why", "", None),
        # Tags too many
        (f"{T}{T}why{_T}{A}{A}so{_A}{_A}", "why", "so", None),
        (f"{T}why{_T}so{T}no{_T}", "why", "so", None),
        (f"{T}why{_T}{A}so{T}no{_T} it is{_A}", "why", "so it is", None),
        (f"{T}why{_T}{A}so{T}no", "why", "so", None),
        (f"{T}why{_T}{A}so{_A}{A}other{_A}", "why", "so", None),
        (f"{T}why{A}x{_T}{A}so{_A}", "whyx", "so", None),
        (f"{T}why{_T}more{_T}{A}so{_A}", "why", "so", None),
        # Tags out of shape
        ("< think >why</ think >< Answer >so< / answer >", "why", "so", None),
        (f"{T}why{_T}{A}s<thi{T}{_T}nk>o{_A}", "why", "so", None),
        (f"{T}why{_T}{A}so</answer", "why", "so", None),
        (f"{T}why{_T}{A}{B}7{_B[:-1]}", "why", "7", None),
        # Not tags
        (f"{T}a < b{_T}{A}a <b>c</b>{_A}", "a < b", "a <b>c</b>", None),
        (f"{T}why{_T}{A}x < a", "why", "x < a", None),
        (f"{T}why{_T}{A}x <", "why", "x <", None),
    ],
)
def test_readings(text, thinking, answer, box):
    assert separate(text) == Parts(thinking, answer, box)


WHOLE = f"{T}why{_T}{A}so {B}42{_B} it is{_A}"


@pytest.mark.parametrize("end", range(len(WHOLE) + 1))
def test_a_text_cut_anywhere_only_grows(end):
    before, whole = separate(WHOLE[:end], ended=False), separate(WHOLE)
    assert whole.thinking.startswith(before.thinking)
    assert whole.answer.startswith(before.answer)
    assert before.box in (None, "42")


FRAGMENTS = [*TAGS, "</think >", "<THINK>", "< answer>", "words ", "x < y ", "数", "\n", "<", "|>", "/", "think>", " "]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.integers(0, 12), st.booleans())
def test_no_tag_ever_leaks(fragments, cut_off, ended):
    text = "".join(fragments)
    parts = separate(text[: len(text) - cut_off], ended)
    for part in (parts.thinking, parts.answer, parts.box or ""):
        assert not any(tag in "".join(part.split()).lower() for tag in TAGS)


@pytest.mark.parametrize("fragment", ["<", "< ", "<thi"])
def test_what_repeats_is_read_in_one_go(fragment):
    """A model that is caught in a loop may say nothing else; the time must not grow as the square."""
    start = time.process_time()
    assert separate(f"{T}why{_T}{A}" + fragment * 50_000, ended=False).thinking == "why"
    assert time.process_time() - start < 10  # 0.2 s here, minutes as the square


@pytest.mark.parametrize("order", list(itertools.permutations([T, _T, A, _A])))
def test_tags_in_any_order(order):
    parts = separate("".join(f"{tag}{i}" for i, tag in enumerate(order)))
    assert not any(tag in parts.thinking + parts.answer for tag in TAGS)
