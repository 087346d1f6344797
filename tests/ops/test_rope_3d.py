import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4v_ext import reference, rope_3d, rope_3d_
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

# tokens, query heads, kv heads, head dim, then sections; the turned dims are twice their sum
SHAPES = [
    (1, 32, 2, 128, (8, 12, 12)),
    (7, 4, 2, 80, (5, 8, 7)),
    (33, 1, 1, 6, (1, 0, 1)),
    (9, 2, 1, 64, (16, 8, 8)),
    (5, 2, 2, 300, (0, 100, 28)),
    (3, 1, 1, 4, (0, 0, 0)),
    (0, 2, 2, 128, (8, 12, 12)),
]


def sample(shape, dtype, device="cpu", interleaved=True, largest=1000, index=torch.int64):
    tokens, heads, kv_heads, dim, sections = shape
    q = torch.randn(tokens, heads, dim, device=device).to(dtype)
    k = torch.randn(tokens, kv_heads, dim, device=device).to(dtype)
    position_ids = torch.randint(0, largest, (3, tokens), device=device, dtype=index)
    return [q, k, position_ids, sections, 1e4, 2 * sum(sections), interleaved]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_definition(shape, dtype, interleaved, index, device):
    assert_as_accurate(rope_3d, reference.rope_3d, sample(shape, dtype, device, interleaved, index=index))


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, interleaved, dtype):
    with forced_isa(level):
        assert_as_accurate(rope_3d, reference.rope_3d, sample(SHAPES[1], dtype, interleaved=interleaved))


@pytest.mark.parametrize("level", isa_levels())
@given(seed=st.integers(0, 2**31), magnitude=st.sampled_from([10, 1000, 100_000, 1_000_000]), interleaved=st.booleans())
def test_fp64_angles_at_every_position(level, seed, magnitude, interleaved):
    torch.manual_seed(seed)
    q, k, *rest = sample((24, 1, 1, 80, (8, 12, 12)), torch.float32, "cpu", interleaved, magnitude)
    exact = reference.rope_3d(q.double(), k.double(), *rest)
    with forced_isa(level):
        for actual, expected in zip(rope_3d(q, k, *rest), exact, strict=True):
            assert (actual.double() - expected).abs().max() <= 2e-5


def test_transformers():
    modeling = pytest.importorskip("transformers.models.glm4v.modeling_glm4v")
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    config = modeling.Glm4vTextConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    q, k, position_ids, *_ = sample((50, 4, 2, 128, (8, 12, 12)), torch.float32)
    cos, sin = modeling.Glm4vTextRotaryEmbedding(config)(q, position_ids[:, None])
    theirs = modeling.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for a, b in zip(rope_3d(q, k, position_ids), theirs, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1), rtol=0, atol=5e-4)  # their angles are fp32


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_on_a_packed_qkv(dtype, interleaved, device):
    qkv = torch.randn(21, 10, 80, device=device).to(dtype)
    q, k, v = qkv.split((6, 2, 2), 1)
    settings = [torch.randint(0, 99, (3, 21), device=device), (8, 12, 4), 1e4, 48, interleaved]
    expected, untouched = rope_3d(q, k, *settings), v.clone()
    assert rope_3d_(q, k, *settings) is None
    assert torch.equal(qkv, torch.cat((*expected, untouched), 1))


