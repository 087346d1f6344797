"""Texts of chemistry and biology that are read as they are written: formulas, reactions, chains of groups, strands."""

from __future__ import annotations

import re

from .number import unmark

_ARROW = re.compile(
    r"\\x(?:rightarrow|longequal)\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}|\\(?:long)?rightarrow(?![A-Za-z])|\\to(?![A-Za-z])"
    r"|[→⟶]|=+"
)
_BOTH_WAYS = re.compile(r"\\rightleftharpoons|<=+>|<-+>|[⇄⇋]")
STATE = re.compile(r"\((?:s|l|g|aq)\)|[↑↓]")
_ISOTOPE = re.compile(  # ^{14}_6 C: the second number says nothing that the first and the letters don't
    r"(?<![\w)\]}])(?:\{\})?(?:\^\{?(\d+)\}?(?:\s*_\{?\d+\}?)?|_\{?\d+\}?\s*\^\{?(\d+)\}?)\s*(?=[A-Z])"
)
_SUBSTANCE = re.compile(r"\d*(?:e-|\[?[A-Z](?:[A-Za-z\d]|\([A-Za-z\d]+\)|\]?\d*[+-])*)")
# What is written as a formula is: a reaction, an ion, atoms in numbers, shells of electrons.
WRITTEN = re.compile(
    r".*(?:->|⇌).*|.*[+-]|(?=.*[A-Z])(?:[A-Z][a-z]?|[\d()\[\]])+|(?:\[[A-Z][a-z]\])?(?:\d[spdf]\d+)+|sp\d?"
)
# A path, a chain of amino acids, a structure: A-C-B is no difference. Ends of a strand say where it begins.
_GROUP = r"\[?[A-Z][A-Za-z\d]*(?:\([A-Za-z\d]+\)\d*)?"
_STEP = r"(?:[-‐-―−]+>?|[→⟶]|\\(?:long)?rightarrow|\\to(?![A-Za-z]))"
_CHAIN = re.compile(rf"(?:[35]['′’]-?)?{_GROUP}(?:{_STEP}{_GROUP})+(?:-?[35]['′’])?|[35]['′’]-?[ACGTU]+-?[35]['′’]")


def formula(text: str) -> str:
    """A formula of chemistry, however its arrow, charges, indices, shells and spaces are written."""
    text = unmark(text.replace("\\uparrow", "↑").replace("\\downarrow", "↓"))
    text = _ISOTOPE.sub(lambda found: found[1] or found[2], text)
    text = re.sub(r"_\s*\{?(\d+)\}?", r"\1", _ARROW.sub("->", _BOTH_WAYS.sub("⇌", text)))
    text = re.sub(r"\s", "", re.sub(r"(?<=[spdf])\s*\^\s*\{?(\d+)\}?", r"\1", text))
    text = re.sub(r"\^\{?(\d*[+-])\}?(?=$|[-+()\]])", r"\1", text)
    *lefts, right = re.split("(->|⇌)", text)
    sides = [re.split(r"\+(?=[\dA-Ze\[])", side) for side in (*lefts[::2], right)]  # a plus before a charge parts none
    if lefts and all(_SUBSTANCE.fullmatch(STATE.sub("", part)) for side in sides for part in side):  # of no order
        return lefts[1].join("+".join(sorted(side)) for side in sides)
    return text


def chain(text: str) -> str | None:
    """A path (A-B-C-D), a chain of amino acids or a strand with its ends, however its lines are drawn; None of others,
    and of two terms like V - IR."""
    if re.search(r"_\s*\{?\s*[A-Za-z]", text):  # F_N - F_T - F_G
        return None
    text = re.sub(r"[\s_{}]", "", unmark(text[:400])).rstrip(".。")
    if not _CHAIN.fullmatch(text):
        return None
    groups = re.split(_STEP, text)
    if len(groups) == 2 and not all(re.fullmatch("[A-Z][a-z]+", group) for group in groups):
        return None
    return "-".join(groups).replace("′", "'").replace("’", "'")
