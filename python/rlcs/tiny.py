"""A GLM-4.1V of half a million parameters with every real component, in Hugging Face layout: what the demo trains.

Sizes, which `plan` has too, are those that learned most in minutes on a CPU (measured: wider and deeper ones are slower
and no better in the same time). The vocabulary is the 256 bytes, some merges and GLM's special tokens; one scan of
28 x 28 pixels is one merged token.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from glm4v import Glm4v
from glm4v.answer import CLOSE_ANSWER, TAGS
from glm4v.config import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from glm4v.processor import IMAGES, PICTURE_TOKENS
from glm4v.prompt import CHAT_TEMPLATE

from .plan import MODELS

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    *PICTURE_TOKENS.values(),
)  # fmt: skip
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", CLOSE_ANSWER)
SIZES, MERGES = MODELS["demo"], 128
BRANCH = 0.2  # what a block adds at first, over what it reads
EMBED = 0.5


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of 256 bytes and some merges learned from ``texts``, then GLM's special tokens in GLM's order.

    Digits stay apart: each is one scan. Tags in the texts are special tokens, so they take no part.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    tags = re.compile("|".join(map(re.escape, TAGS)))
    tokenizer.train_from_iterator((piece for text in texts for piece in tags.split(text)), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


def make_model(tokenizer: Tokenizer, seed: int = 0) -> Glm4v:
    """Random weights; residual branches start small, as their norms' weights do."""
    stop = [tokenizer.token_to_id(token) for token in STOP_TOKENS]
    text_config = replace(
        SIZES.text_config,
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 8) * 8,
        extra={"eos_token_id": stop, "pad_token_id": stop[0]},
    )
    picture_ids: dict[str, Any] = {name: tokenizer.token_to_id(token) for name, token in PICTURE_TOKENS.items()}
    config = replace(SIZES, text_config=text_config, **picture_ids)
    model = Glm4v(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                branch = "post_self_attn" in name or "post_mlp" in name
                weight.fill_(0.0 if name.endswith("bias") else BRANCH if branch else 1.0)
            elif "embed" in name and "patch" not in name:
                weight.normal_(std=EMBED, generator=generator)
            else:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    model.generation_config = {"do_sample": False, "eos_token_id": stop, "pad_token_id": stop[0]}
    return model


def picture_settings(shortest_edge: int, longest_edge: int) -> dict[str, Any]:
    """The release's preprocessor settings but for the least and the most pixels."""
    return {
        "processor_class": "Glm4vProcessor",
        "size": {"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": list(IMAGES.mean),
        "image_std": list(IMAGES.std),
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
    }


def make_checkpoint(folder: str | Path, texts: Iterable[str], seed: int = 0) -> Path:
    """Writes the model with random weights, its tokenizer (of ``texts``), template and picture settings."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(texts)
    make_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    pictures = picture_settings(28 * 28, IMAGES.max_pixels)  # the release's least would enlarge a scan
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(CONTROL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": SIZES.text_config.max_position_embeddings,
        },
        "preprocessor_config.json": {"image_processor_type": "Glm4vImageProcessor", **pictures},
        "video_preprocessor_config.json": {"video_processor_type": "Glm4vVideoProcessor", "fps": 2, **pictures},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
