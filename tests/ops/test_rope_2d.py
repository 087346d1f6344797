import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4v_ext import reference, rope_2d, rope_2d_
from glm4v_ext.testing import (
    DTYPES,
    assert_as_accurate,
    assert_repeatable,
    assert_takes_expanded_gradients,
    assert_traceable,
    devices,
    forced_isa,
    isa_levels,
)

SHAPES = [(1, 3, 3, 128), (7, 2, 1, 80), (33, 1, 2, 4), (5, 3, 3, 64), (17, 2, 2, 256), (9, 1, 1, 36), (0, 2, 2, 8)]


def sample(shape, dtype, device="cpu", largest=1000, index=torch.int64):
    patches, heads, kv_heads, dim = shape
    q = torch.randn(patches, heads, dim, device=device).to(dtype)
    k = torch.randn(patches, kv_heads, dim, device=device).to(dtype)
    return [q, k, torch.randint(0, largest, (patches, 2), device=device, dtype=index), 1e4]


def block_positions(h, w):
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack((rows, columns), -1).view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, index, device):
    assert_as_accurate(rope_2d, reference.rope_2d, sample(shape, dtype, device, index=index))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(rope_2d, reference.rope_2d, sample((19, 3, 2, 80), dtype))


@pytest.mark.parametrize("level", isa_levels())
@given(seed=st.integers(0, 2**31), magnitude=st.sampled_from([10, 1000, 100_000, 1_000_000]))
def test_fp64_angles_at_every_position(level, seed, magnitude):
    torch.manual_seed(seed)
    q, k, position_ids, theta = sample((24, 1, 1, 128), torch.float32, largest=magnitude)
    exact = reference.rope_2d(q.double(), k.double(), position_ids, theta)
    with forced_isa(level):
        for actual, expected in zip(rope_2d(q, k, position_ids, theta), exact, strict=True):
            assert (actual.double() - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("device", devices())
def test_the_lowest_position_is_one_like_others(device):  # on the CPU a table of angles tells which it holds
    q, k, _, theta = sample((2, 2, 1, 64), torch.float32, device)
    positions = torch.tensor([[0, 0], [-(2**63), -(2**63)]], device=device)
    first = rope_2d(q[1:], k[1:], positions[1:], theta)
    later = rope_2d(q, k, positions, theta)
    torch.testing.assert_close([x[0] for x in first], [x[1] for x in later], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers(dtype):
    modeling = pytest.importorskip("transformers.models.glm4v.modeling_glm4v")
    config = modeling.Glm4vVisionConfig(hidden_size=512, num_heads=4)
    position_ids = block_positions(6, 46)
    q, k, *_ = sample((len(position_ids), 4, 4, 128), dtype)
    cos, sin = modeling.Glm4vVisionRotaryEmbedding(config)(q, position_ids)
    theirs = modeling.apply_rotary_pos_emb_vision(q, k, cos, sin)
    for a, b in zip(rope_2d(q, k, position_ids), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_on_a_packed_qkv(dtype, device):
    qkv = torch.randn(21, 3, 4, 80, device=device).to(dtype)
    q, k, v = qkv.unbind(1)
    position_ids = torch.randint(0, 99, (21, 2), device=device)
    expected, untouched = rope_2d(q, k, position_ids), v.clone()
    assert rope_2d_(q, k, position_ids) is None
    assert torch.equal(qkv, torch.stack((*expected, untouched), 1))


@pytest.mark.parametrize("device", devices())
def test_rows_far_apart(device):
    """Beyond 2^31 elements from the first token to the last; nobody touches what lies between."""
    q, k, position_ids, theta = sample((20, 4, 2, 80), torch.bfloat16, device)
    step = 2**31 // 19 // 64 * 64 + 64
    memory = torch.empty(20 * step, dtype=torch.bfloat16, device=device)
    far = [memory[i * 320 :].as_strided(x.shape, (step, 80, 1)).copy_(x) for i, x in enumerate((q, k))]
    expected = rope_2d(q, k, position_ids, theta)
    assert all(map(torch.equal, rope_2d(*far, position_ids, theta), expected))
    rope_2d_(*far, position_ids, theta)
    assert all(map(torch.equal, far, expected))


@pytest.mark.parametrize("device", devices())
def test_views_and_expanded_gradients(device):
    q = torch.randn(40, 3, 6, device=device).transpose(0, 2)[:, ::2]  # [6, 2, 40], no dim adjacent
    k = torch.randn(6, 1, 80, device=device)[..., ::2]
    positions = torch.randint(0, 50, (2, 6), device=device).t()
    assert_as_accurate(rope_2d, reference.rope_2d, [q, k, positions, 1e4])
    assert_takes_expanded_gradients(rope_2d, reference.rope_2d, sample((7, 2, 2, 16), torch.float32, device))


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(rope_2d, sample((301, 12, 12, 128), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    q, k, positions, theta = sample((5, 2, 1, 16), torch.float32, device)
    torch.library.opcheck(torch.ops.glm4v_ext.rope_2d_, (q.clone(), k.clone(), positions, theta))
    compiled = torch.compile(lambda q, k: rope_2d_(q, k, positions, theta), fullgraph=True, backend="aot_eager")
    ours, theirs = (q.clone(), k.clone()), (q.clone(), k.clone())
    compiled(*ours)
    rope_2d_(*theirs, positions, theta)
    torch.testing.assert_close(ours, theirs)
    assert_traceable(torch.ops.glm4v_ext.rope_2d, rope_2d, [q, k, positions, theta])


def test_in_place_refuses_gradients():
    q, k, positions, _ = sample((3, 2, 2, 8), torch.float32)
    with pytest.raises(RuntimeError, match="rope_2d_: k must not require grad, got requires_grad=True; use rope_2d"):
        rope_2d_(q, k.requires_grad_(), positions)
    saved = q.clone()
    y = torch.ones_like(saved, requires_grad=True) * saved
    rope_2d_(saved, k.detach(), positions)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nan_reaches_only_its_pair():
    q, k, positions, _ = sample((3, 2, 2, 128), torch.float32)
    q[1, 0, 5] = float("nan")
    out = rope_2d(q, k, positions)[0]
    assert out.isnan().nonzero().tolist() == [[1, 0, 5], [1, 0, 69]]


HEADS, POSITIONS = torch.zeros(3, 2, 8), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("q", "k", "positions", "theta", "text"),
    [
        (HEADS.int(), HEADS, POSITIONS, 1.0, "q must be float32, bfloat16 or float16, got int32"),
        (HEADS[0], HEADS, POSITIONS, 1.0, r"q must be \[T, H, D\] = \[\*, \*, \*\], got \[2, 8\]"),
        (HEADS, HEADS[:2], POSITIONS, 1.0, r"k must be \[T, K, D\] = \[3, \*, 8\], got \[2, 2, 8\]"),
        (HEADS, HEADS.half(), POSITIONS, 1.0, "k must be float32 like q, got float16"),
        (
            HEADS[..., :6],
            HEADS[..., :6],
            POSITIONS,
            1.0,
            r"q must have a head dim that is a multiple of 4, at most 256",
        ),
        (HEADS, HEADS, POSITIONS.float(), 1.0, "position_ids must be int32 or int64, got float32"),
        (HEADS, HEADS, POSITIONS.t(), 1.0, r"position_ids must be \[T, 2\] = \[3, 2\], got \[2, 3\]"),
        (HEADS, HEADS, POSITIONS, 0.0, "theta must be positive and finite, got 0"),
        (HEADS, HEADS, POSITIONS, float("inf"), "theta must be positive and finite, got inf"),
    ],
)
def test_errors_name_the_argument(q, k, positions, theta, text):
    with pytest.raises(RuntimeError, match="rope_2d: " + text):
        rope_2d(q, k, positions, theta)


@pytest.mark.parametrize(
    "q",
    [
        torch.zeros(3, 2, 16)[..., ::2],
        torch.zeros(3, 1, 8).expand(3, 2, 8),
        torch.zeros(64).as_strided((3, 2, 8), (12, 8, 1)),
        torch.zeros(64).as_strided((3, 2, 8), (8, 8, 1)),
        torch.zeros(64).as_strided((3, 2, 8), (16, 7, 1)),
    ],
)
def test_in_place_refuses_scattered_memory(q):
    with pytest.raises(RuntimeError, match="rope_2d_: q must have adjacent head dims and no overlap, got strides"):
        rope_2d_(q, HEADS.clone(), POSITIONS)


MEMORY = torch.zeros(900)


@pytest.mark.parametrize(
    "k",
    [
        MEMORY.as_strided((3, 2, 8), (16, 8, 1)),  # q itself
        MEMORY.as_strided((3, 2, 8), (16, 8, 1), 47),  # q's last element
        MEMORY.as_strided((3, 2, 8), (48, 8, 1), 4),
        MEMORY.as_strided((3, 2, 8), (16, 100, 1), 8),  # q's second heads
        MEMORY.as_strided((3, 1, 8), (400, 8, 1), 32),  # q's last token
    ],
)
def test_in_place_refuses_memory_that_q_and_k_share(k):
    q = MEMORY.as_strided((3, 2, 8), (16, 8, 1))
    for one, other in ((q, k), (k, q)):
        with pytest.raises(RuntimeError, match="rope_2d_: k must have memory of its own, got that of q"):
            rope_2d_(one, other, POSITIONS)


def heads_in(memory, tokens, heads, gaps, tokens_adjoin, offset):
    """[tokens, heads, 4], of which nothing overlaps, with gaps between and behind those that adjoin."""
    step = 4 + gaps[0]
    far = (tokens if tokens_adjoin else heads) * step + gaps[1]
    return memory.as_strided((tokens, heads, 4), (step, far, 1) if tokens_adjoin else (far, step, 1), offset)


gaps = st.tuples(st.sampled_from([0, 1, 4, 8]), st.sampled_from([0, 2, 4, 12]))
layouts = st.tuples(st.integers(1, 3), gaps, st.booleans(), st.integers(0, 60))


@given(tokens=st.integers(1, 4), q=layouts, k=layouts, dtype=st.sampled_from(DTYPES))
def test_in_place_refuses_no_views_that_share_no_memory(tokens, q, k, dtype):
    places = [heads_in(torch.arange(400), tokens, *layout).flatten().tolist() for layout in (q, k)]
    memory, positions = torch.randn(400).to(dtype), torch.randint(0, 99, (tokens, 2))
    q, k = (heads_in(memory, tokens, *layout) for layout in (q, k))
    before = memory.clone()
    if {*places[0]} & {*places[1]}:
        with pytest.raises(RuntimeError, match="rope_2d_: k must have memory of its own, got that of q"):
            rope_2d_(q, k, positions)
    else:
        for part, turned in zip(places, rope_2d(q, k, positions), strict=True):
            before[part] = turned.flatten()
        rope_2d_(q, k, positions)
    assert torch.equal(memory, before)
