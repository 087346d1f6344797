import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm4v_ext import interpolate_pos_embed, reference
from glm4v_ext.testing import (
    DTYPES,
    assert_as_accurate,
    assert_repeatable,
    assert_takes_expanded_gradients,
    assert_traceable,
    devices,
    forced_isa,
    isa_levels,
    outputs_and_grads,
)

# grids, side of the table, width
CASES = [
    ([(1, 2, 2)], 24, 48),
    ([(1, 6, 10), (3, 4, 2), (1, 24, 24), (1, 2, 30)], 24, 40),
    ([(2, 4, 8)], 1, 5),
    ([(1, 2, 600)], 5, 17),
    ([(1, 0, 4), (0, 2, 2), (1, 4, 4)], 7, 16),
    ([], 4, 8),
]


def sample(grids, side, width, dtype, device="cpu", index=torch.int64):
    grid_thw = torch.tensor(grids, dtype=index, device=device).view(-1, 3)
    x = torch.randn(int(grid_thw.prod(-1).sum()), width, device=device).to(dtype)
    table = torch.randn(side * side, width, device=device).to(dtype)
    return [x, table, grid_thw]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_definition(case, dtype, index, device):
    inputs = sample(*case, dtype, device, index)
    assert_as_accurate(interpolate_pos_embed, reference.interpolate_pos_embed, inputs)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_isa_levels(level, dtype):
    with forced_isa(level):
        assert_as_accurate(interpolate_pos_embed, reference.interpolate_pos_embed, sample(*CASES[1], dtype))


sides = st.integers(1, 20).map(lambda n: 2 * n)


@given(
    grids=st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=4),
    side=st.integers(2, 30),
    width=st.integers(32, 70),  # the rule takes the largest of many errors
    dtype=st.sampled_from(DTYPES),
)
def test_random_grids(grids, side, width, dtype):
    assert_as_accurate(interpolate_pos_embed, reference.interpolate_pos_embed, sample(grids, side, width, dtype))


