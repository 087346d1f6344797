"""Tiny random models of every family that has GLM's towers, and batches for them."""

import copy

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # tokens; those of words are smaller
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
TEXT = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "rope_parameters": ROPE, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
MOE = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
    "video_start_token_id": 94, "video_end_token_id": 95,
}  # fmt: skip
FAMILIES = {
    "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration, TEXT),
    "glm46v": (Glm46VConfig, Glm46VForConditionalGeneration, {**TEXT, "model_type": "glm4v_text"}),
    "glm4v_moe": (Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, {**TEXT, **MOE}),
    "glm_ocr": (GlmOcrConfig, GlmOcrForConditionalGeneration, TEXT),
}


def make(family, dtype=torch.float32, attention="sdpa", **text):
    """A model with weights large enough that every part of it moves the logits."""
    config_class, model_class, base = FAMILIES[family]
    config = config_class(text_config={**base, **text}, vision_config=copy.deepcopy(VISION), **TOKENS)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.1))
            if parameter.dim() == 1:
                parameter += 1
    return model


def batch(grids=((1, 4, 6), (1, 2, 4)), video=None, words=5, padding=None, rows=1, seed=0):
    """``rows`` prompts of ``words`` words, the pictures (each row has them all) and ``words`` words again.

    ``video``: a grid that is a video's, in place of the pictures; the token of its frames is the pictures' too.
    ``padding``: "left" or "right" pads row r by 3 r tokens. Labels are the tokens, but for padding.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, patches, picture_grids = [], [], []

    def some(count):
        return torch.randint(1, IMAGE, (count,), generator=generator).tolist()

    for row in range(rows):
        line = some(words)
        for t, h, w in grids if video is None else [video]:
            for _ in range(t):
                line += [START, *[IMAGE] * (h * w // 4), END]
            patches.append(torch.randn(t * h * w, 1176, generator=generator))
            picture_grids.append([t, h, w])
        line += some(words)
        pad = [0] * (3 * row)
        ids.append({None: line, "left": pad + line, "right": line + pad}[padding])
    longest = max(map(len, ids))
    mask = torch.zeros(rows, longest, dtype=torch.long)
    tokens = torch.zeros(rows, longest, dtype=torch.long)
    for row, line in enumerate(ids):
        line = [0] * (longest - len(line)) + line if padding == "left" else line + [0] * (longest - len(line))
        tokens[row] = torch.tensor(line)
    mask = (tokens != 0).long()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    inputs["mm_token_type_ids"] = (tokens == IMAGE).long() * (1 if video is None else 2)
    names = ("pixel_values", "image_grid_thw") if video is None else ("pixel_values_videos", "video_grid_thw")
    return (
        inputs | dict(zip(names, (torch.cat(patches), torch.tensor(picture_grids)), strict=True)) if patches else inputs
    )
