"""What a row says: the ceiling that bounds it, its share of that, and how cost grows with size.

A row is what one benchmark notes, ``extra_info`` of the JSON: seconds a call of each peer, ours first (``median_s``,
``rounds_s``), what a call takes (``flops``, ``bytes``, ``peak_mib``), and the ceilings of the same run.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

# A number above 0 lies so far from a double's limits that ratios and sums of several do, too.
LEAST, MOST = 1e-30, 1e30
RANGE = f"from {LEAST:g} to {MOST:g}"


def _is_amount(x: Any) -> bool:
    return type(x) in (int, float) and LEAST <= x <= MOST  # true is no number


# What a fact must be, in words and as a test.
Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = "text", lambda x: isinstance(x, str)
TEXT_OR_NULL: Kind = "text or null", lambda x: x is None or isinstance(x, str)
COUNT: Kind = "a whole number above 0", lambda x: type(x) is int and x > 0
AMOUNT_OR_0: Kind = f"0 or a number {RANGE}", lambda x: _is_amount(x) or (type(x) in (int, float) and x == 0)
OBJECT: Kind = "an object", lambda x: isinstance(x, dict)
BY_NAME: Kind = f"numbers {RANGE} by name", lambda x: isinstance(x, dict) and all(map(_is_amount, x.values()))
BY_BYTES: Kind = f"numbers {RANGE} by size in bytes", lambda x: BY_NAME[1](x) and all(map(_is_size, x))


def _is_size(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


FACTS = {
    **dict.fromkeys(("op", "case", "group"), TEXT),
    "dtype": TEXT_OR_NULL,  # of records that were made before all rows had one
    **dict.fromkeys(("flops", "bytes", "ceiling_gflops", "ceiling_gbs"), AMOUNT_OR_0),
    **dict.fromkeys(("median_s", "rounds_s", "peak_mib"), OBJECT),
}
FACTS_OF_RUN = {
    "machine_info": {"command": TEXT, "hardware": TEXT, "threads": COUNT, "isa": TEXT, "versions": OBJECT},
    "ceilings": {"peak_gflops": BY_NAME, "product_gflops": BY_NAME, "bandwidth_gbs": BY_BYTES},
}


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Row]]:
    """The JSON of a run, and its rows by name.

    Raises:
        ValueError: one line that says what is wrong with the file.
    """
    try:
        run = json.loads(path.read_text())
        json.dumps(run, ensure_ascii=False).encode()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeEncodeError:  # JSON can spell it; no page, no figure and no terminal can show it
        raise ValueError(f"{path} must be Unicode, got half a pair of UTF-16") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} must be the JSON of a run, got another kind of file") from None
    for part, kind in (("machine_info", dict), ("commit_info", dict), ("ceilings", dict), ("benchmarks", list)):
        if not isinstance(run, dict) or not isinstance(run.get(part), kind):
            raise ValueError(f"{path} must be the JSON of a run, its {part} are missing")
    for part, kinds in FACTS_OF_RUN.items():
        _expect(path, f"its {part}", run[part], kinds)
    rows = {}
    for i, benchmark in enumerate(run["benchmarks"]):
        if not isinstance(benchmark, dict) or not isinstance(row := benchmark.get("extra_info"), dict):
            raise ValueError(f"{path} must be the JSON of a run, benchmark {i} has no extra_info")
        if "median_s" not in row:  # of another plugin's making
            continue
        row.setdefault("dtype", None)
        _expect(path, f"benchmark {i}", row, FACTS)
        if not _is_timed(row):
            raise ValueError(f"{path} must be the JSON of a run, benchmark {i} has other times than seconds {RANGE}")
        rows[str(benchmark.get("fullname", i))] = row
    if not rows:
        raise ValueError(f"{path} must have rows that were timed, got none")
    return run, rows


def _expect(path: Path, whose: str, facts: dict[str, Any], kinds: dict[str, Kind]) -> None:
    for name, (words, fits) in kinds.items():
        if name not in facts:
            raise ValueError(f"{path} must be the JSON of a run, {whose} has no {name}")
        if not fits(facts[name]):
            found = reprlib.repr(facts[name])  # of any length
            raise ValueError(f"{path} must be the JSON of a run, {name} of {whose} must be {words}, got {found}")


def _is_timed(row: Row) -> bool:
    """Whether each peer has a median and, as often as the others, rounds."""
    medians, rounds = row["median_s"], row["rounds_s"]
    if not medians or medians.keys() != rounds.keys():
        return False
    turns = list(rounds.values())
    if not all(isinstance(turn, list) and turn and len(turn) == len(turns[0]) for turn in turns):
        return False
    seconds = [*medians.values(), *(second for turn in turns for second in turn)]
    return all(map(_is_amount, seconds))


def ours_s(row: Row) -> float:
    return next(iter(row["median_s"].values()))


def bound(row: Row) -> str:
    """``compute`` or ``memory``, whichever takes longer at its ceiling; empty where the row gives neither."""
    compute, memory = _at_ceilings(row)
    return "" if not compute and not memory else "compute" if compute >= memory else "memory"


def share(row: Row) -> float:
    """Of the ceiling that bounds the row, ours; 0 where none is known."""
    return max(_at_ceilings(row)) / ours_s(row)


def _at_ceilings(row: Row) -> tuple[float, float]:
    """Seconds for the flops and for the bytes."""
    kinds = (("flops", "ceiling_gflops"), ("bytes", "ceiling_gbs"))
    compute, memory = (row[work] / row[ceiling] / 1e9 if row[ceiling] else 0.0 for work, ceiling in kinds)
    return compute, memory


def speedups(row: Row) -> dict[str, float]:
    """Peer -> its time over ours."""
    _, *others = row["median_s"]
    return {name: row["median_s"][name] / ours_s(row) for name in others}


def growth(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Group -> peer -> b of the fit ``seconds ~ work ** b`` over the sizes of one benchmark and dtype.

    Work is the flops of a row, or its bytes. 1: time grows as the work does; below, something constant is left over;
    above, large sizes fall out of a cache. Groups whose sizes lie within a factor of two say nothing and are left out.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["flops"] or row["bytes"]:
            groups[row["group"]].append(row)
    found = {}
    for group, members in groups.items():
        works = [row["flops"] or row["bytes"] for row in members]
        if max(works) < 2 * min(works):
            continue
        peers = [name for name in members[0]["median_s"] if all(name in row["median_s"] for row in members)]
        found[group] = {name: slope(works, [row["median_s"][name] for row in members]) for name in peers}
    return found


def slope(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """Least squares of the logarithms."""
    x, y = np.log(np.fromiter(sizes, float)), np.log(np.fromiter(seconds, float))
    x -= x.mean()
    return float(x @ y / (x @ x))


def time_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def rate_text(row: Row) -> str:
    kind = bound(row)
    if not kind:
        return ""
    if kind == "memory":
        return f"{row['bytes'] / ours_s(row) / 1e9:.1f} GB/s"
    return f"{row['flops'] / ours_s(row) / 1e9:.0f} GFLOP/s"


def share_text(row: Row) -> str:
    return f"{share(row):.0%} of {bound(row)}" if bound(row) else ""


def memory_text(row: Row) -> str:
    """Ours and the baseline's."""
    known = [f"{peak}" for peak in list(row["peak_mib"].values())[:2] if peak is not None]
    return f"{' / '.join(known)} MiB" if known else ""


def growth_text(slopes: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in slopes.items() if math.isfinite(value))
