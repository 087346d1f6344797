"""Weights between a model and a folder of safetensors with Hugging Face's names.

Reading maps each file and hands its pages to the model, so that a checkpoint never stands in memory twice; what has
another dtype is converted tensor by tensor. On other devices, where all is copied, a layer's projections to q, k and v
stand in one tensor (`layers.products`). Everything is checked against the model before anything is taken. Writing
puts every file under a temporary name first, so that an interrupted save leaves no half file under a real one, and
never files of two saves that load as one model.

A safetensors file is 8 bytes of header length, a JSON header (name to dtype, shape, byte range), and the bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import InputError
from .files import read_json, sync, temporary, unfetched, write_temporary
from .kinds import is_whole
from .layers import adjoin
from .text import Attention

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # what the ops take
PAGE = 4096
ROWS_BYTES = 1 << 24  # looked at together


def parts(name: str) -> list[str]:
    """Names on disk of a parameter: the vision side's ``gate_up_proj`` is two tensors there, all else is itself."""
    if name.startswith("model.visual.") and ".gate_up_proj." in name:
        return [name.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]
    return [name]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: bytes ``[start, stop)`` of ``data``, the mapped file."""

    file: Path
    data: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def load(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Gives every parameter of ``model``, on the meta device, its tensor from ``folder``: `Glm4v.from_pretrained`.

    One that is elsewhere already (`layers.adjoin`) takes its values where it is.
    """
    computed = ", ".join(map(str, COMPUTED))
    if dtype is not None and dtype not in COMPUTED:
        raise InputError(f"weights: dtype must be {computed} or None, got {dtype!r}")
    entries, wanted = _entries_of(model, folder), _parameters(model)
    if dtype is None:
        dtype = _dtype(entries.values())
        if dtype not in COMPUTED:
            raise InputError(f"weights: {folder}: dtype must be given, one of {computed}, for weights of {dtype}")
    if torch.device(device).type != "cpu":
        for module in model.modules():
            if isinstance(module, Attention):
                adjoin(module.projections, dtype, device)
    total, done = sum(e.stop - e.start for e in entries.values()), 0
    # In the order of the files, which disks like best.
    order = sorted(wanted, key=lambda name: (entries[parts(name)[0]].file, entries[parts(name)[0]].start))
    for name in order:
        pieces = [entries.pop(part) for part in parts(name)]
        owner, _, leaf = name.rpartition(".")
        layer, values = model.get_submodule(owner), _read(pieces)
        if (held := layer.get_parameter(leaf)).is_meta:
            setattr(layer, leaf, nn.Parameter(values.to(device, dtype), requires_grad=held.requires_grad))
        else:
            held.data.copy_(values)
        done += sum(e.stop - e.start for e in pieces)
        if progress is not None:
            progress(done, total)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes on disk of every parameter of ``model``."""
    return {name: tensor.shape for name, tensor in _disk_tensors(_parameters(model))}


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in ``folder``, by its name on disk, mapped where it stands."""
    return {name: _read([entry]) for name, entry in _entries(folder).items()}


class Rows:
    """``rows(name, start, stop)`` of a parameter of ``model``, out of the files in ``folder``; no others are read."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._entries = _entries_of(model, folder)
        self.dtype = _dtype(self._entries.values())

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        found: list[tuple[Entry, int, int]] = []
        first = 0
        for part in parts(name):
            entry = self._entries[part]
            rows = entry.shape[0]
            found.append((entry, min(max(start - first, 0), rows), min(max(stop - first, 0), rows)))
            first += rows
        return _read_rows(found)


class Written(Protocol):
    """A tensor, or what will be one when its bytes are written."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def cpu(self) -> Tensor: ...


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of ``model`` by its names on disk."""
    return dict(_disk_tensors(_parameters(model)))


def write(tensors: Mapping[str, Written], folder: str | os.PathLike[str], max_shard_bytes: int) -> None:
    """Writes ``tensors`` to ``folder``, as one file or as shards with an index."""
    if not is_whole(max_shard_bytes) or max_shard_bytes < 1:
        raise InputError(f"weights: max_shard_bytes must be a whole number above 0, got {max_shard_bytes!r}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Written]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = []
    if count > 1:
        size = sum(t.nbytes for shard in shards for t in shard.values())
        names = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = [json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2).encode()]
        files.append(INDEX)
    try:
        for file, content in zip(files, [*map(_encode, shards), index], strict=False):
            write_temporary(target / file, content)
        _rename(target, files)
    finally:
        for file in files:
            temporary(target / file).unlink(missing_ok=True)
    # One file is read before an index is, so an old one counts until the shards that take its place are all there.
    old = {*target.glob("model-?????-of-?????.safetensors"), target / SINGLE, target / INDEX}
    for stale in old - {target / file for file in files}:  # of an earlier save in other shards
        stale.unlink(missing_ok=True)


def _rename(folder: Path, files: Sequence[str]) -> None:
    """Gives the files their names, the last of which makes them the checkpoint: one file of weights, or the index.

    An old index stays until then, unless shards take names that it knows: it would be true of any mix of both saves. It
    goes aside before them, and comes back where none of them could be renamed.
    """
    *shards, last = (folder / file for file in files)
    index = folder / INDEX
    aside = index.with_name(f"{INDEX}.old")
    aside.unlink(missing_ok=True)  # of a save that was killed
    try:
        if index.exists() and any(shard.exists() for shard in shards):
            os.replace(index, aside)
            sync(folder)  # each step is on the disk before the next one
        for shard in shards:
            os.replace(temporary(shard), shard)
        sync(folder)
        os.replace(temporary(last), last)
        sync(folder)
    finally:
        if aside.exists() and temporary(shards[0]).exists():
            os.replace(aside, index)
        aside.unlink(missing_ok=True)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, a tied one once, under its first name."""
    return dict(model.named_parameters())


