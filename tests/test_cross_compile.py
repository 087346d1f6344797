"""Other CPUs build the generic level: its loops compile for aarch64, so that no x86 intrinsic slips into them."""

import json
import pathlib
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"


def generic_commands() -> list[tuple[str, list[str]]]:
    """File and arguments of every source that the latest build compiled at the generic level."""
    found = []
    for database in ROOT.glob("build/*/compile_commands.json"):
        for entry in json.loads(database.read_text()):
            arguments = shlex.split(entry["command"])
            if "-DGLM4V_ISA=generic" in arguments:
                found.append((pathlib.Path(entry["file"]).name, arguments[1 : arguments.index("-o")]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")
def test_generic_loops_compile_for_aarch64(tmp_path):
    commands = generic_commands()
    if not commands:
        pytest.skip("needs the compile commands of a build in this tree")
    for name, arguments in commands:
        command = [COMPILER, *arguments, "-c", str(ROOT / "csrc/cpu/loops" / name), "-o", str(tmp_path / "loops.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
