"""Every twin in Triton's interpreter, held to the definition by the tests of its op."""

import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.long
ROOT = pathlib.Path(__file__).resolve().parents[2]

# What runs each kernel and branch at least once.
QUICK = {
    "rms_norm": "definition or errors",
    "add_rms_norm": "definition and dtype1 or errors",
    "rms_norm_add": "definition and dtype1 or errors",
    "swiglu": "definition and (shape1 or shape3) or errors",
    "linear": "definition and dtype0 or errors",
    "token_logprob": "definition and dtype1 or minus or errors",
    "patch_embed": "definition and dtype0 or errors",
    "merge_patches": "definition and dtype0 or errors",
    "patchify": "definition or views or errors",
    "interpolate_pos_embed": "definition and index1 and dtype1 and (case2 or case4 or case5) or errors",
    "rope_2d": "definition and index0 and dtype1 and (shape1 or shape5) or packed and dtype1 or errors",
    "rope_3d": "definition and index1 and dtype1 and (shape1 or shape2) or packed and dtype1 or errors",
    "flash_attn_varlen": "definition and (2-1-128 and dtype1 or 3-3-7 and softcap) or without_keys or packed or pages",
    "flash_attn_with_kvcache": "128-heads0 and dtype1 or dtype2 and (options4 or options7) or rows_of",
}


def run(chosen):
    """The kernels that an op's tests launched, those tests which an expression chooses."""
    command = [sys.executable, "tests/twins/served.py", "--exitfirst", *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].removeprefix("launched:").split())


def test_every_kernel():
    texts = [path.read_text() for path in (ROOT / "glm4v_ext/triton").glob("*.py")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the interpreter has one thread
        launched = set().union(*pool.map(run, QUICK.items()))
    assert launched == {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.parametrize("op", QUICK)
def test_all_tests_of_the_op(op):
    run((op, "test"))
