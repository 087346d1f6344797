"""Makes a GLM-4.1V checkpoint in Hugging Face layout on the spot: random weights, a tokenizer trained in a second.

Demo and tests run on these files. They have everything the released folder has: sharded or single safetensors,
`config.json`, `generation_config.json`, both preprocessor files, `tokenizer.json` with GLM's special tokens (in GLM's
order, in a compact id range) and `chat_template.jinja`. transformers reads them as they are.

    python examples/make_checkpoint.py DIRECTORY --size wide --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Glm4vConfig, Glm4vForConditionalGeneration
from transformers.utils import logging

from glm4v.answer import TAGS
from glm4v.processor import IMAGES, VIDEOS
from glm4v.prompt import CHAT_TEMPLATE
from rlcs.tiny import CONTROL_TOKENS, STOP_TOKENS, picture_settings

# GLM's splitting rule: contractions, words, numbers of up to three digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CORPUS = """What is in this picture? Describe the image. Describe the video. How many are there? Count the objects.
The picture shows a flower with red petals on a dark background. The photograph shows a temple behind trees and water.
Which colour is the flower? The flower is red and yellow, and the leaves are green. The roof is blue and gold.
First I look at the image, then I count what I see, and then I answer the question. So the answer is 42.
The video begins at 0 seconds and ends at 12 seconds. What happens first? What happens at the end of the video?
Where is the object? The box is [120, 35, 640, 980]. Read the text in the image. What is 17 plus 25? It is 42.
Is there a person in the photograph? No, there is not. Yes, there is one person near the building on the left.
Compare the first image with the second image. They are the same size, but the second one is darker than the first.
"""

# The rotary sections sum to half of the rotary half of a head: 8 of 32 dims, 32 of 128.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {"hidden_size": 64, "num_heads": 4, "intermediate_size": 160, "image_size": 84},
        "text": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192},
        "mrope_section": [2, 3, 3],
    },
    "wide": {
        "vision": {"hidden_size": 1536, "num_heads": 12, "intermediate_size": 13696, "image_size": 336},
        "text": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 2, "intermediate_size": 13696},
        "mrope_section": [8, 12, 12],
    },
}


def make_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab`` ordinary tokens, then GLM's special tokens in GLM's order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return tokenizer


def make_config(tokenizer: Tokenizer, size: str, layers: tuple[int, int]) -> Glm4vConfig:
    sizes, id_of = SIZES[size], tokenizer.token_to_id
    stop = {"eos_token_id": [id_of(token) for token in STOP_TOKENS], "pad_token_id": id_of("<|endoftext|>")}
    vision = {**sizes["vision"], "depth": layers[0], "out_hidden_size": sizes["text"]["hidden_size"]}
    text = {
        **sizes["text"],
        **stop,
        "num_hidden_layers": layers[1],
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,  # padded beyond the tokenizer, as released
        "max_position_embeddings": 65536,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": sizes["mrope_section"],
        },
    }
    return Glm4vConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=id_of("<|image|>"),
        video_token_id=id_of("<|video|>"),
        image_start_token_id=id_of("<|begin_of_image|>"),
        image_end_token_id=id_of("<|end_of_image|>"),
        video_start_token_id=id_of("<|begin_of_video|>"),
        video_end_token_id=id_of("<|end_of_video|>"),
    )


@torch.no_grad()
def make_model(config: Glm4vConfig, seed: int, dtype: torch.dtype) -> Glm4vForConditionalGeneration:
    """Random weights that keep activations of order one, so that greedy decoding has clear winners.

    Norm weights and biases are random too: at their usual ones and zeros a port that drops them would go unnoticed.
    """
    with torch.device("meta"):
        model = Glm4vForConditionalGeneration(config).to(dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.normal_(std=0.1, generator=generator)
            weight.add_(0.0 if name.endswith("bias") else 1.0)
        elif "embedding" in name or "embed_tokens" in name:
            weight.normal_(generator=generator)
        else:
            weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    return model


def make_checkpoint(
    directory: str | Path,
    size: str = "tiny",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: tuple[int, int] = (2, 2),
    vocab: int = 512,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        directory: where to write; made when missing.
        size: ``tiny`` (half a million parameters) or ``wide`` (the released model's widths).
        seed: of the weights.
        dtype: of the weights.
        layers: blocks of the vision tower and of the language model.
        vocab: the most ordinary tokens; 256 of them are the single bytes.
        max_shard_size: as transformers' ``save_pretrained``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocab)
    config = make_config(tokenizer, size, layers)
    model = make_model(config, seed, dtype)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.6,
        top_k=2,
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": CONTROL_TOKENS,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": 65536,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Glm4vImageProcessor",
            **picture_settings(IMAGES.min_pixels, IMAGES.max_pixels),
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Glm4vVideoProcessor",
            "fps": VIDEOS.fps,
            "max_duration": VIDEOS.max_duration,
            **picture_settings(VIDEOS.min_pixels, VIDEOS.max_pixels),
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--layers", type=int, nargs=2, default=(2, 2), metavar=("VISION", "TEXT"))
    arguments = parser.parse_args()
    print(
        make_checkpoint(
            arguments.directory,
            arguments.size,
            arguments.seed,
            getattr(torch, arguments.dtype),
            (arguments.layers[0], arguments.layers[1]),
        )
    )
