"""Messages in, packed tensors out: what the model reads, made from prompts and picture files.

Sizes come first, from headers and packet times alone, so that token counts and limits are known before anything is
decoded. Dims: T tokens, N sequences, P patches, I images, V videos.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from glm4v_ext import patchify

from .batch import Batch
from .config import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, Config, checkpoint_folder
from .errors import InputError
from .files import carry
from .image import Picture, smart_resize
from .kinds import is_list, is_number
from .positions import rope_positions
from .prompt import Conversation, load_chat_template, load_named_tokens, read_settings, render
from .tokenizer import TextCodec, load_tokenizer
from .video import Video

Messages: TypeAlias = Sequence[Mapping[str, Any]]

# What is built in: a checkpoint that asks for anything else is refused rather than read wrongly.
FIXED = {
    "do_sample_frames": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "merge_size": MERGE_SIZE,
}

FILM_RULE = "Glm4vVideoProcessor"  # transformers' name of it; GLM-4.6V samples and dates its frames in another way

PICTURE_TOKENS = {  # by their ids' names in the config
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
}


@dataclass(frozen=True)
class PixelSettings:
    """How pictures become patches; ``min_pixels`` and ``max_pixels`` count all frames, an image counts as two.

    Defaults are the release's, for images.
    """

    min_pixels: int = 112 * 112
    max_pixels: int = 9_633_792
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    fps: float = 2
    max_duration: float = 300
    sampled_by: str = FILM_RULE

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], release: PixelSettings, where: str) -> PixelSettings:
        """Settings of a preprocessor's file, the release's for the rest; ``where`` says in an error whose they are."""

        def stated(key: str, default: Any, expectation: str, fits: Callable[[Any], bool]) -> Any:
            value = default if data.get(key) is None else data[key]
            if not fits(value):
                raise InputError(f"processor: {where}: {key} must be {expectation}, got {value!r}")
            return value

        def finite(value: Any) -> bool:
            return is_number(value) and math.isfinite(value)

        def positive(value: Any) -> bool:
            return finite(value) and value > 0

        def three(value: Any) -> bool:
            return is_list(value) and len(value) == 3 and all(map(finite, value))

        def edges(value: Any) -> bool:
            return isinstance(value, dict) and all(positive(value.get(key, 1)) for key in size)

        size = {"shortest_edge": release.min_pixels, "longest_edge": release.max_pixels}
        size |= stated("size", {}, f"positive numbers named {' and '.join(size)}", edges)
        return cls(
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            mean=tuple(stated("image_mean", release.mean, "3 numbers", three)),
            std=tuple(stated("image_std", release.std, "3 positive numbers", lambda x: three(x) and min(x) > 0)),
            fps=stated("fps", release.fps, "a positive number", positive),
            max_duration=stated("max_duration", release.max_duration, "a positive number", positive),
            sampled_by=stated("video_processor_type", FILM_RULE, "text", lambda x: isinstance(x, str)),
        )


IMAGES, VIDEOS = PixelSettings(), PixelSettings(max_pixels=47_040_000)  # the release's


@dataclass
class Measured:
    """A picture whose header is read, and the ``height`` and ``width`` that it is resized to.

    In a message it may stand for its file, which is then not looked for again.
    """

    kind: str  # image or video
    num_frames: int
    timestamps: list[float]  # seconds of a video's frames
    height: int
    width: int
    frames: Callable[[], np.ndarray]  # decodes: uint8 [F, H, W, 3]

    def keep(self) -> None:
        """Decodes now and lets go of the file: the frames are kept as the model sees them, for any number of prompts.

        Raises:
            InputError: the file is damaged.
        """
        frames = self.frames()
        self.frames = lambda: frames


@dataclass(frozen=True)
class _Plan:
    """A conversation before decoding: its tokens and its pictures."""

    pieces: list[int | str]
    ids: list[int]
    pictures: list[Measured]


class Processor:
    """Tokenizer, chat template and picture settings of a checkpoint."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_pixels: int | None = None,
        max_aspect_ratio: float = 200,
        allow_network: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder = path = checkpoint_folder(folder)
        self.config = Config.from_pretrained(path)
        self.tokenizer = load_tokenizer(path)
        self.codec = TextCodec(self.tokenizer, load_named_tokens(path))
        for name, token in PICTURE_TOKENS.items():
            if self.codec.id(token) != getattr(self.config, name):
                found = f"{getattr(self.config, name)} in config.json, {self.codec.id(token)} in tokenizer.json"
                raise InputError(f"processor: {path}: {name} must be the id of {token}, got {found}")
        self.template = load_chat_template(path)
        self.image, self.video = _pixel_settings(path)
        for name, limit in (("max_pixels", max_pixels), ("max_aspect_ratio", max_aspect_ratio)):
            if limit is not None and not (is_number(limit) and limit >= 1):
                raise InputError(f"processor: {name} must be 1 or more, got {limit!r}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kinds = "torch.float32, torch.bfloat16 or torch.float16"
            raise InputError(f"processor: dtype must be {kinds}, got {dtype!r}")
        if not isinstance(allow_network, bool):  # "no" is true
            raise InputError(f"processor: allow_network must be True or False, got {allow_network!r}")
        self.max_pixels, self.max_aspect_ratio = max_pixels, max_aspect_ratio
        self.allow_network, self.dtype = allow_network, dtype

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Processor:
        """Reads a checkpoint folder.

        Args:
            folder: the checkpoint.
            options: ``max_pixels`` and ``max_aspect_ratio`` replace the checkpoint's pixel budget (over all frames, an
                image counts as two; it goes over the checkpoint's least number, too) and the limit of 200;
                ``allow_network`` lets http(s) URLs be fetched; ``dtype`` is that of the patches.

        Raises:
            InputError: one line that names the file and what is wrong in it.
        """
        return cls(folder, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Copies the checkpoint's tokenizer, chat template and picture settings beside the weights that
        `Glm4v.save_pretrained` writes; what was passed to `from_pretrained` is not among them."""
        carry(self.folder, Path(folder))

    def __call__(self, messages: Messages | Sequence[Messages], pixels: bool = True) -> Batch:
        """Packs one conversation or several into a `Batch` that ends where the assistant begins.

        Without ``pixels`` it is made from headers alone, and patches are None. All sizes are the same; but that a film
        lies on its side is not known before it is decoded, so its rows and columns are those that are stored.

        Raises:
            InputError: malformed messages, unreadable pictures, or a prompt that the model has no positions for.
        """
        plans = [self._plan(conversation) for conversation in _conversations(messages)]
        limit = self.config.text_config.max_position_embeddings
        for i, plan in enumerate(plans):
            if len(plan.ids) > limit:
                which = f" of conversation {i + 1}" if len(plans) > 1 else ""
                raise InputError(f"prompt: tokens{which} must be at most {limit}, the model's, got {len(plan.ids)}")
        pixel_values, image_grid_thw = self._patches(plans, "image", pixels)
        pixel_values_videos, video_grid_thw = self._patches(plans, "video", pixels)
        input_ids = torch.tensor([index for plan in plans for index in plan.ids], device="cpu")
        cu_seqlens = torch.tensor(np.cumsum([0] + [len(plan.ids) for plan in plans]), dtype=torch.int32, device="cpu")
        position_ids, next_positions = rope_positions(
            input_ids,
            cu_seqlens,
            image_grid_thw,
            video_grid_thw,
            self.config.image_token_id,
            self.config.video_start_token_id,
            self.config.video_end_token_id,
            MERGE_SIZE,
        )
        return Batch(
            input_ids,
            cu_seqlens,
            position_ids,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            next_positions,
            tuple(self.codec.text(plan.pieces) for plan in plans),
        )

    def count_tokens(self, messages: Messages | Sequence[Messages]) -> int | list[int]:
        """Tokens of the prompt, or of each prompt, from headers alone: no picture is decoded.

        Raises:
            InputError: malformed messages, or pictures whose headers cannot be read.
        """
        counts = [len(self._plan(conversation).ids) for conversation in _conversations(messages)]
        return counts[0] if isinstance(messages[0], Mapping) else counts

    def measure(self, kind: str, source: Any, fps: float | None = None) -> Measured:
        """Reads the header of an image or a video, by ``kind``; what comes of it may stand in messages for ``source``.

        Raises:
            InputError: there is no such file, it is no picture, or one of a shape that the model does not see.
        """
        if isinstance(source, Measured) and source.kind == kind:
            return source
        settings = self.image if kind == "image" else self.video
        picture: Picture | Video
        timestamps: list[float] = []
        if kind == "image":
            picture = Picture(source, self.allow_network)
        elif settings.sampled_by != FILM_RULE:
            raise InputError(f"processor: video_processor_type must be {FILM_RULE}, got {settings.sampled_by}")
        else:
            picture = Video(source, fps, settings.fps, settings.max_duration, self.allow_network)
            timestamps = picture.timestamps
        try:
            height, width = smart_resize(
                picture.num_frames,
                picture.height,
                picture.width,
                settings.min_pixels,
                self.max_pixels or settings.max_pixels,
                PATCH_SIZE * MERGE_SIZE,
                TEMPORAL_PATCH_SIZE,
                self.max_aspect_ratio,
            )
        except InputError as error:
            raise picture.source.error(error) from None
        return Measured(kind, picture.num_frames, timestamps, height, width, partial(picture.frames, height, width))

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Token ids of a text; with ``specials=False`` special tokens in it are plain characters."""
        return self.codec.encode(text, specials)

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.codec.decode(ids.tolist() if isinstance(ids, Tensor) else ids, skip_special_tokens)

    def _plan(self, messages: Messages) -> _Plan:
        conversation = Conversation(messages, self.template)
        pictures = [self.measure(media.kind, media.source, media.fps) for media in conversation.media]
        pieces: list[int | str] = []
        placed = 0
        for piece in render(self.template, conversation, self.codec):
            if piece not in (self.config.image_token_id, self.config.video_token_id):
                pieces.append(piece)
                continue
            kind = "image" if piece == self.config.image_token_id else "video"
            if placed == len(pictures) or conversation.media[placed].kind != kind:
                raise InputError("prompt: the chat template must place the pictures of the messages in their order")
            pieces += self._expand(pictures[placed])
            placed += 1
        if placed < len(pictures):
            raise InputError(f"prompt: the chat template must place {len(pictures)} pictures, got {placed}")
        return _Plan(pieces, self.codec.join(pieces), pictures)

    def _expand(self, picture: Measured) -> list[int | str]:
        """What stands for a picture in the prompt: its tokens; for a video, each unit's tokens and its time."""
        side = PATCH_SIZE * MERGE_SIZE
        tokens: list[int | str] = [self.config.image_token_id] * (picture.height // side * (picture.width // side))
        if picture.kind == "image":
            return tokens
        pieces: list[int | str] = []
        for seconds in picture.timestamps[::TEMPORAL_PATCH_SIZE]:
            pieces += [self.config.image_start_token_id, *tokens, self.config.image_end_token_id, str(int(seconds))]
        return pieces

    def _patches(self, plans: Sequence[_Plan], kind: str, pixels: bool) -> tuple[Tensor | None, Tensor | None]:
        """Patches, if wanted, and grids of all pictures of a kind, decoded one after the other."""
        patches, grids = [], []
        settings = self.image if kind == "image" else self.video
        for picture in (picture for plan in plans for picture in plan.pictures if picture.kind == kind):
            if not pixels:
                units = -(-picture.num_frames // TEMPORAL_PATCH_SIZE)
                sides = [units, picture.height // PATCH_SIZE, picture.width // PATCH_SIZE]
                grids.append(torch.tensor([sides], device="cpu"))
                continue
            one, grid = patchify(
                torch.from_numpy(picture.frames()),
                settings.mean,
                settings.std,
                TEMPORAL_PATCH_SIZE,
                PATCH_SIZE,
                MERGE_SIZE,
                self.dtype,
            )
            patches.append(one)
            grids.append(grid)
        together = [torch.cat(each) if len(each) > 1 else each[0] if each else None for each in (patches, grids)]
        return together[0], together[1]


def _conversations(messages: Messages | Sequence[Messages]) -> Sequence[Messages]:
    if not is_list(messages) or len(messages) == 0:
        expectation = 'a list of messages or a list of such lists, as [{"role": "user", "content": "Hi"}], not empty'
        raise InputError(f"prompt: messages must be {expectation}, got {reprlib.repr(messages)}")
    return cast(Sequence[Messages], [messages] if isinstance(messages[0], Mapping) else messages)


def _pixel_settings(folder: Path) -> tuple[PixelSettings, PixelSettings]:
    """Settings of images and videos, out of the file where transformers would find them: newer versions keep both in
    one. Without any for videos, those of images hold. What no file says is the release's."""
    whole = read_settings(folder / "processor_config.json")
    image_file = read_settings(folder / "preprocessor_config.json")
    image = whole.get("image_processor") or image_file
    video = whole.get("video_processor") or read_settings(folder / "video_preprocessor_config.json") or image_file
    for name, settings in (("images", image), ("videos", video)):
        if not isinstance(settings, dict):
            raise InputError(f"processor: {folder}: settings of {name} must be a JSON object, got {settings!r}")
        for key, value in FIXED.items():
            if settings.get(key) not in (None, value):
                raise InputError(f"processor: {folder}: {key} of {name} must be {value}, got {settings[key]}")
    return (
        PixelSettings.from_dict(image, IMAGES, f"{folder}, images"),
        PixelSettings.from_dict(video, VIDEOS, f"{folder}, videos"),
    )
