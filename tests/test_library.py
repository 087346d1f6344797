"""The native library as a file: what it links, what it exports, and what an import brings."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import glm4v_ext
from glm4v_ext import _C

PACKAGE = pathlib.Path(glm4v_ext.__file__).parent
ROOT = PACKAGE.parent
LIBRARY = PACKAGE / "libglm4v_ops.so"


def symbols(*arguments: str) -> list[str]:
    out = subprocess.run(["nm", "-C", *arguments], capture_output=True, text=True, check=True).stdout
    return out.splitlines()


def test_links_only_the_stable_shims():
    undefined = symbols("-D", "--undefined-only", str(LIBRARY))
    unstable = [line for line in undefined if re.search(r"\b(c10|at|torch|caffe2)::", line)]
    assert len(undefined) > 10 and not unstable, unstable
    # CUDA's runtime is linked in; torch's stream is the one symbol of a CUDA torch, and may be missing.
    cuda = [line.split()[-2:] for line in undefined if re.search(r"\b(cuda|cu)[A-Z]|_cuda", line)]
    assert all(kind == "w" or name == "aoti_torch_device_type_cuda" for kind, name in cuda), cuda


def test_links_no_python():
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "libtorch.so" in needed and "libtorch_cpu.so" in needed
    assert "libpython" not in needed and "libcuda" not in needed


def test_holds_no_build_paths():
    assert str(ROOT).encode() not in LIBRARY.read_bytes()


def test_loops_share_no_inline_functions():
    # A weak symbol compiled with AVX-512 could be the copy that the linker keeps for everyone.
    objects = sorted(ROOT.glob("build/*/CMakeFiles/loops_*/**/*.o"))
    if not objects:
        pytest.skip("needs the object files of a build in this tree")
    weak = [line for o in objects for line in symbols(str(o)) if re.search(r" [WVu] ", line)]
    assert not weak, weak


def test_every_op_has_one_cpu_kernel():
    info = glm4v_ext.build_info()
    assert info["ops"] and all(backends.get("cpu") == "C++" for backends in info["ops"].values()), info["ops"]
    assert info["isa"] in info["cpu_archs"]
    assert info["version"] == glm4v_ext.__version__


def test_force_isa_refuses_unknown_levels():
    with pytest.raises(ValueError, match="force_isa: level must be generic, avx2"):
        _C.force_isa("sse9")


def test_import_needs_only_torch_and_numpy():
    program = """
import sys
extras = 'transformers triton PIL av tokenizers safetensors jinja2 rich typer'.split()
sys.modules.update(dict.fromkeys(extras))  # as if they were not installed
import torch, glm4v_ext
import glm4v_ext.reference
print(glm4v_ext.build_info()['version'])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_second_registration_is_absent():
    # A second kernel for one (op, device) only warns in torch; the sources must hold one registration each.
    sites: dict[str, list[str]] = {}
    for source in sorted(path for room in ("cpu", "cuda") for path in (ROOT / "csrc" / room).glob("*.cpp")):
        for name in re.findall(r'm\.impl\("(\w+)"', source.read_text()):
            sites.setdefault(f"{source.parent.name} {name}", []).append(source.name)
    assert sites and all(len(files) == 1 for files in sites.values()), sites


def test_schemas_are_append_only():
    # Graphs that were exported hold them: a line here may be joined by others, never changed or taken away.
    released = (ROOT / "tests/schemas.txt").read_text().splitlines()
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("glm4v_ext::")]
    present = {str(getattr(torch.ops.glm4v_ext, name).default._schema) for name in names}
    assert present == set(released) and released == sorted(released)


