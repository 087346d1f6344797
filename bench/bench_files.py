"""From files to what the model reads, against transformers: a photograph to patches, prompts to positions."""

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import Glm4vConfig
from transformers.image_utils import load_image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.modeling_glm4v import Glm4vModel

from examples.make_checkpoint import make_checkpoint
from glm4v import Processor
from glm4v.positions import rope_positions


@pytest.mark.parametrize("size", [(640, 427), (2800, 2100)], ids=lambda size: f"{size[0]}x{size[1]}")
def bench_photo(race, size, tmp_path):
    folder, path = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "photo.jpg"
    Image.fromarray(load_sample_images().images[0]).resize(size).save(path, quality=95)
    ours, theirs = Processor.from_pretrained(folder), Glm4vImageProcessorPil.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image", "image": path}]}]
    race(
        {
            "glm4v_ext": lambda: ours(messages).pixel_values,
            "transformers": lambda: theirs(load_image(str(path)), return_tensors="pt")["pixel_values"],
        }
    )


@pytest.mark.parametrize("images", [1, 30])
def bench_positions(race, images):
    """``images`` pictures of 240 tokens, 10 tokens of text after each."""
    image, begin, end, text = 0, 1, 2, 3
    ids = torch.tensor(([begin] + [image] * 240 + [end] + [text] * 10) * images)
    grids = torch.tensor([[1, 24, 40]] * images)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    types = (ids == image).int()[None]
    with torch.device("meta"):
        model = Glm4vModel(Glm4vConfig(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1}))
    race(
        {
            "glm4v_ext": lambda: rope_positions(ids, cu_seqlens, grids, None, image, 4, 5)[0],
            "transformers": lambda: model.get_rope_index(ids[None], types, grids)[0][:, 0],
        }
    )
