"""Beside packages that this environment lacks: older transformers, TRL, a server. `make test-slow` runs it.

Each environment sees the packages of this one and its own few megabytes before them.
"""

import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOADS = """
import importlib.util, torch
found = importlib.util.find_spec("torchvision").submodule_search_locations[0]
try:
    torch.ops.load_library(f"{found}/image.so")
except OSError as error:
    print("OSError")
"""
DECODE = """

def decode_image(input, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=False):
    import io

    import numpy
    import PIL.Image

    image = PIL.Image.open(input if isinstance(input, str) else io.BytesIO(input.numpy().tobytes()))
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
"""
OLDER = ["transformers==5.23.0", "transformers==5.0.0", "transformers==4.57.6"]
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
    if any("transformers==" in package for package in packages):
        pinned = re.sub(r"^(transformers|tokenizers)==.*$", "", pinned, flags=re.MULTILINE)
    (folder / "constraints.txt").write_text(pinned)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "-c", str(folder / "constraints.txt"), *packages)
    return python


def with_torchvision(folder, python):
    """The server wants it, for its Python part and to read images. An index may have it for CUDA alone; its libraries
    then don't load beside a torch for CPUs: Pillow reads, and what describes its operators to torch goes."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "-c", str(folder / "constraints.txt"), "torchvision")
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    if "OSError" in run(python, "-c", LOADS):
        (pathlib.Path(own) / "torchvision/_meta_registrations.py").write_text("")
        with open(pathlib.Path(own) / "torchvision/io/image.py", "a") as file:
            file.write(DECODE)
    return python


def passed(python, file):
    report = run(python, "-m", "pytest", "-p", "no:cacheprovider", "-rA", f"tests/{file}", cwd=ROOT)
    print(report[report.index("short test summary") :])
    assert "SKIPPED" not in report


@pytest.mark.parametrize("package", OLDER)
def test_older_transformers(package, tmp_path):
    passed(python_with(tmp_path, package), "integrations/test_any_version.py")


def test_trl(tmp_path):
    passed(python_with(tmp_path, "trl"), "integrations/test_trl.py")


def test_transformers_serve(tmp_path):
    """Rollouts by the server in a process of its own."""
    python = python_with(tmp_path, "transformers[serving]", "python-multipart")
    passed(with_torchvision(tmp_path, python), "rlcs/test_served.py")
