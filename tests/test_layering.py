"""Who may import whom, read from the sources: the table in the design notes, held.

Imports are found by parsing, so a lazy import inside a function counts too.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glm4v_ext
from glm4v_ext import reference

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names) | {"__future__"}
PURE_RLCS = ("types", "rewards", "advantage", "alarms", "curriculum", "ledger", "files", "packing", "endpoint")


def sources(folder, pattern="*.py"):
    return sorted(path for path in (ROOT / folder).rglob(pattern) if "build" not in path.relative_to(ROOT).parts)


def imports(path):
    """(module, name) pairs of one file; relative imports are spelled out."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[1:] if package[0] == "python" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from ((module, alias.name) for alias in node.names)


def packages(path):
    return {module.split(".")[0] for module, _ in imports(path)} - STDLIB


def reaches_torch_ops(path):
    """Whether the file says torch.ops, other than to name an op that opcheck takes."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "ops"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in ast.walk(ast.parse(path.read_text()))
    )


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


KERNELS, MODEL, TRAINER = sources("glm4v_ext"), sources("python/glm4v"), sources("python/rlcs")


@pytest.mark.parametrize("path", KERNELS, ids=ids(KERNELS))
def test_kernels_need_torch_and_numpy_alone(path):
    room = path.relative_to(ROOT / "glm4v_ext").parts[0]
    allowed = {"torch", "numpy", "glm4v_ext"} | {"triton": {"triton"}, "integrations": {"transformers"}}.get(
        room, set()
    )
    assert packages(path) <= allowed
    if room != "ops":
        assert not reaches_torch_ops(path) or path.name == "build.py"


@pytest.mark.parametrize("path", MODEL, ids=ids(MODEL))
def test_model_uses_public_kernels(path):
    extras = {"safetensors", "tokenizers", "jinja2", "PIL", "av", "rich", "typer", "typing_extensions"}
    assert packages(path) <= {"torch", "numpy", "glm4v_ext", "glm4v"} | extras
    assert not reaches_torch_ops(path)
    for module, name in imports(path):
        if module.split(".")[0] == "glm4v_ext":
            assert module == "glm4v_ext" and name in glm4v_ext.__all__, f"{module}.{name} is not public"


@pytest.mark.parametrize("path", TRAINER, ids=ids(TRAINER))
def test_trainer_stands_on_the_model(path):
    assert not reaches_torch_ops(path)
    for module, name in imports(path):
        if module.split(".")[0] == "glm4v_ext":
            assert module == "glm4v_ext" and name in glm4v_ext.__all__, f"{module}.{name} is not public"
    if path.relative_to(ROOT / "python/rlcs").with_suffix("").parts[0] in PURE_RLCS:
        assert not packages(path) & {"torch", "glm4v", "glm4v_ext"}


@pytest.mark.parametrize("room", ["tests", "bench"])
def test_tests_and_benches_stay_apart(room):
    other = {"tests": "bench", "bench": "tests"}[room]
    for path in sources(room):
        assert other not in packages(path), path
        for module, name in imports(path):
            if module.startswith("glm4v_ext.") and module.split(".")[1] not in ("testing", "reference", "integrations"):
                raise AssertionError(f"{path}: {module}.{name} is not public")


@pytest.mark.parametrize("package", ["glm4v", "rlcs"])
def test_import_is_light(package):
    code = f"import sys, {package}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    paths = f"{ROOT}:{ROOT / 'python'}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": paths})
    assert found.stdout.split() == ["False", "False"], found.stderr


def test_no_room_for_odds_and_ends():
    names = {
        path.stem for folder in ("glm4v_ext", "python", "tests", "bench", "csrc") for path in sources(folder, "*.*")
    }
    assert not names & {"utils", "util", "helpers", "misc", "base", "common"}


# --- the native rooms -------------------------------------------------------------------------------------------------


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_device_code_and_loops_know_nothing_of_torch():
    for path in [*sources("csrc/kernels", "*.*"), *sources("csrc/cpu/loops", "*.*"), *sources("csrc/common", "*.cuh")]:
        for header in includes(path):
            assert not header.startswith(("torch/", "ATen/", "c10/")), f"{path}: {header}"


def test_native_rooms_do_not_enter_each_other():
    for room, never in {"cpu": ("cuda/", "kernels/"), "cuda": ("cpu/",), "ops": ("cpu/", "cuda/", "kernels/")}.items():
        for path in sources(f"csrc/{room}", "*.*"):
            for header in includes(path):
                assert not header.startswith(never), f"{path}: {header}"


def test_only_loops_know_instruction_sets():
    """x86 intrinsics outside the files that are compiled per level would break other machines' builds."""
    for path in sources("csrc", "*.*"):
        if "loops" not in path.parts and path.suffix in (".cpp", ".h"):
            assert not [h for h in includes(path) if h.endswith("intrin.h")], path


# --- one name, everywhere ---------------------------------------------------------------------------------------------

OPS = re.search(r"set\(OPS\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
SCHEMAS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_every_room(op):
    for room in (
        f"csrc/ops/{op}.h",
        f"csrc/cpu/{op}.cpp",
        f"glm4v_ext/ops/{op}.py",
        f"glm4v_ext/triton/{op}.py",
        f"tests/ops/test_{op}.py",
        f"bench/bench_{op}.py",
    ):
        assert (ROOT / room).exists(), room
    assert op in SCHEMAS


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_belongs_to_an_op(schema):
    assert schema.removesuffix("_backward").removesuffix("_") in OPS


def test_public_functions_have_definitions():
    for name in set(glm4v_ext.__all__) - {"__version__", "build_info", "Replayed"}:
        assert hasattr(reference, name.removesuffix("_")), name
        assert getattr(glm4v_ext, name).__doc__, name


def test_rooms_hold_ops_alone():
    for room, pattern, prefix in (("tests/ops", "test_*.py", "test_"), ("csrc/ops", "*.h", "")):
        for path in sources(room, pattern):
            name = path.stem.removeprefix(prefix)
            assert any(op == name or op.startswith(f"{name}_") for op in OPS), path  # or a family, as rope
