"""Prompts for the parity tests, built by hand from token ids, and what transformers makes of them.

The oracle is `Glm4vForConditionalGeneration.forward`. Where a prompt mixes images and videos it raises, so there its
pieces are called one by one: towers, embedding, positions, language model.
Dims: T tokens, P patches, I grid rows, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Prompt:
    """One sequence. ``add_*`` append to it."""

    config: object  # transformers' Glm4vConfig
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)  # 0 text, 1 image, 2 video
    grids: dict[int, list[list[int]]] = field(default_factory=lambda: {1: [], 2: []})
    patches: dict[int, list[Tensor]] = field(default_factory=lambda: {1: [], 2: []})

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def add_text(self, length):
        self._add(torch.randint(0, 200, (length,), generator=self.generator).tolist())
        return self

    def add_image(self, h, w):
        self._picture(1, h, w)
        frame = torch.randn(h * w, 3, 1, 14, 14, generator=self.generator)
        self._media(1, [1, h, w], frame.expand(-1, -1, 2, -1, -1).reshape(h * w, -1))  # a still: the frame twice
        return self

    def add_video(self, t, h, w, flat=False):
        self._add([self.config.video_start_token_id])
        for second in range(t):
            self._picture(2, h, w)
            self._add([48 + second])  # the timestamp
        self._add([self.config.video_end_token_id])
        patches = torch.randn(t * h * w, 1176, generator=self.generator)
        for grid in [[1, h, w]] * t if flat else [[t, h, w]]:
            self.grids[2].append(grid)
        self.patches[2].append(patches)
        return self

    def _add(self, ids, kind=0):
        self.ids += ids
        self.types += [kind] * len(ids)

    def _picture(self, kind, h, w):
        self._add([self.config.image_start_token_id])
        self._add([self.config.image_token_id] * (h * w // 4), kind)
        self._add([self.config.image_end_token_id])

    def _media(self, kind, grid, patches):
        self.grids[kind].append(grid)
        self.patches[kind].append(patches)

    def inputs(self):
        """Arguments of transformers' forward."""
        inputs = {"input_ids": torch.tensor([self.ids]), "mm_token_type_ids": torch.tensor([self.types])}
        for kind, pixels, grid in (
            (1, "pixel_values", "image_grid_thw"),
            (2, "pixel_values_videos", "video_grid_thw"),
        ):
            if self.grids[kind]:
                inputs[pixels], inputs[grid] = torch.cat(self.patches[kind]), torch.tensor(self.grids[kind])
        return inputs

    def positions(self, hf):  # [3, T]
        inputs = self.inputs()
        grids = {name: inputs[name].clone() for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        return hf.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)[0][:, 0]

    def logits(self, hf):  # [T, V]
        inputs = self.inputs()
        if not (self.grids[1] and self.grids[2]):
            return hf(**inputs).logits[0]
        embeds = hf.get_input_embeddings()(inputs["input_ids"])[0]
        images = hf.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        videos = hf.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        kinds = torch.tensor(self.types)
        embeds = embeds.index_copy(0, (kinds == 1).nonzero()[:, 0], torch.cat(images))
        embeds = embeds.index_copy(0, (kinds == 2).nonzero()[:, 0], torch.cat(videos))
        text = torch.arange(len(self.ids)).view(1, 1, -1)
        positions = torch.cat([text, self.positions(hf)[:, None]])
        return hf.lm_head(hf.model.language_model(inputs_embeds=embeds[None], position_ids=positions)[0])[0]


def pack(prompts, hf):
    """Arguments of `Glm4v.forward` for several prompts."""
    batch = {
        "input_ids": torch.tensor([token for prompt in prompts for token in prompt.ids]),
        "cu_seqlens": torch.tensor([0, *(len(p.ids) for p in prompts)]).cumsum(0, dtype=torch.int32),
        "position_ids": torch.cat([p.positions(hf) for p in prompts], 1),
    }
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        found = [p.inputs()[name] for p in prompts if name in p.inputs()]
        batch[name] = torch.cat(found) if found else None
    return batch
