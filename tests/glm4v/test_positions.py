import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Glm4vConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vModel
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor

from glm4v.positions import rope_positions

IMAGE, BEGIN_IMAGE, END_IMAGE, BEGIN_VIDEO, END_VIDEO, TEXT = 90, 91, 92, 93, 94, 7

text = st.integers(1, 9).map(lambda count: ("text", count))
side = st.integers(1, 5).map(lambda merged: 2 * merged)
image = st.tuples(st.just("image"), side, side)
video = st.tuples(st.just("video"), st.integers(1, 4), side, side)
sequence = st.lists(st.one_of(text, image, video), min_size=1, max_size=8)


def unfold(parts):
    """Token ids of one sequence, its image grids and its video grids."""
    ids, images, videos = [], [], []
    for kind, *numbers in parts:
        if kind == "text":
            ids += [TEXT] * numbers[0]
        elif kind == "image":
            ids += [BEGIN_IMAGE, *[IMAGE] * (numbers[0] * numbers[1] // 4), END_IMAGE]
            images.append([1, *numbers])
        else:
            t, h, w = numbers
            ids += [BEGIN_VIDEO, *[BEGIN_IMAGE, *[IMAGE] * (h * w // 4), END_IMAGE, TEXT] * t, END_VIDEO]
            videos.append([t, h, w])
    return ids, images, videos


def tensor_or_none(grids):
    return torch.tensor(grids) if grids else None


def by_transformers(ids, images, videos):
    with torch.device("meta"):
        model = Glm4vModel(Glm4vConfig(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1}))
    types = Glm4vProcessor.__new__(Glm4vProcessor)
    types.video_start_id, types.video_end_id, types.image_token_id = BEGIN_VIDEO, END_VIDEO, IMAGE
    types = torch.tensor(types.create_mm_token_type_ids([ids]))
    grids = [tensor_or_none(images), tensor_or_none(videos)]
    positions, delta = model.get_rope_index(torch.tensor([ids]), types, *grids)
    return positions[:, 0], int(delta) + len(ids)


def ours(sequences):
    unfolded = [unfold(parts) for parts in sequences]
    lengths = [0] + [len(ids) for ids, _, _ in unfolded]
    flat = [[entry for one in unfolded for entry in one[i]] for i in range(3)]
    cu_seqlens = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    grids = [tensor_or_none(flat[1]), tensor_or_none(flat[2])]
    return rope_positions(torch.tensor(flat[0], dtype=torch.long), cu_seqlens, *grids, IMAGE, BEGIN_VIDEO, END_VIDEO)


@pytest.mark.parametrize(
    "parts",
    [
        [("text", 5)],
        [("text", 2), ("image", 4, 6), ("text", 3)],
        [("image", 2, 2), ("image", 10, 2), ("text", 1)],
        [("text", 1), ("video", 3, 4, 6), ("text", 2)],
        [("image", 4, 4), ("video", 2, 2, 8), ("text", 4), ("image", 6, 2), ("video", 1, 2, 2)],
    ],
)
def test_positions_of_one_prompt(parts):
    positions, following = ours([parts])
    wanted, wanted_following = by_transformers(*unfold(parts))
    assert torch.equal(positions, wanted)
    assert following.tolist() == [wanted_following]


@given(st.lists(sequence, min_size=1, max_size=4))
def test_positions_of_packed_prompts(sequences):
    positions, following = ours(sequences)
    wanted = [by_transformers(*unfold(parts)) for parts in sequences]
    assert torch.equal(positions, torch.cat([one for one, _ in wanted], 1))
    assert following.tolist() == [one for _, one in wanted]


def test_empty_sequences_and_neighbouring_pictures():
    ids = torch.tensor([IMAGE, IMAGE, TEXT])  # a picture ends one sequence, another begins the next
    grids = torch.tensor([[1, 2, 2], [1, 2, 2]])
    cu_seqlens = torch.tensor([0, 0, 1, 1, 3, 3])
    positions, following = rope_positions(ids, cu_seqlens, grids, None, IMAGE, BEGIN_VIDEO, END_VIDEO)
    assert positions.tolist() == [[0, 0, 1]] * 3
    assert following.tolist() == [0, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("images", "videos", "text"),
    [
        (None, None, "grids must be of 1 images and 0 video units, got 0 and 0"),
        ([[1, 2, 2], [1, 2, 2]], None, "grids must be of 1 images and 0 video units, got 2 and 0"),
        (None, [[1, 2, 2]], "grids must be of 1 images and 0 video units, got 0 and 1"),
        ([[1, 4, 4]], None, r"pictures must have \[4\] tokens by their grids, got \[2\]"),
    ],
)
def test_grids_that_do_not_fit(images, videos, text):
    ids = torch.tensor([TEXT, IMAGE, IMAGE, TEXT])
    grids = [torch.tensor(grid) if grid else None for grid in (images, videos)]
    with pytest.raises(ValueError, match=text):
        rope_positions(ids, torch.tensor([0, 4]), *grids, IMAGE, BEGIN_VIDEO, END_VIDEO)
