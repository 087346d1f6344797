"""Installs the distribution the ways users do. Long: `make test-slow` runs it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = """
import torch, glm4v_ext
from glm4v_ext import reference
x, w = torch.randn(5, 64), torch.randn(64)
torch.testing.assert_close(glm4v_ext.rms_norm(x, w), reference.rms_norm(x, w))
print(glm4v_ext.__file__)
"""
# torch of the constraints, and another: a build with CUDA, several GB.
TORCH = {"2.13.0": 3e9, "2.14.1": 20e9}
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
    """A fresh virtual environment that sees no source tree; PATH has no nvcc."""
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))
    hidden = [p for p in os.environ["PATH"].split(":") if not (pathlib.Path(p) / "nvcc").exists()]
    tools = tmp_path / "tools"  # the compiler, where it shares a folder with nvcc
    tools.mkdir()
    for tool in ("cc", "c++", "gcc", "g++", "git", "ld", "as", "ar", "ranlib", "make"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": ":".join([str(tmp_path / "env" / "bin"), str(tools), *hidden]),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PYTHON": str(tmp_path / "env" / "bin" / "python"),
    }


@pytest.fixture(scope="module")
def wheel(source) -> pathlib.Path:
    """The CPU wheel that `make wheels` builds."""
    print(run(sys.executable, ".ci/wheels.py", "cpu", cwd=source))
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


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
    left_out = ("tests/", "bench/", "examples/", "docs/", ".", "Makefile")
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


@pytest.mark.parametrize("torch", TORCH)
def test_one_wheel_serves(torch, wheel, environment, tmp_path):
    if shutil.disk_usage(tmp_path).free < TORCH[torch]:
        pytest.skip(f"torch {torch} takes {TORCH[torch] / 1e9:.0f} GB of disk")
    constraints = tmp_path / "constraints.txt"
    pinned = (ROOT / "constraints.txt").read_text()
    constraints.write_text(re.sub(r"^(torch|triton)==.*$", "", pinned, flags=re.MULTILINE) + f"\ntorch=={torch}\n")
    environment["PIP_CONSTRAINT"] = str(constraints)
    pip(environment, f"glm4v-ext[model,rlcs] @ {wheel.as_uri()}")
    told = "import glm4v_ext, torch; print(torch.__version__, glm4v_ext.__file__)"
    version, file = run(environment["PYTHON"], "-c", told, env=environment, cwd=tmp_path).split()
    assert version.split("+")[0] == torch and "site-packages" in file
    for page in sorted((ROOT / "docs/ops").glob("*.md")):  # each op against its definition
        for snippet in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            run(environment["PYTHON"], "-c", snippet, env=environment, cwd=tmp_path)
    run(sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(tmp_path / "tiny"), "--size", "tiny")
    question = ["--model", "tiny", "--prompt", "What is 17 plus 25?", "--max-new-tokens", "8", "--temperature", "0"]
    answer = run("glm4v", "generate", *question, "--json", env=environment, cwd=tmp_path)
    assert len(json.loads(answer)["token_ids"]) in range(1, 9)
    for command in ("glm4v", "rlcs"):
        assert "usage" in run(command, "--help", env=environment, cwd=tmp_path).lower()
    run("rlcs", "verify", "--domain", "math", env=environment, cwd=tmp_path)


def test_wheel_is_tagged_and_whole(wheel, source):
    assert re.fullmatch(r"glm4v_ext-[\d.]+\+cpu-cp\d+-cp\d+-manylinux_2_\d+_\w+\.whl", wheel.name)
    held = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in held if re.search(r"libtorch|libc10|\.libs/", name)]
    python = [path.relative_to(source) for path in (source / "glm4v_ext").rglob("*.py")]
    python += [path.relative_to(source / "python") for path in (source / "python").rglob("*.py*")]
    assert {str(path) for path in python} | {"rlcs/rewards/golden.jsonl"} <= set(held)


def faults(tmp_path: pathlib.Path) -> dict[str, tuple[dict[str, str], str]]:
    """What a build may miss: how its environment differs from this one, and what is said."""
    (tmp_path / "torch-2.9.1.dist-info").mkdir()
    (tmp_path / "torch-2.9.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    old = tmp_path / "cuda/bin/nvcc"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    return {
        "compiler": ({"CXX": "no-such-c++"}, "the build needs no-such-c++, got none; install g++ 11 or later"),
        "torch": (
            {"PYTHONPATH": str(tmp_path)},
            "the build needs torch >= 2.10 in this environment, got 2.9.1",
        ),
        "nvcc": (
            {"CUDA_HOME": str(tmp_path / "cuda"), "GLM4V_CUDA": "1"},
            f"CUDA kernels need nvcc >= 12.8, got 11.8 ({old}); GLM4V_CUDA=0 leaves them out",
        ),
    }


@pytest.mark.parametrize("missing", ["compiler", "torch", "nvcc"])
def test_a_build_says_what_it_misses(missing, source, tmp_path):
    changed, said = faults(tmp_path)[missing]
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path / "build")]
    done = subprocess.run(command, cwd=source, env={**os.environ, **changed}, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == f"glm4v-ext: {said}", done.stderr[-2000:]


def test_console_script_names_its_extra(wheel, environment, tmp_path):
    pip(environment, "torch", "numpy", f"glm4v-ext @ {wheel.as_uri()}")
    done = subprocess.run(["glm4v", "info"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "pip install 'glm4v-ext[model]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
