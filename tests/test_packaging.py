"""Installs the distribution the ways users do. Long: `make test-slow` runs it."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = """
import torch, glm4v_ext
from glm4v_ext import reference
x, w = torch.randn(5, 64), torch.randn(64)
torch.testing.assert_close(glm4v_ext.rms_norm(x, w), reference.rms_norm(x, w))
print(glm4v_ext.__file__)
"""
pytestmark = pytest.mark.slow


def run(*command: str, **extra) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **extra)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A clean copy of the tracked files, so that no earlier build helps."""
    folder = tmp_path_factory.mktemp("source")
    files = run("git", "ls-files", cwd=ROOT).split()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A fresh virtual environment; PATH has no nvcc."""
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))
    hidden = [p for p in os.environ["PATH"].split(":") if not (pathlib.Path(p) / "nvcc").exists()]
    tools = tmp_path / "tools"  # the compiler, where it shares a folder with nvcc
    tools.mkdir()
    for tool in ("cc", "c++", "gcc", "g++", "git", "ld", "as", "ar", "ranlib", "make"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    return {
        **os.environ,
        "PATH": ":".join([str(tmp_path / "env" / "bin"), str(tools), *hidden]),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PYTHON": str(tmp_path / "env" / "bin" / "python"),
    }


def pip(environment: dict[str, str], *arguments: str) -> None:
    run(environment["PYTHON"], "-m", "pip", "install", "--quiet", *arguments, env=environment)


def smoke(environment: dict[str, str], tmp_path: pathlib.Path) -> str:
    return run(environment["PYTHON"], "-c", SMOKE, env=environment, cwd=tmp_path)


BUILD_TOOLS = ("torch", "numpy", "setuptools>=77", "wheel", "pybind11", "cmake", "ninja")


def test_a_source_distribution_is_whole(source, tmp_path):
    (source / "glm4v_ext/left_over.so").write_bytes(b"")  # of a build in the tree
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    (source / "glm4v_ext/left_over.so").unlink()
    wanted = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    left_out = ("tests/", "bench/", "examples/", ".", "Makefile")
    assert {name for name in wanted - held if not name.startswith(left_out)} == set()
    assert not [name for name in held if name.endswith(".so") or "__pycache__" in name]


def test_without_isolation(source, environment, tmp_path):
    pip(environment, *BUILD_TOOLS)
    start = time.perf_counter()
    pip(environment, "--no-build-isolation", str(source))
    print(f"build and install: {time.perf_counter() - start:.0f} s")
    assert "site-packages" in smoke(environment, tmp_path)


def test_with_isolation(source, environment, tmp_path):
    pip(environment, str(source))
    assert "site-packages" in smoke(environment, tmp_path)


def test_editable(source, environment, tmp_path):
    pip(environment, *BUILD_TOOLS)
    pip(environment, "--no-build-isolation", "-e", str(source))
    assert str(source) in smoke(environment, tmp_path)


def test_console_script_names_its_extra(source, environment, tmp_path):
    pip(environment, *BUILD_TOOLS)
    pip(environment, "--no-build-isolation", "--no-deps", str(source))
    done = subprocess.run(["glm4v", "info"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "pip install 'glm4v-ext[model]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
