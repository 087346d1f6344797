"""The model of a run on several processes: FSDP2 lays it over the ranks.

Weights lie by rows, one share a rank (one a rank of a copy, with ``replicate``): in fp32 those that are trained, in the
type that the model computes in those that are frozen. Blocks gather theirs when they run, in that type, and give
gradients back in fp32, which are sums over ranks of losses that are weighted already: so they don't depend on how many
ranks there are. Rollouts read a plain model that has the whole weights for as long as they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from glm4v import Glm4v
from glm4v.weights import Rows, parts

from . import lora, parallel

if TYPE_CHECKING:  # a second to import, which one process has no use for
    from torch.distributed.fsdp import FSDPModule

_computes: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()  # in what type sharded models compute


def load(
    folder: Path, dtype: torch.dtype | None, device: torch.device, prepare: Callable[[Glm4v], None] = lambda model: None
) -> Glm4v:
    """A checkpoint's model over all ranks, each of which reads the rows that it keeps. ``prepare`` freezes what isn't
    trained and adds adapters, which are zeros then."""
    model = Glm4v.without_weights(folder)
    rows = Rows(model, folder)
    prepare(model)
    shard(model, rows.dtype if dtype is None else dtype)
    tied: dict[int, nn.Parameter] = {}
    state: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in tied:
            tied[id(parameter)] = _share_of(parameter, rows, name, device)
        state[name] = tied[id(parameter)]
    model.load_state_dict(state, assign=True)
    return model


def shard(model: Glm4v, compute: torch.dtype) -> None:
    """Lays a model over the ranks: each block of the tower and the decoder, the merger, and the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for weight in model.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else compute)
    low = None if compute == torch.float32 else compute
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    blocks = blocks_of(model)
    for block in blocks:
        fully_shard(block, mesh=parallel.mesh(), mp_policy=policy)
    if (table := embedding_of(model)) is not None:
        blocks.append(table)
        fully_shard(table, mesh=parallel.mesh(), mp_policy=policy).set_unshard_in_backward(False)
    # The head's weights are read behind the forward pass, so the root keeps its own up to the backward one.
    fully_shard(model, mesh=parallel.mesh(), mp_policy=policy, reshard_after_forward=False)
    for module in (*blocks, model):
        sharding = cast("FSDPModule", module)
        sharding.set_force_sum_reduction_for_comms(True)
        sharding.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(model, "hidden")
    _computes[model] = compute


def blocks_of(model: Glm4v) -> list[nn.Module]:
    """What gathers its weights by itself; the rest does so together."""
    return [*model.visual.blocks, model.visual.merger, *model.language_model.layers]


def embedding_of(model: Glm4v) -> nn.Module | None:
    """The embedding, which gathers its weights for the forward pass alone, where the head has others."""
    return None if model.config.tie_word_embeddings else model.language_model.embed_tokens


def sharded(model: nn.Module) -> bool:
    return model in _computes


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which a model computes."""
    return _computes[model] if model in _computes else next(model.parameters()).dtype


def drop_gathered(model: Glm4v) -> None:
    """Lets go of weights that a pass without a backward one has left gathered: the next step makes them old."""
    if sharded(model):
        cast("FSDPModule", model).reshard()


def sum_over_copies(model: Glm4v, on: bool) -> None:
    """Whether the next backward pass sums gradients up over copies. Where it doesn't, they are kept for one that does:
    all of these passes must run the same parts of the model."""
    if sharded(model) and parallel.copies() > 1:
        cast("FSDPModule", model).set_requires_all_reduce(on)


@contextmanager
def whole(model: Glm4v) -> Iterator[Glm4v]:
    """A plain model with the whole weights, for rollouts; it is the same one where nothing is sharded."""
    if not sharded(model):
        yield model
        return
    plain = Glm4v(model.config, device="meta")
    lora.add_as_in(model, plain)
    kept: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in kept:
            kept[id(parameter)] = nn.Parameter(_gathered(parameter, dtype_of(model)), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, kept[id(parameter)])
    plain.folder, plain.generation_config = model.folder, model.generation_config
    if "processor" in vars(model):
        plain.processor = model.processor
    yield plain.eval()


class Later:
    """Rows of a tensor as they stand on disk, put together from all ranks when they are written: all must ask.

    Args:
        parameter: what lies on the ranks.
        dtype: on disk.
        piece, pieces: which of how many equal parts of the rows.
        gather: gives the whole of the parameter's tensor.
    """

    def __init__(
        self, parameter: Tensor, dtype: torch.dtype, piece: int, pieces: int, gather: Callable[[], Tensor]
    ) -> None:
        self.dtype, self.piece, self.pieces, self.gather = dtype, piece, pieces, gather
        self.shape = torch.Size([parameter.shape[0] // pieces, *parameter.shape[1:]])
        self.nbytes = self.shape.numel() * dtype.itemsize
        self.asked = False

    def cpu(self) -> Tensor:
        self.asked = True
        return self.gather().chunk(self.pieces)[self.piece].cpu()


def write(model: Glm4v, folder: Path) -> None:
    """A sharded model in Hugging Face layout, adapters merged into it, by the first rank: never more than one tensor of
    it is whole."""
    dtype, adapted, later = dtype_of(model), lora.adapted(model), dict[str, Later]()
    for name, parameter in model.named_parameters():
        layer, of_layer, _ = name.partition(".base_layer.weight")
        if ".lora_" in name:
            continue
        gather = partial(lora.merge, adapted[layer]) if of_layer else partial(_gathered, parameter, dtype)
        names = parts(lora.without(name))
        for i, on_disk in enumerate(names):
            later[on_disk] = Later(parameter, dtype, i, len(names), gather)
    failed = None
    if parallel.first():
        try:
            model.save_pretrained(folder, tensors=later)
        except Exception as error:
            failed = error
    for tensor in later.values():
        if not tensor.asked:
            tensor.cpu()
    parallel.on_first(lambda: _raise(failed))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _share_of(parameter: nn.Parameter, rows: Rows, name: str, device: torch.device) -> nn.Parameter:
    assert parallel.lies_apart(parameter)
    if ".lora_" in name:
        local = torch.zeros_like(parameter.to_local(), device=device)
    else:
        start, stop = parallel.rows_of(parameter)
        local = rows(lora.without(name), start, stop).to(device, parameter.dtype, copy=True)
    return nn.Parameter(parallel.like(parameter, local), requires_grad=parameter.requires_grad)


def _gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parallel.plain(parameter.detach().to(dtype))
