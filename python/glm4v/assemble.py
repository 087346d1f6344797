"""Builds a base GLM-4.1V checkpoint from an AIMv2 encoder and a GLM-4-0414 decoder, as the technical report did.

What becomes of each part:
- The encoder's 2D patch convolution is inflated to 3D: each of the two time slices gets half of it, so that a still
  image, which is duplicated in time, has the embedding that it had before.
- Its position table, norms and blocks are kept (q, k and v in one matrix, as GLM-4.1V stores them). Its pooling head
  goes.
- Downsample and merger are new: normal weights, zero biases, unit norms.
- The decoder is kept whole; its rotary settings gain the three sections, which leave text as it was.

Two spellings of the encoder are read: transformers' ``Aimv2VisionModel`` and the files that Apple released.
Sources: GLM-4.1V, arXiv 2507.01006, section 2; AIMv2, arXiv 2411.14402; inflation: Carreira and Zisserman 2017.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from . import weights
from .answer import TAGS
from .config import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, Config, TextConfig, VisionConfig, checkpoint_folder
from .errors import InputError
from .files import json_text, read_json, write_text
from .model import Glm4v
from .processor import IMAGES, PICTURE_TOKENS, VIDEOS
from .prompt import CHAT_TEMPLATE
from .tokenizer import load_tokenizer

MROPE_SHARES = (2, 3, 3)  # of eight: 8, 12 and 12 of 32 frequencies in the released model
TOKENIZER_FILE = "tokenizer.json"
KEPT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def assemble(
    vision: str | os.PathLike[str],
    language: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_shard_bytes: int = 5 * 10**9,
) -> Config:
    """Writes the base checkpoint to ``out``, a new or empty folder, and returns its config.

    Args:
        vision: folder of an AIMv2 encoder with a position table (``aimv2-huge-patch14-336`` for the released sizes).
        language: folder of a GLM-4-0414 decoder, with its tokenizer.
        out: where to write.
        dtype: of every weight; None keeps the decoder's.
        seed: of the new downsample and merger weights.
        max_shard_bytes: upper size of one safetensors file.

    Raises:
        InputError: one line that names the file or setting and what was expected. Nothing is
            written then.
    """
    if os.fspath(out) == "":  # Path would make it the folder one is in
        raise InputError("assemble: out must be a new or empty folder, got ''")
    vision_dir, language_dir, target = checkpoint_folder(vision), checkpoint_folder(language), Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"assemble: out must be a new or empty folder, got {target}")
    encoder_settings, decoder_settings = _settings(vision_dir, "vision_config"), _settings(language_dir)
    text = _text_config(decoder_settings)
    tower = _vision_config(encoder_settings, text)
    tokenizer, picture_ids = _tokenizer(language_dir, text.vocab_size)
    texts = _text_files(language_dir, tokenizer)
    config = Config(
        vision_config=tower,
        text_config=text,
        tie_word_embeddings=bool(decoder_settings.get("tie_word_embeddings", False)),
        **picture_ids,
    )

    decoder, encoder = weights.read(language_dir), weights.read(vision_dir)
    embedding = decoder[_find(decoder, language_dir, "model.embed_tokens.weight")]
    dtype = dtype or embedding.dtype
    tensors = {_decoder_name(name): tensor for name, tensor in decoder.items()}
    tensors |= _tower(encoder, vision_dir, tower) | _new_parts(tower, text, seed)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    _check(tensors, config)

    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    weights.write(tensors, target, max_shard_bytes)
    for name, content in texts.items():
        write_text(target / name, content)
    config.save_pretrained(target)
    return config


class Settings(dict[str, Any]):
    """A `config.json` whose missing and wrong entries are named."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise InputError(f"assemble: {self.path}: {key} is missing")

    def expect(self, ok: bool, key: str, expectation: object) -> None:
        if not ok:
            raise InputError(f"assemble: {self.path}: {key} must be {expectation}, got {self.get(key)}")

    def size(self, key: str) -> int:
        self.expect(type(self[key]) is int and self[key] > 0, key, "a whole number above 0")
        return self[key]

    def number(self, key: str, default: float | None = None) -> float:
        value = self[key] if default is None else self.get(key, default)
        self.expect(type(value) in (int, float) and 0 < value < math.inf, key, "a finite number above 0")
        return value


