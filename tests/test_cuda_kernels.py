"""The CUDA kernels and their glue on a CPU: tests/emulator runs every CUDA thread as a fiber, and puts what it built in
the place of the CPU's ops, so that the tests of the ops test the kernels. What was compiled for GPUs is read, too.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

import glm4v_ext

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = """
import ctypes, sys
import pytest, torch, glm4v_ext, glm4v_ext.testing as testing
library, capability, processors, *arguments = sys.argv[1:]
torch.ops.load_library(library)
for by_device in (testing.ATTENTION_DTYPES, testing.FEW_ROWS):
    by_device["cpu"] = by_device["cuda"]
emulator = ctypes.CDLL(library)
emulator.emulator_capability(int(capability))
emulator.emulator_processors(int(processors))
code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *arguments])
assert emulator.emulator_launches() > 0, "the CPU's own ops were tested"
hopper = emulator.emulator_tiles() + emulator.emulator_cluster_waits()
assert (hopper > 0) == (int(capability) >= 90), "another GPU's kernels were tested"
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
    "token_logprob": ["refused", "memory", "shape8", "bitwise and shape1", "entropy and shape4 and not dtype0"],
    "patchify": [],
    "interpolate_pos_embed": ["grid10", "grid11", "errors and hold", "errors and even"],
    "rope_2d": [],
    "rope_3d": [],
}
# Of attention, whose kernels know no float32, tests that are for devices. By op: those of every run, which reach each
# branch once; `make test-slow` runs all.
ATTENTION = {
    "flash_attn_varlen": "grouped or neighbours or without_keys or nothing or pages or packed or graph or far_apart or "
    "(tiles and 256 and softcap) or (definition and 96 and window)",
    "flash_attn_with_kvcache": "not compile",
}
# Ops with kernels of their own for Hopper, or that use its clusters, and tests of what these serve.
HOPPER = {"flash_attn_varlen": "not compile"}
HOPPER_QUICK = {
    "flash_attn_varlen": "pages or neighbours or graph or far_apart or (grouped and 64) or (long and dtype0) or "
    "1-1-128",
    "flash_attn_with_kvcache": "not compile",
}
# Products: of few rows they are a kernel's, others torch's, whose own paths the other tests of these ops are about.
PRODUCTS = {
    "patch_embed": "definition",
    "merge_patches": "definition",
    "linear": "definition or errors or decoder or 16_bits or repeatable or nan or beside",
}


