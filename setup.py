"""Builds the native libraries by calling CMake; flags and sources live in CMakeLists.txt alone.

What the build misses is said in one line, the last one printed.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
LIBRARY = "glm4v_ext/libglm4v_ops.so"
SOURCES = {name: f"pip install {name}" for name in ("cmake", "ninja")}


def compiler(path: str) -> str:
    """The C++ compiler that CMake will take, or the one to ask for."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name, path=path)), names[0])


def first_error(said: str) -> str:
    """What CMake's first error says, in one line."""
    error = re.search(r"CMake Error[^\n]*:\n\s*\n?((?:[ \t]+\S.*\n?)+)", said)
    return " ".join(error[1].split()) if error else "CMake could not configure the build; its words are above"


def forget_lost_compilers(build: pathlib.Path) -> None:
    """CMake also remembers compilers, and refuses to go on where one is gone, as with an environment."""
    cache = build / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    if not all(pathlib.Path(one).exists() for one in re.findall(r"^CMAKE_\w+_COMPILER:\w+=(/.+)$", text, re.MULTILINE)):
        cache.unlink()
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)


class CMakeBuild(build_ext):
    def run(self) -> None:
        # An editable install's own build folder is temporary: it takes that of in-place builds, which find it all done.
        self.stays = self.inplace or self.editable_mode
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if not sys.platform.startswith("linux"):
            sys.exit(f"glm4v-ext: the build needs Linux (x86-64 is supported), got {sys.platform}")
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            sys.exit("glm4v-ext: the build needs torch >= 2.10 in this environment, got none; install it first")
        found = importlib.metadata.version("torch")
        if [int(part) for part in found.split(".")[:2]] < [2, 10]:
            sys.exit(f"glm4v-ext: the build needs torch >= 2.10 in this environment, got {found}")
        if importlib.util.find_spec("pybind11") is None:
            sys.exit("glm4v-ext: the build needs pybind11 in this environment, got none; pip install pybind11")
        import pybind11

        # This environment's CMake and ninja come first, whether it is active or not.
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        tools = {**os.environ, "PATH": path}
        for tool in ("cmake", "ninja", compiler(path)):
            if shutil.which(tool, path=path) is None:
                sys.exit(f"glm4v-ext: the build needs {tool}, got none; {SOURCES.get(tool, 'install g++ 11 or later')}")
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build/in_place" if self.stays else pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        forget_lost_compilers(build)
        # CMake remembers the ninja of the last build here, which may have been pip's own and be gone by now.
        configured = subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
             f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path)}",
             f"-DGLM4V_TORCH_DIR={pathlib.Path(torch.origin).parent}", f"-DGLM4V_OUTPUT_DIR={output}",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
            env=tools, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        sys.stderr.write(configured.stderr)
        if configured.returncode:
            sys.exit(f"glm4v-ext: {first_error(configured.stderr)}")
        if subprocess.call(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], env=tools):
            sys.exit("glm4v-ext: the compiler refused a file; its words are above")

    def copy_extensions_to_source(self) -> None:  # in-place and editable builds
        super().copy_extensions_to_source()
        shutil.copy2(pathlib.Path(self.build_lib) / LIBRARY, ROOT / LIBRARY)


setup(ext_modules=[Extension("glm4v_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
