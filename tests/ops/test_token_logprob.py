import subprocess
import sys

import pytest
import torch
from torch import Tensor

from glm4v_ext import reference, token_logprob
from glm4v_ext.testing import (
    DTYPES,
    assert_as_accurate,
    assert_repeatable,
    assert_takes_expanded_gradients,
    devices,
    forced_isa,
    forced_product,
    isa_levels,
    outputs_and_grads,
)

# T, C, V: the last has two chunks of the vocabulary, on a GPU in float32
SHAPES = [
    (1, 7, 5),
    (3, 64, 48),
    (33, 129, 65),
    (5, 40, 1),
    (9, 1, 17),
    (0, 5, 6),
    (4, 0, 3),
    (40, 96, 128),
    (8300, 3, 1100),
]


def sample(shape, dtype, device="cpu", index=torch.int64):
    torch.manual_seed(0)
    tokens, width, vocabulary = shape
    hidden, weight = torch.randn(tokens, width).to(device, dtype), torch.randn(vocabulary, width).to(device, dtype)
    targets = torch.randint(0, vocabulary, (tokens,), dtype=index).to(device)
    targets[: tokens // 2] = vocabulary - 1  # of the last chunk
    return [hidden, weight, targets]


def with_entropy(function):
    return lambda *inputs: function(*inputs, 0.7, True)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, device):
    assert_as_accurate(token_logprob, reference.token_logprob, sample(shape, dtype, device))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[5], SHAPES[-1]])
def test_definition_of_entropy(shape, dtype, device):
    inputs = sample(shape, dtype, device, torch.int32)
    assert_as_accurate(with_entropy(token_logprob), with_entropy(reference.token_logprob), inputs)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_temperature(temperature, device):
    inputs = [*sample((20, 30, 70), torch.float32, device), temperature]
    assert_as_accurate(token_logprob, reference.token_logprob, inputs)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 31, 64, 77])
def test_isa_levels(vocabulary, dtype, level):
    inputs = sample((19, 40, vocabulary), dtype)
    with forced_isa(level):
        assert_as_accurate(with_entropy(token_logprob), with_entropy(reference.token_logprob), inputs)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_at_isa_levels(dtype, level):
    inputs = sample((8300, 3, 2111), dtype)
    with forced_isa(level):
        assert_as_accurate(with_entropy(token_logprob), with_entropy(reference.token_logprob), inputs)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", [(64, 515, 80), (8300, 16, 1100)])
def test_bitwise_repeatable(shape, device):
    inputs = sample(shape, torch.bfloat16, device)
    assert_repeatable(with_entropy(token_logprob), inputs, torch.get_num_threads())
    with forced_product("glm4v_ext", torch.bfloat16):  # torch's, on AMX, share out a long sum by the threads
        assert_repeatable(with_entropy(token_logprob), inputs)


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    inputs = sample((4, 24, 8), torch.float32, device)
    for return_entropy in (False, True):
        options = [*inputs, 1.5, return_entropy]
        torch.library.opcheck(torch.ops.glm4v_ext.token_logprob, tuple(options))
        assert_compiles(options)


def assert_compiles(options):
    def grads(function):
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in options]
        found = function(*leaves)
        sum(out.sum() for out in (found if isinstance(found, tuple) else (found,))).backward()
        return found, leaves[0].grad, leaves[1].grad

    torch.compiler.reset()
    compiled = torch.compile(token_logprob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grads(compiled), grads(token_logprob))


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients(device):
    assert_takes_expanded_gradients(token_logprob, reference.token_logprob, sample((4, 24, 8), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_views(device):
    hidden, weight, targets = sample((40, 96, 64), torch.float32, device)
    for views in (
        [hidden[::2, 1::3], weight[::3, 1::3], targets[::2] % 22],
        [hidden.t().contiguous().t(), weight.t().contiguous().t(), targets],
        [hidden[:1].expand(40, 96), weight, targets[:1].expand(40)],
    ):
        assert_as_accurate(token_logprob, reference.token_logprob, views)


@pytest.mark.parametrize("device", devices())
def test_only_what_is_needed_gets_a_gradient(device):
    hidden, weight, targets = sample((8300, 16, 1100), torch.float32, device)
    both = outputs_and_grads(lambda h, w: token_logprob(h, w, targets), [hidden, weight])
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    cotangent = torch.randn(len(targets), generator=torch.Generator().manual_seed(0)).to(device)
    (dhidden,) = torch.autograd.grad(token_logprob(h, weight, targets), h, cotangent)
    (dweight,) = torch.autograd.grad(token_logprob(hidden, w, targets), w, cotangent)
    assert torch.equal(dhidden, both[1]) and torch.equal(dweight, both[2])


@pytest.mark.parametrize("device", devices())
def test_entropy_alone_has_a_gradient(device):
    inputs = sample((20, 30, 70), torch.float32, device)
    ours, plain = (lambda *x, f=f: f(*x, 1.0, True)[1] for f in (token_logprob, reference.token_logprob))
    assert_as_accurate(ours, plain, inputs)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype, device):
    # logits from -3e4 to 3e4, one of which has all the probability, and rows of equal ones
    hidden = torch.linspace(-100, 100, 41, device=device).to(dtype)[:, None]
    weight = torch.linspace(-300, 300, 50, device=device).to(dtype)[:, None]
    targets = torch.arange(41, device=device)
    logprob, entropy = token_logprob(hidden, weight, targets, 1.0, True)
    expected, of_entropy = reference.token_logprob(hidden, weight, targets, 1.0, True)
    assert logprob.isfinite().all() and entropy.isfinite().all()
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, of_entropy)
    assert_as_accurate(token_logprob, reference.token_logprob, [hidden, weight, targets])