def _settings(folder: Path, part: str = "") -> Settings:
    path = folder / "config.json"
    settings = read_json(path, "assemble")
    if isinstance(settings.get(part), dict):  # a CLIP-like AIMv2 keeps its encoder's one level down
        settings = settings[part]
    found = Settings(settings)
    found.path = path
    return found


def _text_config(settings: Settings) -> TextConfig:
    expect = settings.expect
    expect(settings.get("model_type") == "glm4", "model_type", "glm4 (a GLM-4-0414 decoder)")
    expect(settings.get("hidden_act", "silu") == "silu", "hidden_act", "silu")
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}  # transformers' order
    expect(isinstance(rope, dict), "rope_parameters", "an object")
    rotary = Settings({**settings, **rope})  # of either spelling
    rotary.path = settings.path
    rotary.setdefault("rope_type", rotary.get("type", "default"))
    rotary.expect(rotary["rope_type"] == "default", "rope_type", "default")
    factor = rotary.number("partial_rotary_factor", 0.5)
    head_dim = settings.size("hidden_size") // settings.size("num_attention_heads")
    expect(settings.get("head_dim") in (None, head_dim), "head_dim", head_dim)
    frequencies = int(head_dim * factor) // 2
    time, row = (frequencies * share // sum(MROPE_SHARES) for share in MROPE_SHARES[:2])
    return TextConfig(
        vocab_size=settings.size("vocab_size"),
        hidden_size=settings.size("hidden_size"),
        intermediate_size=settings.size("intermediate_size"),
        num_hidden_layers=settings.size("num_hidden_layers"),
        num_attention_heads=settings.size("num_attention_heads"),
        num_key_value_heads=settings.size("num_key_value_heads"),
        max_position_embeddings=settings.size("max_position_embeddings"),
        rms_norm_eps=settings.number("rms_norm_eps"),
        rope_theta=rotary.number("rope_theta", 1e4),
        partial_rotary_factor=factor,
        mrope_section=(time, row, frequencies - time - row),
        extra={key: settings[key] for key in ("eos_token_id", "pad_token_id") if key in settings},
    )


def _vision_config(settings: Settings, text: TextConfig) -> VisionConfig:
    expect, kind = settings.expect, settings.get("model_type")
    expect(kind in ("aimv2", "aimv2_vision_model"), "model_type", "aimv2 or aimv2_vision_model")
    expect(not settings.get("is_native", False), "is_native", "false (the encoder needs a position table)")
    expect(settings["patch_size"] == PATCH_SIZE, "patch_size", PATCH_SIZE)
    expect(settings.get("hidden_act", "silu") == "silu", "hidden_act", "silu")
    expect(not settings.get("qkv_bias", False), "qkv_bias", "false")
    expect(not (settings.get("mlp_bias", False) or settings.get("use_bias", False)), "mlp_bias", "false")
    # GLM-4.1V has one number for the width of the language model and the inner width of the tower's MLPs.
    expect(
        settings["intermediate_size"] == text.hidden_size,
        "intermediate_size",
        f"{text.hidden_size}, the decoder's width",
    )
    return VisionConfig(
        depth=settings.size("num_hidden_layers"),
        hidden_size=settings.size("hidden_size"),
        num_heads=settings.size("num_attention_heads"),
        image_size=settings.size("image_size"),
        out_hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        rms_norm_eps=settings.number("rms_norm_eps", 1e-5),
    )


def _decoder_name(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _find(tensors: dict[str, Tensor], folder: Path, *spellings: str) -> str:
    for name in spellings:
        if name in tensors:
            return name
    raise InputError(f"weights: {folder}: tensor {' or '.join(spellings)} is missing")


def _tower(encoder: dict[str, Tensor], folder: Path, config: VisionConfig) -> dict[str, Tensor]:
    prefix = "vision_model." if "vision_model.rms_norm.weight" in encoder else ""

    def take(ours: str, apple: str) -> Tensor:
        return encoder[_find(encoder, folder, prefix + ours, apple)]

    flat = take("embeddings.patch_embed.weight", "preprocessor.patchifier.proj.weight")  # [C, 3, 14, 14]
    table = take("embeddings.position_embedding.weight", "preprocessor.pos_embed")  # [S * S, C], Apple's [1, S * S, C]
    tower = {
        "patch_embed.proj.weight": (flat / TEMPORAL_PATCH_SIZE)[:, :, None].repeat(1, 1, TEMPORAL_PATCH_SIZE, 1, 1),
        "patch_embed.proj.bias": take("embeddings.patch_embed.bias", "preprocessor.patchifier.proj.bias"),
        "post_conv_layernorm.weight": take("embeddings.rms_norm.weight", "preprocessor.patchifier.norm.weight"),
        "embeddings.position_embedding.weight": table.reshape(-1, config.hidden_size),
        "post_layernorm.weight": take("rms_norm.weight", "trunk.post_trunk_norm.weight"),
    }
    for i in range(config.depth):
        ours, apple = f"encoder.layers.{i}.", f"trunk.blocks.{i}."
        if apple + "attn.qkv.weight" in encoder:
            qkv = encoder[apple + "attn.qkv.weight"]
        else:
            names = [_find(encoder, folder, f"{prefix}{ours}attention.{part}_proj.weight") for part in "qkv"]
            qkv = torch.cat([encoder[name] for name in names])
        tower |= {
            f"blocks.{i}.attn.qkv.weight": qkv,
            f"blocks.{i}.attn.proj.weight": take(ours + "attention.out_proj.weight", apple + "attn.proj.weight"),
            f"blocks.{i}.mlp.gate_proj.weight": take(ours + "ffn.gate_proj.weight", apple + "mlp.fc1.weight"),
            f"blocks.{i}.mlp.up_proj.weight": take(ours + "ffn.up_proj.weight", apple + "mlp.fc3.weight"),
            f"blocks.{i}.mlp.down_proj.weight": take(ours + "ffn.down_proj.weight", apple + "mlp.fc2.weight"),
            f"blocks.{i}.norm1.weight": take(ours + "rms_norm1.weight", apple + "norm_1.weight"),
            f"blocks.{i}.norm2.weight": take(ours + "rms_norm2.weight", apple + "norm_2.weight"),
        }
    return {"model.visual." + name: tensor for name, tensor in tower.items()}


def _new_parts(tower: VisionConfig, text: TextConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu") * tower.initializer_range

    c, out, inner = tower.hidden_size, text.hidden_size, tower.intermediate_size
    return {
        "model.visual.downsample.weight": normal(out, c, MERGE_SIZE, MERGE_SIZE),
        "model.visual.downsample.bias": torch.zeros(out, device="cpu"),
        "model.visual.merger.proj.weight": normal(out, out),
        "model.visual.merger.post_projection_norm.weight": torch.ones(out, device="cpu"),
        "model.visual.merger.post_projection_norm.bias": torch.zeros(out, device="cpu"),
        "model.visual.merger.gate_proj.weight": normal(inner, out),
        "model.visual.merger.up_proj.weight": normal(inner, out),
        "model.visual.merger.down_proj.weight": normal(out, inner),
    }


def _check(tensors: dict[str, Tensor], config: Config) -> None:
    """Every tensor of the model is there, in its shape, and nothing else."""
    wanted = weights.shapes(Glm4v(config, device="meta"))
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise InputError(
            f"assemble: tensor {odd[0]} {'is missing' if odd[0] in wanted else 'has no place in the model'}"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(f"assemble: tensor {name} must be {list(shape)}, got {list(tensors[name].shape)}")


def _tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    """The decoder's tokenizer with what it lacks of GLM-4.1V's tokens, and the ids of the six picture tokens."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in PICTURE_TOKENS.values()]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        path, expectation = folder / TOKENIZER_FILE, f"at most vocab_size = {vocab_size}"
        raise InputError(f"assemble: {path}: tokens, those of pictures included, must be {expectation}, got {size}")
    return tokenizer, {name: tokenizer.token_to_id(token) for name, token in PICTURE_TOKENS.items()}


def _text_files(source: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Every file of the checkpoint but its weights and config, by name."""
    texts = {TOKENIZER_FILE: tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE}
    for name in KEPT_FILES:
        if (source / name).exists():
            content = read_json(source / name, "assemble")
            content.pop("chat_template", None)  # the decoder's knows no pictures
            texts[name] = json_text(content)
    for name, kind, settings in (("preprocessor", "Image", IMAGES), ("video_preprocessor", "Video", VIDEOS)):
        content = {
            f"{kind.lower()}_processor_type": f"Glm4v{kind}Processor",
            "processor_class": "Glm4vProcessor",
            "size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
            "image_mean": list(settings.mean),
            "image_std": list(settings.std),
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "merge_size": MERGE_SIZE,
        }
        content |= {"fps": settings.fps, "max_duration": settings.max_duration} if kind == "Video" else {}
        texts[f"{name}_config.json"] = json_text(content)
    return texts
