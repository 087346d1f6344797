"""GLM-4.1V as one module: pictures and token ids in, logits out, packed.

Dims: T tokens, N sequences, B cache rows, P patches, I grid rows, C width, V vocab, R rows asked for.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import weights
from .cache import KVCache
from .config import MERGE_SIZE, Config, checkpoint_folder, read_generation_config, warn_of_unread
from .device import device_of
from .errors import InputError
from .files import json_text, write_text
from .generate import generate as _generate
from .generate import stream as _stream
from .kinds import is_whole
from .layers import Linear
from .positions import Keys, inside_videos, keys_behind_prefixes, sequence_ids
from .text import LanguageModel
from .vision import VisionTower

if TYPE_CHECKING:
    from .processor import Processor


class Glm4v(nn.Module):
    """The model with random weights; `from_pretrained` gives one with a checkpoint's.

    Parameters carry the checkpoint's names, but the vision side's gate and up matrices are one (`weights.parts`).
    """

    generate = _generate
    stream = _stream

    #: Whether a GPU replays decode steps; False for hooks that look at values or do something on the host.
    replays: bool = True

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.folder: Path | None = None  # the checkpoint that the weights came from
        self.generation_config: dict[str, Any] = {}  # the content of its generation_config.json
        with torch.device("meta"):
            visual, language_model = VisionTower(config.vision_config), LanguageModel(config.text_config)
            self.model = nn.ModuleDict({"visual": visual, "language_model": language_model})
            self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self._init_weights()
        self.tie_weights()

    @property
    def visual(self) -> VisionTower:
        return self.model["visual"]  # type: ignore[return-value]

    @property
    def language_model(self) -> LanguageModel:
        return self.model["language_model"]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @cached_property
    def processor(self) -> Processor:
        """Makes prompts of messages; read from the checkpoint at the first use, or set by hand."""
        from .processor import Processor

        if self.folder is None:
            raise InputError("glm4v: processor must be set for a model without a checkpoint folder, got none")
        return Processor.from_pretrained(self.folder)

    def tie_weights(self) -> None:
        """One matrix for embedding and head, where the config asks for it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Glm4v:
        """Reads a Hugging Face checkpoint folder (`config.json`, safetensors).

        Weights of the wanted type stay where the file is mapped; others are converted one by one.

        Args:
            folder: the checkpoint.
            dtype: of the weights; None keeps the file's, of most values where tensors differ.
            device: where they go, such as "cuda".
            progress: called as ``progress(bytes_done, bytes_total)`` after each tensor.

        Raises:
            InputError: one line that names the file and what is wrong in it, or the argument.
        """
        device_of(device, values=False)
        model = cls.without_weights(folder)
        assert model.folder is not None
        weights.load(model, model.folder, dtype, device, progress)
        model.tie_weights()
        return model.eval()

    @classmethod
    def without_weights(cls, folder: str | os.PathLike[str]) -> Glm4v:
        """A checkpoint's model on the meta device, for those who read the weights themselves (`weights.Rows`)."""
        path = checkpoint_folder(folder)
        model = cls(Config.from_pretrained(path), device="meta")
        model.folder = path
        model.generation_config = read_generation_config(path, model.config)
        warn_of_unread(model.generation_config, model.config, path)
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        max_shard_bytes: int = 5 * 10**9,
        tensors: Mapping[str, weights.Written] | None = None,
    ) -> None:
        """Writes `config.json`, `generation_config.json` and safetensors that transformers loads; each file appears
        whole or not at all. A save that ends early leaves the old weights, or, where shards were taking the names of
        old ones, no index, which loading says; never a mix of both.

        Args:
            folder: where.
            max_shard_bytes: of one file.
            tensors: what to write in place of the model's own weights, by names on disk: where those lie elsewhere.
        """
        tensors = weights.tensors(self) if tensors is None else tensors
        dtype = next(iter(tensors.values())).dtype
        files = {"config.json": replace(self.config, dtype=str(dtype).removeprefix("torch.")).to_dict()}
        if self.generation_config:
            files["generation_config.json"] = self.generation_config
        texts = {name: json_text(content) for name, content in files.items()}  # what cannot be written is told now
        weights.write(tensors, folder, max_shard_bytes)
        for name, text in texts.items():
            write_text(Path(folder) / name, text)

    def recompute_activations(self, on: bool = True) -> None:
        """Training keeps only what goes into each block and computes the rest again in the backward pass."""
        self.visual.recompute = self.language_model.recompute = on

    def embed(
        self,
        input_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [N + 1]
        **pictures: Tensor | None,
    ) -> Tensor:
        """Token embeddings ``[T, C]`` with the pictures' features, as `pictures` has these, in place of ``<|image|>``
        tokens.

        The tokens take the features in prompt order. Arguments may stay on the host, where ids, lengths and grids are
        looked at without waiting for the device.

        Raises:
            ValueError: an id on the host is none of the vocabulary, or as in `pictures`; nothing has been computed
                then.
        """
        if input_ids.is_cpu and len(input_ids):
            low, high = (int(end) for end in input_ids.aminmax())
            last = self.config.text_config.vocab_size - 1
            if low < 0 or high > last:
                raise ValueError(f"glm4v: input_ids must be 0 to {last}, got {low if low < 0 else high}")
        places = self.pictures(input_ids, cu_seqlens, **pictures).values()
        x = self.language_model.embed_tokens(self._here(input_ids))
        seen = [(self._here(at), self._here(pixels), grid) for at, pixels, grid in places if pixels is not None]
        if seen:  # all through the tower together: sharded over processes, it must run as often on each of them
            at, pixels, grid = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*seen, strict=True))
            x.index_copy_(0, at, self.visual(pixels, grid).to(x.dtype))
        return x

    def pictures(
        self,
        input_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [N + 1]
        pixel_values: Tensor | None = None,  # [P, 1176]
        image_grid_thw: Tensor | None = None,  # [I, 3]
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor | None, Tensor | None]]:
        """Of images and of videos, by the names of their arguments: where their tokens stand, patches and grids.

        A video's tokens are those between begin_of_video and end_of_video, an image's are all others.

        Raises:
            ValueError: tokens, grids and patches do not count the same.
        """
        of_images, of_videos = self._picture_tokens(input_ids, cu_seqlens)
        places = {
            ("pixel_values", "image_grid_thw"): (of_images, pixel_values, image_grid_thw),
            ("pixel_values_videos", "video_grid_thw"): (of_videos, pixel_values_videos, video_grid_thw),
        }
        for (name, grid_name), (at, pixels, grid) in places.items():
            where = "outside" if at is of_images else "inside"
            _check_pictures(name, pixels, grid_name, grid, len(at), where)
        return places

    def hidden(
        self,
        input_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [N + 1]
        position_ids: Tensor,  # [3, T]
        cache: KVCache | None = None,
        prefixes: Sequence[int] | None = None,  # N
        **pictures: Any,
    ) -> Tensor:
        """Hidden states ``[T, C]`` that the head reads; ``pictures`` are those of `pictures`. Fills an empty cache of N
        rows; one row may hold tokens already, which the sequence goes on from.

        Sequence n goes on from sequence ``prefixes[n]``, where that isn't -1: it sees that one's tokens before its own.
        So the answers to a prompt share its tokens, which are read once.

        Raises:
            ValueError: tokens and lengths do not fit each other, or as in `embed`; nothing has been computed then.
        """
        _check_integers("input_ids", input_ids, "[T]")
        _check_integers("cu_seqlens", cu_seqlens, "[N + 1]")
        starts = cu_seqlens.tolist()  # the one place where the host looks at lengths
        if starts[:1] != [0] or starts != sorted(starts):
            raise ValueError(f"glm4v: cu_seqlens must ascend from 0, got {starts}")
        if starts[-1] != len(input_ids):
            raise ValueError(f"glm4v: cu_seqlens must end at {len(input_ids)}, the input_ids, got {starts[-1]}")
        longest = max((b - a for a, b in pairwise(starts)), default=0)
        keys = None
        if prefixes is not None:
            if cache is not None:
                raise ValueError("glm4v: prefixes must be None with a cache, got both")
            seen = keys_behind_prefixes(starts, prefixes)
            keys = Keys(self._here(seen.rows), self._here(seen.cu_seqlens), seen.longest)
        x = self.embed(input_ids, cu_seqlens, **pictures)
        return self.language_model(x, self._here(position_ids), self._here(cu_seqlens).int(), longest, cache, keys)

    def forward(
        self,
        input_ids: Tensor,  # [T]
        cu_seqlens: Tensor,  # [N + 1]
        position_ids: Tensor,  # [3, T]
        logits_to_keep: int | Tensor | None = None,
        **pictures: Any,
    ) -> Tensor:
        """Logits ``[T, V]``, or ``[R, V]`` of some tokens.

        Args:
            input_ids: token ids of all sequences, one after the other.
            cu_seqlens: where each sequence starts, and T.
            position_ids: time, row and column of each token.
            logits_to_keep: k for the last k tokens of each sequence (0 keeps none), or an index tensor ``[R]`` into the
                T tokens; None keeps all.
            pictures: as in `pictures`; also `hidden`'s ``prefixes``.

        Raises:
            ValueError: as in `hidden`, or ``logits_to_keep`` is something else.
        """
        if not isinstance(logits_to_keep, Tensor | None) and not (is_whole(logits_to_keep) and logits_to_keep >= 0):
            raise ValueError(f"glm4v: logits_to_keep must be 0 or more, an index tensor or None, got {logits_to_keep}")
        hidden = self.hidden(input_ids, cu_seqlens, position_ids, **pictures)
        if not isinstance(logits_to_keep, Tensor | None):
            ends = cu_seqlens[1:][sequence_ids(cu_seqlens, len(hidden))]
            kept = ends - torch.arange(len(hidden), device=ends.device) <= logits_to_keep
            logits_to_keep = kept.nonzero().flatten()
        if logits_to_keep is not None:
            hidden = hidden[self._here(logits_to_keep)]
        return self.lm_head(hidden)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for ``batch_size`` sequences of up to ``capacity`` tokens."""
        return KVCache(self.config.text_config, batch_size, capacity, self.dtype, self.device)

    @torch.inference_mode()
    def prefill(self, batch: Mapping[str, Any], cache: KVCache) -> Tensor:
        """Reads N prompts, `forward`'s arguments, into a cache of N rows as `hidden` does: logits ``[N, V]`` of what
        follows."""
        hidden = self.hidden(**batch, cache=cache)
        return self.lm_head(hidden[self._here(batch["cu_seqlens"])[1:] - 1])

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """One more token ``[B]`` for each cache row, at ``position_ids [3, B]``: logits ``[B, V]`` of what follows.

        Steps on one cache are alike, so that a GPU replays them unless `replays` is False; weights must stay where they
        are meanwhile.
        """
        cache.reserve(1)
        kept = weakref.ref(cache)  # which will hold the step

        def step(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            cache = kept()
            assert cache is not None
            x = self.language_model.embed_tokens(input_ids)
            return self.lm_head(self.language_model.decode(x, position_ids, cache))

        return (cache.replayed(step) if self.replays else step)(input_ids, position_ids)

    def _here(self, x: Tensor) -> Tensor:
        """On the model's device; a copy from the host waits for nothing that runs there."""
        return x.to(self.device, non_blocking=True)

    def _picture_tokens(self, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of images and of videos stand."""
        config = self.config
        in_video = inside_videos(input_ids, cu_seqlens, config.video_start_token_id, config.video_end_token_id)
        picture = input_ids == config.image_token_id
        return (picture & ~in_video).nonzero().flatten(), (picture & in_video).nonzero().flatten()

    def _init_weights(self) -> None:
        config = self.config
        parts = (
            (self.visual, config.vision_config.initializer_range),
            (self.language_model, config.text_config.initializer_range),
            (self.lm_head, config.text_config.initializer_range),
        )
        for part, std in parts:
            for name, parameter in part.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif parameter.ndim == 1:  # a norm
                    nn.init.ones_(parameter)
                else:
                    nn.init.normal_(parameter, std=std)


def _check_integers(name: str, x: Tensor, letters: str) -> None:
    if x.ndim != 1 or x.is_floating_point():
        raise ValueError(f"glm4v: {name} must be whole numbers {letters}, got {x.dtype} {list(x.shape)}")


def _check_pictures(
    pixels_name: str,
    pixels: Tensor | None,
    grid_name: str,
    grid: Tensor | None,
    tokens: int,
    where: str,
) -> None:
    if (pixels is None) != (grid is None):
        raise ValueError(f"glm4v: {pixels_name} and {grid_name} must come together, got only one of them")
    if grid is not None and (grid.ndim != 2 or grid.shape[1] != 3 or grid.is_floating_point()):
        raise ValueError(f"glm4v: {grid_name} must be whole numbers [I, 3], got {grid.dtype} {list(grid.shape)}")
    units = [] if grid is None else grid.tolist()
    for i, (t, h, w) in enumerate(units):
        if min(t, h, w) < 1 or h % MERGE_SIZE or w % MERGE_SIZE:
            raise ValueError(f"glm4v: {grid_name} row {i} must be (t, h, w), h and w multiples of 2, got {[t, h, w]}")
    patches = sum(t * h * w for t, h, w in units)
    if pixels is not None and (pixels.ndim != 2 or len(pixels) != patches):
        raise ValueError(f"glm4v: {pixels_name} must have {patches} rows for {grid_name}, got {list(pixels.shape)}")
    if tokens != patches // MERGE_SIZE**2:
        expectation = f"{patches // MERGE_SIZE**2} <|image|> tokens {where} videos for {grid_name}"
        raise ValueError(f"glm4v: input_ids must have {expectation}, got {tokens}")
