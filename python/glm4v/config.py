"""Sizes of a GLM-4.1V checkpoint, read from and written to Hugging Face's ``config.json``.

Two spellings of the rotary settings are read: ``rope_parameters`` (transformers 5) and the older ``rope_scaling`` with
``rope_theta`` and ``partial_rotary_factor`` beside it. The newer one is written. Keys that the model does not use are
kept. Defaults are the released 9B's.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError
from .files import json_text, read_json, write_text

CHANNELS, PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE = 3, 14, 2, 2
# What the kernels are written for; another value is an error.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "in_channels": CHANNELS,
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
}
# What transformers' `generate` takes from generation_config.json and ours doesn't, and the value that asks for nothing.
UNREAD: dict[str, int | None] = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "token_healing"), 0),
    **dict.fromkeys(("num_beams", "num_return_sequences", "typical_p", "guidance_scale"), 1),
    "encoder_repetition_penalty": 1,
    **dict.fromkeys(("max_new_tokens", "max_time", "stop_strings", "top_h", "watermarking_config"), None),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), None),
}
DTYPES = ("float64", "float32", "bfloat16", "float16")  # that weights are read in


def checkpoint_folder(name: str | os.PathLike[str]) -> Path:
    """``name`` as a folder; anything else is one error that says how to get the folder."""
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"checkpoint: the folder must be a path, got {type(name).__name__}")
    folder = Path(name)
    if folder.is_dir():
        return folder
    hub = str(name)
    if folder.exists():
        hint = "a file is there"
    elif hub.count("/") == 1 and not hub.startswith((".", "/", "~")):
        hint = f"to fetch it from the hub: hf download {hub} --local-dir {hub.split('/')[1]}"
    else:
        hint = "nothing is there"
    raise InputError(f"checkpoint: {hub} must be a folder; {hint}")


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its merger. Note ``out_hidden_size`` also is the inner width of the tower's MLPs, and
    ``intermediate_size`` that of the merger's."""

    depth: int = 24
    hidden_size: int = 1536
    num_heads: int = 12
    image_size: int = 336
    out_hidden_size: int = 4096
    intermediate_size: int = 13696
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    initializer_range: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _divides("vision_config", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        name = "hidden_size / num_heads"
        # A row angle and a column angle per pair of values.
        _expect(self.head_dim % 4 == 0, "vision_config", name, "a multiple of 4", self.head_dim)
        _expect(self.head_dim <= 256, "vision_config", name, "at most 256, as attention is written for", self.head_dim)
        _divides("vision_config", "image_size", self.image_size, "patch_size", PATCH_SIZE)
        _expect(self.rope_theta > 0, "vision_config", "rope_theta", "above 0", self.rope_theta)

    @property
    def head_dim(self) -> int:
        """Dims of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def table_side(self) -> int:
        """Side S of the ``[S * S, C]`` position table."""
        return self.image_size // PATCH_SIZE

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VisionConfig:
        """Reads a ``vision_config`` object; `InputError` names the key that does not fit."""
        data = dict(data)
        rope = _pop_rope(data, "vision_config", ("default", "axial"))
        return _build(cls, data, "vision_config", rope_theta=rope["rope_theta"])

    def to_dict(self) -> dict[str, Any]:
        """The same settings in the spelling of transformers 5."""
        data = _plain(self)
        data["rope_parameters"] = {"rope_theta": data.pop("rope_theta"), "rope_type": "axial"}
        return {**FIXED, "model_type": "glm4v_vision", **data}


@dataclass(frozen=True)
class TextConfig:
    """The language model."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    max_position_embeddings: int = 65536
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    partial_rotary_factor: float = 0.5
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    initializer_range: float = 0.02
    extra: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        where = "text_config"
        _divides(where, "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _divides(
            where, "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        name = "hidden_size / num_attention_heads"
        _expect(self.head_dim <= 256, where, name, "at most 256, as attention is written for", self.head_dim)
        _expect(self.rope_theta > 0, where, "rope_theta", "above 0", self.rope_theta)
        share = self.partial_rotary_factor
        _expect(share <= 1, where, "partial_rotary_factor", "at most 1: all dims of a head", share)
        _expect(self.rotary_dim % 2 == 0, where, "head dim times partial_rotary_factor", "even", self.rotary_dim)
        sections = self.mrope_section
        ok = len(sections) == 3 and all(map(KINDS[int][0], sections)) and sum(sections) == self.rotary_dim // 2
        _expect(ok, where, "mrope_section", f"3 sizes that sum to {self.rotary_dim // 2}", list(sections))

    @property
    def head_dim(self) -> int:
        """Dims of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that the rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TextConfig:
        """Reads a ``text_config`` object; `InputError` names the key that does not fit."""
        data = dict(data)
        rope = _pop_rope(data, "text_config", ("default",))
        sections = rope.get("mrope_section", [8, 12, 12])
        _expect(isinstance(sections, list | tuple), "text_config", "mrope_section", "a list", sections)
        return _build(
            cls,
            data,
            "text_config",
            rope_theta=rope["rope_theta"],
            partial_rotary_factor=rope.get("partial_rotary_factor", 1.0),
            mrope_section=tuple(sections),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same settings in the spelling of transformers 5."""
        data = _plain(self)
        data["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": data.pop("rope_theta"),
            "partial_rotary_factor": data.pop("partial_rotary_factor"),
            "mrope_section": list(data.pop("mrope_section")),
        }
        fixed = {key: FIXED[key] for key in ("hidden_act", "attention_dropout")}
        return {**fixed, "model_type": "glm4v_text", **data}


@dataclass(frozen=True)
class Config:
    """A whole checkpoint. ``dtype`` is the name of the weights' type, where the file says it."""

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    image_start_token_id: int = 151339
    image_end_token_id: int = 151340
    video_start_token_id: int = 151341
    video_end_token_id: int = 151342
    image_token_id: int = 151343
    video_token_id: int = 151344
    tie_word_embeddings: bool = False
    dtype: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        width = self.text_config.hidden_size
        found = self.vision_config.out_hidden_size
        _expect(found == width, "vision_config", "out_hidden_size", f"text_config.hidden_size = {width}", found)
        _expect(self.dtype in (None, *DTYPES), "config", "dtype", f"one of {', '.join(DTYPES)}", repr(self.dtype))

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """The six ids that stand for pictures and their borders; generation never samples them."""
        return (
            self.image_token_id,
            self.video_token_id,
            self.image_start_token_id,
            self.image_end_token_id,
            self.video_start_token_id,
            self.video_end_token_id,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """Reads the content of a `config.json`; `InputError` names the key that does not fit."""
        data = dict(data)
        model_type = data.pop("model_type", None)
        _expect(model_type == "glm4v", "config", "model_type", "glm4v", model_type)
        for key in ("vision_config", "text_config"):  # a flat file would be read as the defaults
            _expect(isinstance(data.get(key), dict), "config", key, "an object", data.get(key))
        vision, text = dict(data.pop("vision_config")), dict(data.pop("text_config"))
        tied = data.pop("tie_word_embeddings", None) or text.pop("tie_word_embeddings", None) or False
        old_dtype = data.pop("torch_dtype", None)
        data.setdefault("dtype", old_dtype)
        return _build(
            cls,
            data,
            "config",
            vision_config=VisionConfig.from_dict(vision),
            text_config=TextConfig.from_dict(text),
            tie_word_embeddings=tied,
        )

    def to_dict(self) -> dict[str, Any]:
        """The same settings in the spelling of transformers 5."""
        data = _plain(self)
        data.update(vision_config=self.vision_config.to_dict(), text_config=self.text_config.to_dict())
        if self.dtype is None:
            del data["dtype"]
        return {"architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", **data}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Config:
        """Reads a checkpoint folder's `config.json`; `InputError` names the file and what is wrong in it."""
        path = checkpoint_folder(folder) / "config.json"
        data = read_json(path, "config")
        try:
            return cls.from_dict(data)
        except (TypeError, ValueError) as error:
            raise InputError(f"{error} ({path})") from None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` into ``folder``, whole or not at all."""
        write_text(Path(folder) / "config.json", json_text(self.to_dict()))


def read_generation_config(folder: str | os.PathLike[str], config: Config) -> dict[str, Any]:
    """The checkpoint's `generation_config.json`: stop ids and sampling defaults.

    A checkpoint without the file still has its stop ids in `config.json`.
    """
    path = checkpoint_folder(folder) / "generation_config.json"
    stop = {"eos_token_id": config.text_config.extra.get("eos_token_id", config.extra.get("eos_token_id"))}
    return {**stop, **read_json(path, "config")} if path.exists() else stop


def warn_of_unread(settings: dict[str, Any], config: Config, folder: Path) -> None:
    """A warning that names what `generate` doesn't heed of ``folder``'s `generation_config.json`."""
    unread = {**UNREAD, "max_length": config.text_config.max_position_embeddings}
    if lost := [key for key, idle in unread.items() if settings.get(key) not in (None, [], {}, idle)]:
        path = folder / "generation_config.json"
        warnings.warn(f"config: {path}: has no effect on generate: {', '.join(lost)}", stacklevel=2)


# What may stand in a file for a field whose default is a flag, a count or a number.
KINDS: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
    float: (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a finite number, 0 or more"),
}
C = TypeVar("C", VisionConfig, TextConfig, Config)


def _expect(ok: bool, where: str, name: str, expectation: str, actual: object) -> None:
    if not ok:
        raise InputError(f"config: {name} of {where} must be {expectation}, got {actual}")


def _divides(where: str, name: str, value: int, divisor_name: str, divisor: int) -> None:
    _expect(
        value > 0 and divisor > 0 and value % divisor == 0,
        where,
        name,
        f"a multiple of {divisor_name} = {divisor}",
        value,
    )


def _pop_rope(data: dict[str, Any], where: str, types: tuple[str, ...]) -> dict[str, Any]:
    """Takes the rotary settings out of ``data``, however they are spelled. As in transformers, the nested ones win, and
    the older name where a file has both."""
    new = data.pop("rope_parameters", None)
    rope = data.pop("rope_scaling", None) or new or {}
    _expect(isinstance(rope, dict), where, "rope_parameters", "an object", repr(rope))
    rope = dict(rope)
    rope.setdefault("rope_theta", data.pop("rope_theta", 1e4))
    if (factor := data.pop("partial_rotary_factor", None)) is not None:
        rope.setdefault("partial_rotary_factor", factor)
    kind = rope.get("rope_type", rope.get("type", "default"))
    _expect(kind in types, where, "rope_type", " or ".join(types), kind)
    return rope


def _build(cls: type[C], data: dict[str, Any], where: str, **known: Any) -> C:
    data.pop("model_type", None)
    names = {f.name for f in fields(cls)} - {"extra"}
    for key, value in FIXED.items():
        if key in data:
            found = data.pop(key)
            _expect(found == value, where, key, str(value), found)
    own = {key: data.pop(key) for key in list(data) if key in names and key not in known}
    for f in fields(cls):
        if f.name in own or f.name in known:
            value = own.get(f.name, known.get(f.name))
            fits, expectation = KINDS.get(type(f.default), (lambda _: True, ""))
            _expect(fits(value), where, f.name, expectation, repr(value))
    data.pop("architectures", None)
    data.pop("transformers_version", None)
    return cls(**own, **known, extra=data)


def _plain(config: VisionConfig | TextConfig | Config) -> dict[str, Any]:
    data = {f.name: getattr(config, f.name) for f in fields(config)}
    return {**data.pop("extra"), **data}
