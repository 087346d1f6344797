"""Low-rank adapters by peft: ``W x + alpha / r * B (A x)`` in place of ``W x``, of which A ``[r, C_in]`` and B
``[C_out, r]`` alone are trained. They are fp32 over weights of any type, and B begins at 0: the first step sees the
model as it was. They multiply in the weights' type, and the sum is B's product's: peft would write ``B (A x)`` in fp32
and pass over it three times, with which an update on a GPU took 1.4 times as long (bench/LOG.md).

On disk they are in peft's own format, under the names that transformers has for the layers. Where several processes
share the weights (`fsdp`), they share these too, by rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glm4v import Glm4v
from glm4v.weights import parts
from glm4v_ext import linear

from . import parallel

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

FOLDER = "adapter"  # of a checkpoint
FILE = "adapter_model.safetensors"
NAME = "default"  # peft's, of a model's only adapter


def check_installed() -> None:
    if find_spec("peft") is None:
        raise ValueError("model: lora_rank above 0 needs peft, got none: pip install 'glm4v-ext[lora]'")


def add(model: Glm4v, layers: Iterable[str], rank: int, alpha: float) -> None:
    """Adapters on these linear layers, without values: see `begin` and `load`. All else of the model is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, target_modules=list(layers))
    config.lora_alpha = alpha  # type: ignore[assignment]  # declared whole, though any number will do
    inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)  # on the meta device
    for layer in adapted(model).values():
        base: Any = layer.base_layer
        for matrices in (layer.lora_A, layer.lora_B):
            matrices.float().to_empty(device=base.weight.device)
        layer.__class__ = _summing(type(layer))


def add_as_in(other: Glm4v, model: Glm4v) -> None:
    """The adapters that another model has, without their values."""
    layers: dict[str, Any] = adapted(other)
    if layers:
        first = next(iter(layers.values()))
        add(model, layers, first.r[NAME], first.lora_alpha[NAME])


@torch.no_grad()
def begin(model: Glm4v, seed: int) -> None:
    """Draws where training begins, as peft does: A uniform below 1 / sqrt(C_in), B zeros. All ranks draw the same."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted(model).values():
        a, b = _matrices(layer)
        parallel.fill(a, nn.init.kaiming_uniform_(torch.empty(a.shape), math.sqrt(5), generator=generator))
        nn.init.zeros_(b)


@functools.cache
def _summing(kind: Any) -> Any:
    """peft's layer, with a forward of our own."""

    def forward(self: Any, x: Tensor) -> Tensor:  # [T, C_in] -> [T, C_out]
        a, b = (matrix.to(x.dtype) for matrix in _matrices(self))
        return self.base_layer(x).addmm_(linear(x, a), b.T, alpha=self.scaling[NAME])

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def adapted(model: Glm4v) -> dict[str, LoraLayer]:
    """Layers with an adapter, by name; none in a model without."""
    if not any(hasattr(layer, "lora_A") for layer in model.modules()):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@torch.no_grad()
def merge(layer: Any) -> Tensor:
    """A layer's whole weights with its adapter in them."""
    weight, a, b = (parallel.plain(x.detach()) for x in (layer.base_layer.weight, *_matrices(layer)))
    return (weight.float() + layer.scaling[NAME] * (b @ a)).to(weight.dtype)


@contextmanager
def merged(model: Glm4v) -> Iterator[None]:
    """In here the model has plain layers with the adapters in their weights; then the same adapters again."""
    layers: dict[str, Any] = adapted(model)
    try:
        for name, layer in layers.items():
            base = layer.base_layer
            whole = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            whole.weight = nn.Parameter(merge(layer))
            whole.bias = base.bias
            model.set_submodule(name, whole)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def save(model: Glm4v, base: Path, folder: Path) -> None:
    """The adapters alone, as ``PeftModel.from_pretrained(transformers_model, folder)`` takes them. By the first rank;
    all must call."""
    layers: dict[str, Any] = adapted(model)
    tensors = {}
    for name, layer in layers.items():
        a, b = (parallel.plain(matrix.detach()).cpu() for matrix in _matrices(layer))
        for on_disk, rows in zip(names := _on_disk(name), b.chunk(len(names)), strict=True):
            tensors[f"base_model.model.{on_disk}.lora_A.weight"] = a.clone()  # fused layers share theirs
            tensors[f"base_model.model.{on_disk}.lora_B.weight"] = rows.contiguous()
    parallel.on_first(lambda: _write(tensors, next(iter(layers.values())), list(layers), base, folder))


def _write(tensors: dict[str, Tensor], layer: Any, names: Iterable[str], base: Path, folder: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=layer.r[NAME],
        lora_alpha=layer.lora_alpha[NAME],
        target_modules=[on_disk for name in names for on_disk in _on_disk(name)],
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load(model: Glm4v, folder: Path) -> None:
    """Gives a model with adapters those that :func:`save` wrote."""
    path = folder / FILE
    try:
        tensors = load_file(path)
        for name, layer in adapted(model).items():
            found = [f"base_model.model.{on_disk}" for on_disk in _on_disk(name)]
            a, b = _matrices(layer)
            with torch.no_grad():
                parallel.fill(a, tensors[f"{found[0]}.lora_A.weight"])
                parallel.fill(b, torch.cat([tensors[f"{one}.lora_B.weight"] for one in found]))
    except Exception as error:  # the library raises its own, torch its own
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from None


def without(name: str) -> str:
    """What a parameter is called in the model without adapters."""
    return name.replace(".base_layer.", ".")


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def _on_disk(name: str) -> list[str]:
    """What a layer is called there: the vision side's gate and up are two."""
    return [part.removesuffix(".weight") for part in parts(f"{name}.weight")]
