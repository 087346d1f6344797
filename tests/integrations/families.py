"""Tiny random models of every family that has GLM's towers, batches for them, and what holds them against stock."""

import copy
import inspect
import warnings
from contextlib import contextmanager

import torch
import transformers

from glm4v_ext.integrations.replacements import Replacement
from glm4v_ext.integrations.transformers import disable, enable

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
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
if VERSION < (5, 0):
    del TEXT["rope_parameters"]
    TEXT |= {"rope_scaling": ROPE, "rope_theta": ROPE["rope_theta"], "partial_rotary_factor": 0.5}
VISION = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
    "video_start_token_id": 94, "video_end_token_id": 95,
}  # fmt: skip
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(IMAGE, 96))}  # no pictures' tokens
FAMILIES = {
    name: (getattr(transformers, f"{stem}Config"), getattr(transformers, f"{stem}ForConditionalGeneration"), text)
    for name, stem, text in (
        ("glm4v", "Glm4v", TEXT),
        ("glm46v", "Glm46V", {**TEXT, "model_type": "glm4v_text"}),
        ("glm4v_moe", "Glm4vMoe", {**TEXT, **MOE}),
        ("glm_ocr", "GlmOcr", TEXT),
    )
    if hasattr(transformers, f"{stem}Config")  # older versions lack some
}


def maps_classes():
    """Whether models that are loaded after `enable()` have the ops: some versions need torchvision for that."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        enable()
    disable()
    return not said


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
    if "mm_token_type_ids" in inspect.signature(FAMILIES["glm4v"][1].forward).parameters:
        inputs["mm_token_type_ids"] = (tokens == IMAGE).long() * (1 if video is None else 2)
    names = ("pixel_values", "image_grid_thw") if video is None else ("pixel_values_videos", "video_grid_thw")
    return (
        inputs | dict(zip(names, (torch.cat(patches), torch.tensor(picture_grids)), strict=True)) if patches else inputs
    )


@contextmanager
def enabled(model, **ops):
    enable(model, **ops)
    yield model
    disable(model)


def results(model, inputs, **options):
    """Logits of real tokens, then all gradients, by name."""
    model.zero_grad()
    real = inputs["attention_mask"].bool()
    cast = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = model(**cast, labels=inputs["input_ids"].masked_fill(~real, -100), use_cache=False, **options)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()[real], **grads}


def exact_results(model, inputs):
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation") and model.config.model_type == "glm4v_moe":
        model.set_experts_implementation("eager")  # the default knows no double precision
    return results(model, inputs)


def assert_like_stock(ours, stock, exact, dtype):
    """The largest error of all results, each relative to its largest value, is at most twice that of stock's."""
    assert ours.keys() == stock.keys() == exact.keys()

    def error(some, name):
        return ((some[name].double() - exact[name].double()).abs().max() / exact[name].abs().max().clamp(1e-6)).item()

    bound = 2 * max(error(stock, name) for name in exact) + torch.finfo(dtype).eps
    errors = {name: error(ours, name) for name in exact}
    assert max(errors.values()) <= bound, (max(errors.items(), key=lambda e: e[1]), bound)


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def attentions(model):
    return [(c, c._attn_implementation) for m in model.modules() if (c := getattr(m, "config", None)) is not None]


def replaced(model):
    return {type(m).__name__ for m in model.modules() if isinstance(m, Replacement)}
