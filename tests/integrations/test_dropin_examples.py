"""The examples of the drop-in, as a user runs them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "text"),
    [("patch_transformers", "the same tokens"), ("flash_attention_in_your_module", "largest difference")],
)
def test_example(name, text):
    command = [sys.executable, ROOT / "examples" / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert text in done.stdout


def test_the_kernels_alone_need_no_transformers():
    code = (
        "import sys, glm4v_ext; glm4v_ext.integrations.transformers.OPS; glm4v_ext.integrations.rotary.Rotary(); "
        "print('transformers' in sys.modules)"
    )
    assert output_of(code) == "False"


def test_attention_alone_is_a_name_to_register():
    code = (
        "from transformers import AttentionInterface as known; from glm4v_ext.integrations.transformers import "
        "register_attention; print('glm4v_ext' in known().valid_keys()); register_attention(); "
        "print('glm4v_ext' in known().valid_keys())"
    )
    assert output_of(code).split() == ["False", "True"]


def output_of(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
