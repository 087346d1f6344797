"""The demo, as `make demo` runs it."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).resolve().parents[2]


def demo(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_small():
    done = demo("--size", "tiny", "--tokens", "12")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("yes") == 2 and "tokens/s" in done.stdout


@pytest.mark.slow
def test_real_widths():
    done = demo()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