@pytest.mark.parametrize("device", devices())
def test_logits_of_minus_infinity_have_no_share(device):
    hidden, weight, targets = sample((7, 4, 2111), torch.float32, device)
    hidden, barred = hidden.abs() + 0.1, weight.clone()
    barred[3:1500] = -float("inf")
    kept = torch.cat([weight[:3], weight[1500:]])
    targets = targets % 3
    for ours, plain in zip(
        token_logprob(hidden, barred, targets, 1.0, True), token_logprob(hidden, kept, targets, 1.0, True), strict=True
    ):
        torch.testing.assert_close(ours, plain)
    assert token_logprob(hidden, barred, targets + 3).eq(-float("inf")).all()


@pytest.mark.parametrize("device", devices())
def test_nan_reaches_only_its_row(device):
    hidden, weight, targets = sample((3, 50, 9), torch.float32, device)
    hidden[1, 17] = float("nan")
    for out in token_logprob(hidden, weight, targets, 1.0, True):
        assert out[1].isnan() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_may_be_any_nan(level, dtype):
    # CUDA's has all bits of its fraction: rounded up to bf16 it would come round to -0.
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).expand(3)
    hidden, weight, targets = sample((3, 50, 70), dtype)
    weight.requires_grad_()
    with forced_isa(level):
        outs = token_logprob(hidden, weight, targets, 1.0, True)
        for out in outs:
            assert torch.autograd.grad(out, weight, nan, retain_graph=True)[0].isnan().all()


MEMORY = """
import torch
from glm4v_ext import token_logprob

def megabytes(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) >> 10

tokens, vocabulary = 1024, 151552
hidden, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(vocabulary, 32, requires_grad=True)
targets = torch.randint(0, vocabulary, (tokens,))
token_logprob(hidden[:2], weight[:2], targets[:2] % 2).sum().backward()  # libraries load
before = megabytes("VmRSS")
token_logprob(hidden, weight, targets).sum().backward()
print(megabytes("VmHWM") - before)
"""


def test_memory_is_that_of_a_chunk():
    # [T, V] would take 592 MiB, a chunk takes 16; the gradient of the weight 19. Libraries keep buffers of their own.
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: None}, "token_logprob: hidden must be a tensor, got None"),
        ({0: torch.zeros(4, 24, dtype=torch.int32)}, "hidden must be float32, bfloat16 or float16, got int32"),
        ({0: torch.zeros(1, 4, 24)}, r"hidden must be \[T, C\] = \[\*, \*\], got \[1, 4, 24\]"),
        ({1: torch.zeros(8, 23)}, r"token_logprob: weight must be \[V, C\] = \[\*, 24\], got \[8, 23\]"),
        ({1: torch.zeros(8, 24).half()}, "token_logprob: weight must be float32 like hidden, got float16"),
        ({2: torch.zeros(4)}, "token_logprob: targets must be int32 or int64, got float32"),
        ({2: torch.zeros(5, dtype=torch.int64)}, r"token_logprob: targets must be \[T\] = \[4\], got \[5\]"),
        ({3: 0.0}, "token_logprob: temperature must be positive and finite in float32, got 0"),
        ({3: -1.0}, "token_logprob: temperature must be positive and finite in float32, got -1"),
        ({3: float("nan")}, "token_logprob: temperature must be positive and finite in float32, got nan"),
    ],
)
def test_errors_name_the_argument(change, text):
    inputs = [*sample((4, 24, 8), torch.float32), 1.0]
    for position, value in change.items():
        inputs[position] = value
    with pytest.raises(RuntimeError, match=text):
        token_logprob(*inputs)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("value", [-1, -100, 8])
def test_targets_outside_the_vocabulary_are_refused(value, index):
    hidden, weight, targets = sample((4, 24, 8), torch.float32, index=index)
    targets[2] = value
    text = f"^token_logprob: targets must be at least 0 and below V = 8, got {value} at 2"
    with pytest.raises(RuntimeError, match=text):
        token_logprob(hidden, weight, targets)
