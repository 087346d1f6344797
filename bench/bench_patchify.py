"""patchify against transformers' rescale, normalize and patchify (numpy, fp32; copied to a GPU), and the definition."""

import numpy as np
import pytest
import torch
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from bench.shapes import cases
from glm4v_ext import patchify, reference

PHOTOS = {"2100x2800": (2100, 2800), "336x336": (336, 336), "1344x1344": (1344, 1344)}


@pytest.mark.parametrize("size", cases(PHOTOS))
def bench_patchify(race, device, dtype, size):
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    planes = np.ascontiguousarray(photo.transpose(2, 0, 1))
    frames = torch.from_numpy(photo)[None].to(device)
    processor = Glm4vImageProcessorPil()
    mean, std = processor.image_mean, processor.image_std

    def transformers():
        image = processor.normalize(processor.rescale(planes, 1 / 255), mean, std)
        return torch.from_numpy(processor.patchify(image, 14, 2, 2)[0]).to(device)

    race(
        {
            "glm4v_ext": lambda: patchify(frames, mean, std, dtype=dtype)[0],
            "transformers": transformers,
            "definition": lambda: reference.patchify(frames, mean, std, dtype=dtype)[0],
        },
        flops=2 * 2 * frames.numel(),
        bytes=frames.nbytes * (1 + 2 * dtype.itemsize),
        tolerance=0.0 if dtype == torch.float32 else 2e-2,
    )