def _disk_tensors(parameters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        names = parts(name)
        yield from zip(names, parameter.detach().chunk(len(names)), strict=True)


def _entries_of(model: nn.Module, folder: Path) -> dict[str, Entry]:
    """Those of the parameters of ``model``, which must be all that there are; a tied one may be stored twice."""
    entries, wanted = _entries(folder), _parameters(model)
    names = {id(parameter): name for name, parameter in wanted.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names[id(parameter)]
        if name != first and name in entries and first in entries:
            second = entries.pop(name)
            if not _same(entries[first], second):
                raise InputError(f"weights: {second.file}: tensor {name} must equal {first}, which it is tied to")
    _check(folder, shapes(model), entries)
    return entries


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint, by name."""
    index = folder / INDEX
    if (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif index.exists():
        try:
            names = sorted(set(read_json(index, "weights")["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"weights: {index}: not an index of shards: {error!r}") from None
    else:
        raise InputError(f"weights: {folder}: must hold {SINGLE} or {INDEX} (no other format is read)")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _open(file).items():
            if name in entries:
                raise InputError(f"weights: {file}: tensor {name} is also in {entries[name].file.name}")
            entries[name] = entry
    return entries


def _dtype(entries: Collection[Entry]) -> torch.dtype:
    """That of most values: a few tensors, such as norms, may be kept in another."""
    return max(CODES, key=lambda dtype: sum(math.prod(entry.shape) for entry in entries if entry.dtype == dtype))


def _open(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt"):
            pass  # the library checks lengths, offsets and shapes
    except FileNotFoundError:
        raise InputError(f"weights: {file}: the file is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights: {file}: {unfetched(file) or f'not a whole safetensors file: {error}'}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    # A private mapping: training may write to the tensors, the file stays as it is.
    data = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    entries = {}
    for name, tensor in header.items():
        if tensor["dtype"] not in DTYPES:
            raise InputError(f"weights: {file}: {name} must be {', '.join(DTYPES)}, got {tensor['dtype']}")
        start, stop = (8 + length + offset for offset in tensor["data_offsets"])
        entries[name] = Entry(file, data, DTYPES[tensor["dtype"]], tuple(tensor["shape"]), start, stop)
    return entries


def _check(folder: Path, wanted: dict[str, torch.Size], entries: dict[str, Entry]) -> None:
    if missing := [name for name in wanted if name not in entries]:
        raise InputError(f"weights: {folder}: tensor {missing[0]} is missing{_others(missing)}")
    if extra := [name for name in entries if name not in wanted]:
        raise InputError(
            f"weights: {entries[extra[0]].file}: tensor {extra[0]} has no place in the model{_others(extra)}"
        )
    for name, shape in wanted.items():
        if entries[name].shape != tuple(shape):
            found = list(entries[name].shape)
            raise InputError(f"weights: {entries[name].file}: tensor {name} must be {list(shape)}, got {found}")


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(pieces: list[Entry]) -> Tensor:
    """The tensors as one, stacked by rows; without a copy where they stand so in the file."""
    first, last = pieces[0], pieces[-1]
    if not all(a.data is b.data and a.stop == b.start and a.dtype == b.dtype for a, b in pairwise(pieces)):
        return _read_rows([(piece, 0, piece.shape[0]) for piece in pieces])
    data = first.data[first.start : last.stop]
    data[::PAGE].sum()  # brings the pages in now, in order, rather than at the first use
    if first.start % first.dtype.itemsize:
        data = data.clone()
    rows = [sum(piece.shape[0] for piece in pieces)] if len(pieces) > 1 else list(first.shape[:1])
    return data.view(first.dtype).view([*rows, *first.shape[1:]])


def _read_rows(spans: Sequence[tuple[Entry, int, int]]) -> Tensor:
    """A copy of rows ``[start, stop)`` of each tensor, stacked, read past the mapping: pages that are only copied from
    would count as this process's memory too."""
    first = spans[0][0]
    if any(entry.dtype != first.dtype for entry, _, _ in spans):
        return torch.cat([_read_rows([span]) for span in spans])
    count = sum(stop - start for _, start, stop in spans)
    rows = torch.empty([count, *first.shape[1:]], dtype=first.dtype, device="cpu")
    data, at = rows.view(-1).view(torch.uint8).numpy(), 0
    for entry, start, stop in spans:
        each = (entry.stop - entry.start) // max(1, entry.shape[0])
        part = data[at : at + each * (stop - start)]
        with entry.file.open("rb") as stream:
            stream.seek(entry.start + each * start)
            if stream.readinto(part.data) < len(part):
                raise InputError(f"weights: {entry.file}: must stay as it is while it is read, got a shorter one")
        at += len(part)
    return rows


def _same(a: Entry, b: Entry) -> bool:
    """Whether two tensors are the same bit for bit, looked at by some rows at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows, step = a.shape[0], max(1, ROWS_BYTES * a.shape[0] // max(1, a.stop - a.start))
    spans = ((start, min(start + step, rows)) for start in range(0, rows, step))
    return all(torch.equal(*(_read_rows([(x, *span)]).view(torch.uint8) for x in (a, b))) for span in spans)


def _encode(shard: Mapping[str, Written]) -> Iterator[bytes | memoryview]:
    header, offset = {}, 0
    for name, tensor in shard.items():
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # tensors start on a cache line
    yield len(text).to_bytes(8, "little") + text
    for tensor in shard.values():
        yield tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
