"""The pinned versions: `make test` installs them on every Python that the project promises."""

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
LEAST = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]


def test_the_least_python_can_have_every_pin():
    """One that it cannot have leaves pip nothing to install at all."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    held = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": LEAST})]
    installed = {dist.name.lower().replace("_", "-"): dist.metadata for dist in importlib.metadata.distributions()}
    needs = {pin: installed.get(pin.name.lower().replace("_", "-"), {}).get("Requires-Python") for pin in held}
    assert len([pin for pin in needs if needs[pin]]) > 10
    assert [str(pin) for pin in needs if not SpecifierSet(needs[pin] or "").contains(f"{LEAST}.0")] == []