def test_wide_model_width():
    inputs = sample([(1, 4, 6)], 24, 1536, torch.bfloat16)
    assert_as_accurate(interpolate_pos_embed, reference.interpolate_pos_embed, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers(dtype):
    modeling = pytest.importorskip("transformers.models.glm4v.modeling_glm4v")
    config = modeling.Glm4vVisionConfig(hidden_size=64, num_heads=4, image_size=336, patch_size=14)
    module = modeling.Glm4vVisionEmbeddings(config).to(dtype)
    grids = [(1, 10, 16), (2, 4, 2), (1, 24, 24), (1, 30, 50)]
    x, _, grid_thw = sample(grids, 24, 64, dtype)
    table = module.position_embedding.weight
    places = []
    for t, h, w in grids:
        cells = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
        places.append(cells.view(h // 2, 2, w // 2, 2, 2).transpose(1, 2).reshape(-1, 2).repeat(t, 1))
    rows, columns = torch.cat(places).unbind(-1)
    theirs = module(x, grid_thw.prod(-1), grid_thw, rows, columns)
    ours = interpolate_pos_embed(x, table, grid_thw)
    tolerance = 4 * torch.finfo(dtype).eps + 2.3e-5  # their coordinates are fp32; then either rounding may differ
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    dout = torch.randn_like(x)
    gradients = [torch.autograd.grad(y, table, dout)[0] for y in (ours, theirs)]
    scale = gradients[1].abs().max().item()
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("device", devices())
def test_views_and_expanded_gradients(device):
    grid_thw = torch.tensor([[1, 1], [2, 4], [2, 6]], device=device).t()
    x = torch.randn(40, 28, device=device).t()[:, ::2]
    table = torch.randn(9, 40, device=device)[:, ::2]
    assert_as_accurate(interpolate_pos_embed, reference.interpolate_pos_embed, [x, table, grid_thw])
    assert_takes_expanded_gradients(interpolate_pos_embed, reference.interpolate_pos_embed, [x, table, grid_thw])


@pytest.mark.parametrize("device", devices())
def test_bitwise_repeatable(device):
    assert_repeatable(interpolate_pos_embed, sample([(1, 20, 26), (2, 8, 6)], 24, 300, torch.bfloat16, device))


@pytest.mark.parametrize("device", devices())
def test_a_grid_alone_and_among_others(device):
    grids = [(1, 6, 10), (1, 24, 24), (1, 2, 30)]
    x, table, grid_thw = sample(grids, 24, 40, torch.bfloat16, device)
    together = interpolate_pos_embed(x, table, grid_thw)
    sizes = [t * h * w for t, h, w in grids]
    alone = [interpolate_pos_embed(part, table, grid_thw[i : i + 1]) for i, part in enumerate(x.split(sizes))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("device", devices())
def test_empty_grids_of_any_sides(device):
    x, table, grid_thw = sample([(0, 2**40, 2**40), (2, 2, 4), (1, 2**40, 0)], 3, 20, torch.float32, device)
    found, expected = (outputs_and_grads(interpolate_pos_embed, [x, table, g]) for g in (grid_thw, grid_thw[1:2]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", devices())
def test_opcheck_and_compile(device):
    inputs = sample([(1, 4, 2), (2, 2, 2)], 3, 20, torch.float32, device)
    assert_traceable(torch.ops.glm4v_ext.interpolate_pos_embed, interpolate_pos_embed, inputs)


def test_nan_reaches_only_its_neighbourhood():
    x, table, grid_thw = sample([(1, 12, 12)], 12, 3, torch.float32)  # one cell per patch: the other taps weigh 0
    x[5] = float("nan")
    out = interpolate_pos_embed(x, table, grid_thw)
    assert out[5].isnan().all() and not out[:5].isnan().any() and not out[6:].isnan().any()


X, TABLE, GRID = torch.zeros(8, 4), torch.zeros(9, 4), torch.tensor([[1, 2, 4]])


@pytest.mark.parametrize(
    ("x", "table", "grid_thw", "text"),
    [
        (X.int(), TABLE, GRID, "x must be float32, bfloat16 or float16, got int32"),
        (X[0], TABLE, GRID, r"x must be \[P, C\] = \[\*, \*\], got \[4\]"),
        (X, TABLE[:, :3], GRID, r"table must be \[S\*S, C\] = \[\*, 4\], got \[9, 3\]"),
        (X, TABLE[:8], GRID, r"table must be \[S\*S, C\] with S from 1 to 512, got 8 rows"),
        (X, TABLE.half(), GRID, "table must be float32 like x, got float16"),
        (X, TABLE, GRID.float(), "grid_thw must be int32 or int64, got float32"),
        (X, TABLE, GRID[0], r"grid_thw must be \[I, 3\] = \[\*, 3\], got \[3\]"),
        (X, TABLE, torch.tensor([[1, 2, 2]]), "grid_thw must hold 8 patches like x, got 4"),
        (X, TABLE, torch.tensor([[1, 2, 4], [1, 2, 2]]), "grid_thw must hold 8 patches like x, got 12"),
        (X, TABLE, torch.tensor([[1, 1, 8]]), r"even h, w >= 0, got \[1, 1, 8\] in row 0"),
        (X, TABLE, torch.tensor([[1, 2, 4], [-1, 2, 2]]), r"even h, w >= 0, got \[-1, 2, 2\] in row 1"),
        (X, TABLE, torch.tensor([[2**40, 2**40, 2**40]]), "grid_thw must hold 8 patches like x, got"),
    ],
)
def test_errors_name_the_argument(x, table, grid_thw, text):
    with pytest.raises(RuntimeError, match=f"interpolate_pos_embed: .*{text}"):
        interpolate_pos_embed(x, table, grid_thw)