@pytest.fixture(scope="module")
def emulator() -> pathlib.Path:
    builds = sorted(ROOT.glob("build/*/CMakeCache.txt"), key=lambda p: p.stat().st_mtime)
    cmake = shutil.which("cmake", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("cmake")
    if not builds or not cmake:
        pytest.skip("needs cmake and a build in this tree")
    command = [cmake, "--build", str(builds[-1].parent), "--target", "emulator"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return builds[-1].parent / "tests/emulator/libemulator.so"


def run_tests(emulator: pathlib.Path, op: str, chosen: str, *options: str, capability: int = 80, processors: int = 3):
    device = [str(capability), str(processors)]
    arguments = [str(emulator), *device, f"tests/ops/test_{op}.py", "-k", chosen, *options]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_pass_the_tests_of_the_op(op, emulator):
    left_out = [f"({text})" for text in NOT_OF_THE_DEVICE + KERNELS[op]]
    run_tests(emulator, op, f"not ({' or '.join(left_out)})")


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_passes_tests_of_the_op(op, emulator):
    run_tests(emulator, op, ATTENTION[op], "--device=cpu")


@pytest.mark.parametrize("op", HOPPER_QUICK)
def test_attention_of_hopper_passes_tests_of_the_op(op, emulator):
    run_tests(emulator, op, HOPPER_QUICK[op], "--device=cpu", capability=90)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_decoding_deals_splits_out_to_many_processors(capability, emulator):  # few are filled by one sequence
    chosen = "splits or bits or pages or padding"
    run_tests(emulator, "flash_attn_with_kvcache", chosen, "--device=cpu", capability=capability, processors=60)


@pytest.mark.slow
def test_attention_passes_all_tests_of_the_op(emulator):
    run_tests(emulator, "flash_attn_varlen", "not compile", "--device=cpu")


@pytest.mark.slow
@pytest.mark.parametrize("op", HOPPER)
def test_attention_of_hopper_passes_all_tests_of_the_op(op, emulator):
    run_tests(emulator, op, HOPPER[op], "--device=cpu", capability=90)


@pytest.mark.parametrize("op", PRODUCTS)
def test_products_pass_the_tests_of_the_op(op, emulator):
    run_tests(emulator, op, PRODUCTS[op])


@pytest.mark.parametrize("probe", ["copy", "products", "tiles"])
def test_primitives_of_hopper(probe, emulator):
    program = f"import ctypes, sys, torch; print(ctypes.CDLL(sys.argv[1]).probe_{probe}())"
    done = subprocess.run([sys.executable, "-c", program, str(emulator)], capture_output=True, text=True)
    assert done.stdout == "0\n", f"{done.stdout} wrong values (-1: it could not run) {done.stderr}"


def test_every_backend_is_tested():
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cpp")}
    assert sources == {*KERNELS, *ATTENTION, *PRODUCTS}


needs_cuda = pytest.mark.skipif(not glm4v_ext.build_info()["cuda"], reason="needs a build with CUDA kernels")


def run_check(name: str) -> str:
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / name)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_cuda
def test_kernels_keep_to_registers():
    held = run_check("cuda_resources.py").splitlines()[-1]
    assert all(f"code of sm_{arch}" in held for arch in ("80", "90a", "100")) and "PTX of sm_100" in held, held


@pytest.mark.slow  # .ci/run has the check itself
@needs_cuda
def test_hopper_kernels_are_what_they_should_be():
    run_check("cuda_sass.py")


def test_what_the_check_of_hopper_kernels_sees(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import cuda_sass

    loop = ["HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], R88, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    wait, power = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"], ["MUFU.EX2 R1, R1"]
    rest = ["UTMALDG.5D [UR8], [UR4]", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0"]
    plan = cuda_sass.Plan(shared=1, registers=0, waits=2, beside=1)
    assert cuda_sass.faults(loop + power + wait + rest, plan) == []
    assert cuda_sass.faults(loop + wait + power + rest, plan) == [
        "exponentials beside a product must be at least 1, got 0"
    ]
    assert cuda_sass.faults(loop + power + wait + rest[1:] + ["STL [R1], R0"], plan) == [
        "local loads and stores must be 0, got 1", "tiles must come by UTMALDG, got none",
    ]  # fmt: skip
    assert cuda_sass.SERIALISED.search("ptxas info : (C7512) Potential Performance Loss: wgmma")


@needs_cuda
def test_every_glue_serves_its_ops():
    ops = glm4v_ext.build_info()["ops"]
    for path in (ROOT / "csrc/cuda").glob("*.cpp"):
        names = re.findall(r'm\.impl\("(\w+)"', path.read_text())
        assert names and all(ops[name]["cuda"] == "C++" for name in names), path


def test_gpu_check_goes_on_where_a_step_cannot(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import gpu_check

    assert gpu_check.run(["no-such-program"], 1)[0] == 127
    late = tmp_path / "late"
    code, said = gpu_check.run(["sh", "-c", f"echo begun; (sleep 2; touch {late}) & wait"], 1)
    assert code == 124 and said == "begun\n\nran out of its 1 s"
    time.sleep(2)
    assert not late.exists()  # what the step began has ended with it

    def lost(timeout_s):
        raise RuntimeError("the device is gone")

    failed = {"ok": False, "passed": 1, "failed": 1, "skipped": 0, "failures": ["a::b"], "said": "1 failed\n"}
    plan = [
        gpu_check.Step("lost", 1, lost),
        gpu_check.Step("failed", 1, lambda timeout_s: failed, alone=True),
        gpu_check.Step("good", 1, lambda timeout_s: {"ok": True, "said": ""}),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda device, quick: plan)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    (path,) = tmp_path.glob("*.md")
    text = path.read_text()
    assert "- lost failed: RuntimeError: the device is gone" in text and "| good | ok |" in text
    assert "- failed failed: 1 failed\n  - a::b" in text
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--out", str(path)])
    assert gpu_check.main() == 2


@pytest.mark.slow
def test_gpu_check_runs(tmp_path):
    options = ["--device", "cpu", "--quick", "--budget-s", "1200", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / ".ci/gpu_check.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    steps = {step["name"]: step for step in json.loads(path.read_text())["steps"]}
    assert steps["tests of rms_norm"]["passed"] > 0 and steps["bench rms_norm"]["rows"]
    assert "| repeated runs | ok |" in path.with_suffix(".md").read_text()
