"""Builds the native libraries by calling CMake; flags and sources live in CMakeLists.txt alone."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
LIBRARY = "glm4v_ext/libglm4v_ops.so"


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
            sys.exit("glm4v-ext: the build needs torch >= 2.10 in this environment; install it first")
        import pybind11

        # This environment's CMake and ninja come first, whether it is active or not.
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        tools = {**os.environ, "PATH": path}
        output = pathlib.Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build/in_place" if self.stays else pathlib.Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
             f"-DGLM4V_TORCH_DIR={pathlib.Path(torch.origin).parent}", f"-DGLM4V_OUTPUT_DIR={output}",
             f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
            env=tools,
        )  # fmt: skip
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], env=tools)

    def copy_extensions_to_source(self) -> None:  # in-place and editable builds
        super().copy_extensions_to_source()
        shutil.copy2(pathlib.Path(self.build_lib) / LIBRARY, ROOT / LIBRARY)


setup(ext_modules=[Extension("glm4v_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
