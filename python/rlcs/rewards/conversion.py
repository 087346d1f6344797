"""Numbers from one unit to another, by pint. For workers (see worker.py): pint may take any time and memory."""

from __future__ import annotations

import math
import re
from typing import Any

import pint

_ANGLE = re.compile("radian|degree|turn|revolution")
_units: Any = pint.UnitRegistry(autoconvert_offset_to_baseunit=True, cache_folder=None)


def ratio_of_units(answer: str, truth: str) -> list[float] | None:
    """[factor, offset] that turn a number of the answer's unit into one of the truth's; None if they don't compare.

    Raises:
        ValueError: the truth's unit is unknown.
    """
    try:
        target = _units.parse_units(truth)
    except Exception as error:  # pint raises many kinds, from its tokenizer on
        raise ValueError(f"the unit {truth!r} of the truth is unknown: {error}") from None
    try:
        source = _units.parse_units(answer)
        if ("hertz" in str(source)) != ("hertz" in str(target)) and _ANGLE.search(f"{source} {target}"):
            return None  # 5 rad/s are no 5 Hz, though pint counts angles by nothing
        at_0, at_1, at_2 = (float(_units.Quantity(x, source).to(target).magnitude) for x in (0.0, 1.0, 2.0))
    except Exception:
        return None
    if not all(map(math.isfinite, (at_0, at_1, at_1 - at_0))):  # W in dBm, and powers that no float can hold
        return None
    if not math.isclose(at_2 - at_0, 2 * (at_1 - at_0), rel_tol=1e-6):  # dBm in W
        return None
    return [at_1 - at_0, at_0]
