"""The drop-in beside packages that this environment lacks: older transformers, TRL. `make test-slow` runs it.

Each environment sees the packages of this one and its own few megabytes before them.
"""

import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
OLDEST = ["transformers==5.0.0", "transformers==4.57.6"]
pytestmark = pytest.mark.slow


def run(*command, **extra):
    done = subprocess.run(command, capture_output=True, text=True, **extra)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def python_with(folder, *packages):
    """An interpreter that has ``packages`` as well, which the constraints then leave free."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "env"))
    python = str(folder / "env/bin/python")
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (pathlib.Path(own) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pinned = (ROOT / "constraints.txt").read_text()
    if any("transformers" in package for package in packages):
        pinned = re.sub(r"^(transformers|tokenizers)==.*$", "", pinned, flags=re.MULTILINE)
    (folder / "constraints.txt").write_text(pinned)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "-c", str(folder / "constraints.txt"), *packages)
    return python


def passed(python, file):
    report = run(python, "-m", "pytest", "-p", "no:cacheprovider", "-rA", f"tests/integrations/{file}", cwd=ROOT)
    print(report[report.index("short test summary") :])
    assert "SKIPPED" not in report


@pytest.mark.parametrize("package", OLDEST)
def test_older_transformers(package, tmp_path):
    passed(python_with(tmp_path, package), "test_any_version.py")


def test_trl(tmp_path):
    passed(python_with(tmp_path, "trl"), "test_trl.py")