def test_the_stub_is_the_module():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    stated = {f.name: [argument.arg for argument in f.args.args] for f in stub.body}
    found = {
        name: re.findall(r"(\w+):", getattr(_C, name).__doc__.splitlines()[0]) for name in dir(_C) if name[0] != "_"
    }
    assert stated == found


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("sys.platform = 'darwin'", "Linux (x86-64 is supported), got darwin"),
        ("sys.platform = 'win32'", "Linux (x86-64 is supported), got win32"),
        ("sys.modules['torch'] = None", "torch >= 2.10 in this environment, got none; install it first"),
        ("sys.modules['pybind11'] = None", "pybind11 in this environment, got none; pip install pybind11"),
    ],
)
def test_a_build_that_cannot_be_says_so_in_one_line(changed, said, tmp_path):
    program = f"""
import runpy, sys, setuptools.command.build_ext, setuptools.dist
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", {str(tmp_path)!r}, "--build-temp", {str(tmp_path)!r}]
{changed}
runpy.run_path("setup.py")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"glm4v-ext: the build needs {said}", done.stderr
    assert "Traceback" not in done.stderr


def test_library_loads_once_per_process():
    torch.ops.load_library(str(LIBRARY))  # the same file again is a no-op, not a second definition
    assert glm4v_ext.build_info()["ops"]


CU, GRID = torch.tensor([0, 4]), torch.tensor([[1, 2, 2]])
# By op; rms_norm_add shares rms_norm's backward, and the others' backward is made of ops that have gradients.
SECOND_GRADIENTS = {
    "rms_norm": (glm4v_ext.rms_norm, [(3, 8), (8,)]),
    "add_rms_norm": (glm4v_ext.add_rms_norm, [(3, 8), (3, 8), (8,)]),
    "swiglu": (glm4v_ext.swiglu, [(3, 8)]),
    "interpolate_pos_embed": (lambda x, table: glm4v_ext.interpolate_pos_embed(x, table, GRID), [(4, 8), (9, 8)]),
    "token_logprob": (lambda hidden, weight: glm4v_ext.token_logprob(hidden, weight, CU), [(2, 8), (5, 8)]),
    "flash_attn_varlen": (lambda *qkv: glm4v_ext.flash_attn_varlen_func(*qkv, CU, CU, 4, 4), [(4, 2, 8)] * 3),
}


@pytest.mark.parametrize("op", SECOND_GRADIENTS)
def test_second_gradients_are_refused(op):
    # Without a word of ours torch would warn and return zeros.
    function, shapes = SECOND_GRADIENTS[op]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = function(*leaves)
    loss = (out[0] if isinstance(out, tuple) else out).pow(2).sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)  # which may be all that is wanted
    with pytest.raises(RuntimeError, match=f"^{op}: gradients must be asked for once"):
        gradients[-1].sum().backward()


ROWS, ROWS_3D, TARGETS = torch.zeros(4, 2, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long), torch.tensor([0])
HEADS, PACKED, CACHE = torch.randn(4, 2, 64), torch.randn(4, 2, 8), torch.randn(1, 4, 2, 8)
# By op, arguments that must be tensors; what else it wants, by name. A call without any tensor torch does not hand on.
TENSORS = {
    "rms_norm": ([HEADS, torch.randn(64)], {}),
    "add_rms_norm": ([HEADS, HEADS, torch.randn(64)], {}),
    "rms_norm_add": ([HEADS, HEADS, torch.randn(64)], {}),
    "linear": ([HEADS, torch.randn(3, 64)], {}),
    "merge_patches": ([torch.randn(4, 8), torch.randn(3, 8, 2, 2), torch.randn(3)], {}),
    "patch_embed": ([torch.randn(4, 1176), torch.randn(3, 3, 2, 14, 14), torch.randn(3)], {}),
    "interpolate_pos_embed": ([torch.randn(4, 8), torch.randn(9, 8), GRID], {}),
    "rope_2d": ([HEADS, HEADS, ROWS], {}),
    "rope_2d_": ([HEADS, HEADS.clone(), ROWS], {}),
    "rope_3d": ([HEADS, HEADS, ROWS_3D], {}),
    "rope_3d_": ([HEADS, HEADS.clone(), ROWS_3D], {}),
    "flash_attn_varlen_func": ([PACKED, PACKED, PACKED, CU, CU], {"max_seqlen_q": 4, "max_seqlen_k": 4}),
    "flash_attn_with_kvcache": ([CACHE[:, :1], CACHE, CACHE], {}),
    "token_logprob": ([torch.randn(1, 8), torch.randn(5, 8), TARGETS], {}),
}


@pytest.mark.parametrize("op", TENSORS)
def test_none_in_place_of_a_tensor_is_named(op):
    function, (tensors, options) = getattr(glm4v_ext, op), TENSORS[op]
    names = list(inspect.signature(function).parameters)
    function(*tensors, **options)
    for i, name in enumerate(names[: len(tensors)]):
        with pytest.raises(RuntimeError, match=rf"^{op.removesuffix('_func')}: {name} must be a tensor, got None$"):
            function(*tensors[:i], None, *tensors[i + 1 :], **options)


def test_every_backward_op_refuses_or_has_gradients():
    backward = {op.removesuffix("_backward") for op in glm4v_ext.build_info()["ops"] if op.endswith("_backward")}
    assert backward == set(SECOND_GRADIENTS)


TANGENTS = {
    **SECOND_GRADIENTS,
    "linear": (glm4v_ext.linear, [(3, 8), (4, 8)]),
    "rms_norm_backward": (torch.ops.glm4v_ext.rms_norm_backward, [(3, 8), (3, 8), (8,)]),
    "flash_attn_with_kvcache": (glm4v_ext.flash_attn_with_kvcache, [(1, 1, 2, 8)] + [(1, 4, 2, 8)] * 2),
}


@pytest.mark.parametrize("op", TANGENTS)
def test_tangents_are_refused(op):
    # Without a word of ours torch would drop them: the derivatives were zeros.
    function, shapes = TANGENTS[op]
    given = [torch.randn(shape) for shape in shapes]
    *first, last = given
    options = {"eps": 1e-5} if op == "rms_norm_backward" else {}
    with pytest.raises(RuntimeError, match=f"^{op}: derivatives must be asked for by backward, got a tangent"):
        torch.func.jvp(lambda last: function(*first, last, **options), (last,), (last,))
    torch.func.jvp(lambda x: x + function(*given, **options)[0].sum(), (last,), (last,))  # it has no tangent


@pytest.mark.parametrize("op", [*SECOND_GRADIENTS, "linear"])
def test_func_grad(op):
    function, shapes = TANGENTS[op]
    *first, last = [torch.randn(shape) for shape in shapes]
    asked = last.clone().requires_grad_()
    function(*first, asked)[0].square().sum().backward()
    given = torch.func.grad(lambda last: function(*first, last)[0].square().sum())(last)
    torch.testing.assert_close(given, asked.grad, rtol=0, atol=0)


@pytest.mark.parametrize("op", [*SECOND_GRADIENTS, "linear"])
def test_tangents_of_a_gradient_are_refused(op):
    # Products with the Hessian, where an outer level has the tangent: they were zeros.
    function, shapes = TANGENTS[op]
    *first, last = [torch.randn(shape) for shape in shapes]
    gradient = torch.func.grad(lambda last: function(*first, last)[0].square().sum())
    with pytest.raises(RuntimeError, match=f"^{op}: derivatives must be asked for by backward, got a tangent"):
        torch.func.jvp(gradient, (last,), (last,))


@pytest.mark.parametrize("op", [*SECOND_GRADIENTS, "linear"])
def test_batches_of_gradients(op):
    function, shapes = TANGENTS[op]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    douts = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        alone = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        torch.testing.assert_close(tuple(gradient[i] for gradient in batched), alone)


def test_nested_transforms():
    # Whole numbers, small enough that every sum is exact, whatever its order.
    x, weight = torch.randint(-1, 2, (2, 3, 8)).float(), torch.randint(-1, 2, (4, 8)).float()

    def twice(linear):
        def gradient(x):
            return torch.func.grad(lambda x: linear(x, weight).pow(3).sum())(x)

        each = torch.func.vmap(gradient)(x)
        second = torch.func.grad(lambda x: gradient(x).pow(2).sum())(x)
        outer = x.clone().requires_grad_()
        gradient(outer).pow(2).sum().backward()  # what autograd records outside of torch.func
        return each, second, outer.grad

    torch.testing.assert_close(twice(glm4v_ext.linear), twice(torch.nn.functional.linear), rtol=0, atol=0)
    norm = torch.func.grad(lambda x: glm4v_ext.rms_norm(x, torch.ones(8), 1e-5).sum())
    with pytest.raises(RuntimeError, match=r"^rms_norm: gradients must be asked for once"):
        torch.func.grad(lambda x: norm(x).pow(2).sum())(x)
