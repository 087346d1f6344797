"""The examples of the trainer's parts, as a user runs them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_curriculum_in_a_loop_of_your_own():
    example = ROOT / "examples" / "curriculum_in_your_loop.py"
    code = (
        f"import runpy, sys; sys.argv = [{str(example)!r}, '--waves', '20']; "
        f"runpy.run_path(sys.argv[0], run_name='__main__'); print('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    head, uniform, curriculum, torch = done.stdout.splitlines()
    assert "rollouts for one" in head and torch == "False"
    assert float(curriculum.split()[-1]) < float(uniform.split()[-1])
