"""What is raised when a person's input is at fault: a file, a prompt, an option."""

from __future__ import annotations

import re


class InputError(ValueError):
    """One line that names the input and what is wrong with it. The command line prints it and exits with 2.

    Names of files and words of libraries go into it: their line ends become spaces, what a terminal would obey escapes.
    """

    def __init__(self, text: str) -> None:
        line = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