@pytest.mark.parametrize("device", devices())
def test_views_and_expanded_gradients(device):
    _, _, _, *settings = sample(SHAPES[0], torch.float32)
    q = torch.randn(64, 3, 6, device=device).transpose(0, 2)[:, ::2]  # [6, 2, 64], no dim adjacent
    k = torch.randn(6, 1, 128, device=device)[..., ::2]
    positions = torch.randint(0, 50, (6, 3), device=device).t()
    assert_as_accurate(rope_3d, reference.rope_3d, [q, k, positions, *settings])
    text = torch.arange(6, device=device).expand(3, 6)
    assert_as_accurate(rope_3d, reference.rope_3d, [q, k, text, *settings])
    assert_takes_expanded_gradients(rope_3d, reference.rope_3d, [q, k, positions, *settings])


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(rope_3d, sample((301, 16, 2, 128, (8, 12, 12)), torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    q, k, positions, sections, *rest = sample(SHAPES[1], torch.float32, device)
    torch.library.opcheck(torch.ops.glm4v_ext.rope_3d_, (q.clone(), k.clone(), positions, *sections, *rest))
    compiled = torch.compile(rope_3d_, fullgraph=True, backend="aot_eager")
    ours, theirs = (q.clone(), k.clone()), (q.clone(), k.clone())
    compiled(*ours, positions, sections, *rest)
    rope_3d_(*theirs, positions, sections, *rest)
    torch.testing.assert_close(ours, theirs)
    assert_traceable(
        torch.ops.glm4v_ext.rope_3d,
        lambda q, k, positions, time, row, column, *rest: rope_3d(q, k, positions, (time, row, column), *rest),
        [q, k, positions, *sections, *rest],
    )


def test_in_place_refuses_gradients():
    q, k, *settings = sample(SHAPES[1], torch.float32)
    with pytest.raises(RuntimeError, match="rope_3d_: q must not require grad, got requires_grad=True; use rope_3d"):
        rope_3d_(q.requires_grad_(), k, *settings)


def test_nan_reaches_only_its_pair():
    q, k, *settings = sample(SHAPES[0], torch.float32)
    q[0, 1, 5] = q[0, 3, 100] = float("nan")
    out = rope_3d(q, k, *settings)[0]
    assert out.isnan().nonzero().tolist() == [[0, 1, 4], [0, 1, 5], [0, 3, 100]]


HEADS, POSITIONS = torch.zeros(3, 2, 8), torch.zeros(3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("k", "positions", "sections", "rotary_dim", "text"),
    [
        (HEADS.half(), POSITIONS, (1, 1, 1), 6, "k must be float32 like q, got float16"),
        (HEADS[..., :6], POSITIONS, (1, 1, 1), 6, r"k must be \[T, K, D\] = \[3, \*, 8\], got \[3, 2, 6\]"),
        (HEADS, POSITIONS[:2], (1, 1, 1), 6, r"position_ids must be \[3, T\] = \[3, 3\], got \[2, 3\]"),
        (HEADS, POSITIONS.bool(), (1, 1, 1), 6, "position_ids must be int32 or int64, got bool"),
        (HEADS, POSITIONS, (1, 1, 1), 8, r"sections must add up to rotary_dim / 2 = 4, got \[1, 1, 1\]"),
        (HEADS, POSITIONS, (4, -1, 1), 8, r"sections must add up to rotary_dim / 2 = 4, got \[4, -1, 1\]"),
        (HEADS, POSITIONS, (2**63 - 1, 2**63 - 1, 6), 8, "sections must add up to rotary_dim / 2 = 4, got"),  # mod 2^64
        (HEADS, POSITIONS, (2, 2, 1), 10, "rotary_dim must be even, at most D = 8 and at most 256, got 10"),
        (HEADS, POSITIONS, (1, 1, 1), 7, "rotary_dim must be even, at most D = 8 and at most 256, got 7"),
    ],
)
def test_errors_name_the_argument(k, positions, sections, rotary_dim, text):
    with pytest.raises(RuntimeError, match="rope_3d: " + text):
        rope_3d(HEADS, k, positions, sections, 1e4, rotary_dim)


@pytest.mark.parametrize("rope", [rope_3d, rope_3d_])
@pytest.mark.parametrize("sections", [(16, 16), (8, 12, 12, 0), 8, None])
def test_sections_are_three(rope, sections):
    text = f"{rope.__name__}: sections must be 3 counts of pairs, got {sections}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}"):
        rope(HEADS, HEADS, POSITIONS, sections)


def test_in_place_refuses_scattered_memory():
    with pytest.raises(RuntimeError, match="rope_3d_: k must have adjacent head dims and no overlap, got strides"):
        rope_3d_(HEADS.clone(), torch.zeros(3, 2, 16)[..., ::2], POSITIONS, (1, 1, 2), 1e4, 8)


def test_in_place_refuses_memory_that_q_and_k_share():
    memory = torch.zeros(3, 3, 8)
    with pytest.raises(RuntimeError, match="rope_3d_: k must have memory of its own, got that of q"):
        rope_3d_(memory[:, :2], memory[:, 1:], POSITIONS, (1, 1, 2), 1e4, 8)
