"""The CPU library under gcc's sanitizers of addresses and undefined behaviour. Long: `make test-slow` runs it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
PROGRAM = """
import sys
tree, *arguments = sys.argv[1:]
sys.path.insert(0, tree)
import pytest, glm4v_ext
assert glm4v_ext.__file__.startswith(tree), "another library was tested"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-o", f"pythonpath={tree}", *arguments]))
"""


def runtimes() -> list[str]:
    """What has to be loaded before Python: libstdc++, too, whose exceptions the sanitizer follows."""
    if shutil.which("g++") is None:
        return []
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return paths if all(os.path.isabs(path) for path in paths) else []


def build(tree: pathlib.Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    scripts = pathlib.Path(sys.executable).parent
    path = os.pathsep.join([str(scripts), os.environ.get("PATH", os.defpath)])
    if shutil.which("cmake", path=path) is None or shutil.which("ninja", path=path) is None:
        pytest.skip("needs cmake and ninja")
    package = tree / "glm4v_ext"
    shutil.copytree(ROOT / "glm4v_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    settings = {
        "CMAKE_CXX_COMPILER": "g++",
        "CMAKE_BUILD_TYPE": "Sanitized",
        "CMAKE_CXX_FLAGS_SANITIZED": FLAGS,
        "GLM4V_TORCH_DIR": pathlib.Path(torch.__file__).parent,
        "GLM4V_OUTPUT_DIR": package,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    given = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (
        ["cmake", "-S", ROOT, "-B", tree / "build", "-G", "Ninja", *given],
        ["cmake", "--build", tree / "build", "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(
            [*map(str, command)], env={**os.environ, "PATH": path, "GLM4V_CUDA": "0"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert b"__asan_init" in (package / "libglm4v_ops.so").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="needs libasan and libubsan of g++")
def test_sanitized_ops(tmp_path):
    build(tmp_path)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python's there are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [
        "tests/test_guard_pages.py",
        "tests/test_attention_levels.py",
        "tests/ops",
        "-m",
        "not slow",
        "-k",
        "guard_pages or isa_levels or errors",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
