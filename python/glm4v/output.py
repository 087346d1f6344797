"""How a command parts with its output."""

from __future__ import annotations

import os
import sys


def let_go() -> None:
    """Writes what stdout holds, or drops it where that fails: Python would try again at exit, tell that in its own way
    and end with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
