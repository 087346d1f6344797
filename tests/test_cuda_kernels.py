"""The CUDA kernels and their glue on a CPU: tests/emulator runs every CUDA thread as a fiber, and puts what it built in
the place of the CPU's ops, so that the tests of the ops test the kernels. What was compiled for GPUs is read, too.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import glm4v_ext

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import ctypes, sys
import pytest, torch, glm4v_ext
library, capability, expected, *arguments = sys.argv[1:]
torch.ops.load_library(library)
emulator = ctypes.CDLL(library)
emulator.emulator_capability(int(capability))
code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *arguments])
assert (emulator.emulator_launches() > 0) == (expected == "kernels"), "the CPU's own ops were tested"
assert (emulator.emulator_tiles() > 0) == (int(capability) >= 90), "another GPU's kernels were tested"
sys.exit(code)
"""
# Tests of the CPU's loops; and, not to repeat them for every backend, of what Python alone decides.
NOT_OF_THE_DEVICE = ["isa", "transformers", "trace", "compile", "in_place_refuses"]
# Ops with kernels, and tests that ask for more than a device can tell without waiting: the values of its grids.
KERNELS = {
    "rms_norm": [],
    "add_rms_norm": [],
    "rms_norm_add": [],
    "swiglu": [],
    "patchify": [],
    "interpolate_pos_embed": ["grid10", "grid11", "errors and hold", "errors and even"],
    "rope_2d": [],
    "rope_3d": [],
    "flash_attn_varlen": ["dtype0", "float32"],  # bf16 and fp16 only
    "flash_attn_with_kvcache": ["dtype0", "float32"],
}
# Ops with kernels of their own for Hopper, and tests of what these serve.
HOPPER = {"flash_attn_varlen": "64 or 128 or grouped or neighbours or long"}
# Torch's products: their glue is tested; they are the CPU's, whose own paths the other tests of these ops are about.
PRODUCTS = {"patch_embed": "definition", "merge_patches": "definition", "linear": "definition or errors"}


@pytest.fixture(scope="module")
def emulator() -> pathlib.Path:
    builds = sorted(ROOT.glob("build/temp*/CMakeCache.txt"), key=lambda p: p.stat().st_mtime)
    cmake = shutil.which("cmake", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("cmake")
    if not builds or not cmake:
        pytest.skip("needs cmake and a build in this tree")
    command = [cmake, "--build", str(builds[-1].parent), "--target", "emulator"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return builds[-1].parent / "tests/emulator/libemulator.so"


def run_tests(emulator: pathlib.Path, op: str, expected: str, chosen: str, capability: int = 80) -> None:
    arguments = [str(emulator), str(capability), expected, f"tests/ops/test_{op}.py", "-k", chosen]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def of_kernels(op: str) -> str:
    return f"not ({' or '.join(f'({text})' for text in NOT_OF_THE_DEVICE + KERNELS[op])})"


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_pass_the_tests_of_the_op(op, emulator):
    run_tests(emulator, op, "kernels", of_kernels(op))


@pytest.mark.parametrize("op", HOPPER)
def test_kernels_of_hopper_pass_the_tests_of_the_op(op, emulator):
    run_tests(emulator, op, "kernels", f"{of_kernels(op)} and ({HOPPER[op]})", capability=90)


@pytest.mark.parametrize("op", PRODUCTS)
def test_products_pass_the_tests_of_the_op(op, emulator):
    run_tests(emulator, op, "products", PRODUCTS[op])


def test_every_backend_is_tested():
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cpp")}
    assert sources == {*KERNELS, *PRODUCTS}


needs_cuda = pytest.mark.skipif(not glm4v_ext.build_info()["cuda"], reason="needs a build with GLM4V_CUDA=1")


@needs_cuda
def test_kernels_keep_to_registers():
    done = subprocess.run([sys.executable, str(ROOT / ".ci/cuda_resources.py")], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    archs = set(re.findall(r"sm_\w+", done.stdout))
    assert archs >= {"sm_80", "sm_90a"}, archs


@needs_cuda
def test_a_backend_that_no_gpu_ran_says_so():
    for op, backends in glm4v_ext.build_info()["ops"].items():
        assert ("gpu_verified" in backends) == ("cuda" in backends), op


@needs_cuda
def test_every_glue_serves_its_ops():
    ops = glm4v_ext.build_info()["ops"]
    for path in (ROOT / "csrc/cuda").glob("*.cpp"):
        names = re.findall(r'm\.impl\("(\w+)"', path.read_text())
        assert names and all(ops[name]["cuda"] == "C++" for name in names), path
