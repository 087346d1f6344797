"""What takes the place of transformers' modules: the same parameters and signature, with `forward` through the ops.

A replacement is mixed into the class whose place it takes (see `replacing`), and a module changes its class alone: its
parameters, buffers, hooks and names stay, so that checkpoints, adapters and optimizers notice nothing.
Dims: T tokens, P patches, C width, F inner width.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.interpolate_pos_embed import interpolate_pos_embed
from ..ops.linear import linear
from ..ops.merge_patches import merge_patches
from ..ops.patch_embed import patch_embed
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu
from . import rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether an op takes them: plain tensors of one dtype (quantised weights are not, nor adapters' fp32 norms)."""
    given = [w for w in weights if w is not None]
    if not all(type(w) in (Tensor, nn.Parameter) for w in given):
        return False
    if x.dtype in DTYPES and all(w.dtype == x.dtype for w in given):
        return True
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)  # meta knows no autocast


def unseen(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether nobody notices that ``module`` is not called: it has no hooks, its forward is not wrapped (as accelerate
    does, to fetch weights), and it is of a known kind where some are given (an adapter that wraps it later is not)."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and (not kinds or type(module) in kinds)


class Replacement(nn.Module):
    """A module whose `forward` goes through the ops."""

    stock: type[nn.Module]  # the class whose place it takes

    if TYPE_CHECKING:  # its attributes are the other's

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        """Why ``module``, of a class that this one replaces, keeps its own forward; None if it need not."""
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of a replacement is made at run time: pickled is what it is made of.
        state: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[0], type(self).stock), *state[2:]


@functools.cache
def replacing(replacement: Any, stock: Any) -> Any:
    """The class that takes the place of ``stock``, by the same name."""
    origin = {"stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    cls: Any = type(stock.__name__, (replacement, stock), origin)
    ours, theirs = cls.forward, stock.forward

    @functools.wraps(ours)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Who wraps a module's forward, as accelerate does, keeps this one, also when the module is stock again. Who
        # changes that of the class, as verl does, means the modules that there are, too.
        serves = isinstance(self, Replacement) and stock.forward is theirs
        return (ours if serves else stock.forward)(self, *args, **kwargs)

    cls.forward = forward
    return cls


def _blank(replacement: Any, stock: Any) -> Replacement:
    from .transformers import register_attention  # a process that only loads has none, and configurations name it

    register_attention()
    cls = replacing(replacement, stock)
    return cls.__new__(cls)


class RMSNorm(Replacement):
    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., C]
        if not served(hidden_states, self.weight):
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Linear(Replacement):
    def forward(self, input: Tensor) -> Tensor:  # [..., C_in] -> [..., C_out]
        if not served(input, self.weight, self.bias):
            return super().forward(input)
        return linear(input, self.weight, self.bias)


class Mlp(Replacement):
    """``down(silu(gate(x)) * up(x))``. Without gradients, many rows go through in groups: see `glm4v.layers.Mlp`."""

    group, group_on_gpu = 1536, 16384  # rows

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
            return None
        return f"its activation is {type(activation).__name__}, not SiLU"

    def forward(self, hidden_state: Tensor) -> Tensor:  # [..., T, C]
        groups = hidden_state.shape[-2] // (self.group if hidden_state.is_cpu else self.group_on_gpu)
        if (
            groups < 2
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not all(map(unseen, self.children()))
        ):
            return self.gated(hidden_state)
        return torch.cat([self.gated(part) for part in hidden_state.tensor_split(groups, dim=-2)], dim=-2)

    def gated(self, x: Tensor) -> Tensor:
        activation = getattr(self, "act_fn", None) or self.activation_fn
        if hasattr(self, "gate_up_proj"):
            gate_up = self.gate_up_proj(x)
            if unseen(activation):
                return self.down_proj(swiglu(gate_up))
            gate, up = gate_up.chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
            if torch.is_grad_enabled() and unseen(activation):
                return self.down_proj(swiglu(torch.cat((gate, up), -1)))
        return self.down_proj(activation(gate) * up)


class PatchMerger(Mlp):
    def gated(self, x: Tensor) -> Tensor:  # [P / 4, C]
        return super().gated(self.act1(self.post_projection_norm(self.proj(x))))


class PatchEmbed(Replacement):
    @classmethod
    def unfit(cls, module: Any) -> str | None:
        proj = module.proj
        if (
            isinstance(proj, nn.Conv3d)
            and proj.kernel_size == proj.stride
            and proj.in_channels == 3
            and proj.bias is not None
        ):
            return None
        return f"its projection is {proj}"

    def forward(self, hidden_states: Tensor) -> Tensor:  # [P, 3 * F * h * w] -> [P, C]
        weight, bias = self.proj.weight, self.proj.bias
        patches = hidden_states.to(weight.dtype).view(-1, weight[0].numel())
        if not unseen(self.proj, nn.Conv3d) or not served(patches, weight, bias):
            return super().forward(hidden_states)
        return patch_embed(patches, weight, bias)


class Embeddings(Replacement):
    @classmethod
    def unfit(cls, module: Any) -> str | None:
        if getattr(module, "interpolated_method", "bicubic") != "bicubic":
            return "it does not interpolate bicubically"
        if module.config.spatial_merge_size != 2:
            return f"spatial_merge_size is {module.config.spatial_merge_size}, not 2"
        return None

    def forward(self, embeddings: Tensor, lengths: Any, image_shapes: Tensor, h_coords: Any, w_coords: Any) -> Tensor:
        table = self.position_embedding.weight
        if not served(embeddings, table):
            return super().forward(embeddings, lengths, image_shapes, h_coords, w_coords)
        return interpolate_pos_embed(embeddings, table, image_shapes.to(embeddings.device))


class Downsample(Replacement):
    @classmethod
    def unfit(cls, module: Any) -> str | None:
        twos = module.kernel_size == module.stride == (2, 2) and module.padding == (0, 0) and module.groups == 1
        return None if twos and module.bias is not None else f"it is {module}"

    def forward(self, input: Tensor) -> Tensor:  # [P / 4, C, 2, 2], a view of patches block by block
        # An adapter makes its own convolutions of this class, without bias.
        if self.bias is None or not served(input, self.weight, self.bias) or input.shape[2:] != (2, 2):
            return super().forward(input)
        return merge_patches(input.permute(0, 2, 3, 1).flatten(0, 2), self.weight, self.bias)[:, :, None, None]


# --- rotary: positions travel where the tables did, and the attention's own forward turns q and k by them -------------


class RotaryEmbedding(Replacement):
    """Hands on ``(position_ids, settings)`` in place of ``(cos, sin)``."""

    kind = "default"

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        if "position_ids" not in inspect.signature(module.forward).parameters:
            return "its forward takes no position_ids"
        if module.rope_type != cls.kind or module.attention_scaling != 1:
            return f"rope_type is {module.rope_type!r}"
        count, theta = len(module.inv_freq), module.config.rope_parameters["rope_theta"]
        if not module.inv_freq.is_meta:  # those of a model that is being loaded come later
            powers = theta ** -(torch.arange(count, dtype=torch.float64, device="cpu") / count)
            if not torch.allclose(module.inv_freq.double().cpu(), powers, rtol=1e-2, atol=1e-5):  # 16 bits of them fit
                return f"its inv_freq is not that of rope_theta {theta}"
        return None

    def settings(self) -> rotary.Rotary:
        return rotary.Rotary(self.config.rope_parameters["rope_theta"])

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, rotary.Rotary]:
        if not served(x):
            raise RuntimeError(f"enable: the model has become {x.dtype}: enable(model) again leaves it alone")
        return position_ids.to(x.device), self.settings()


class VisionRotaryEmbedding(RotaryEmbedding):
    kind = "axial"


class TextRotaryEmbedding(RotaryEmbedding):
    interleaved: ClassVar[bool]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.interleaved = pairs_are_adjacent(sys.modules[cls.stock.__module__])

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        if reason := super().unfit(module):
            return reason
        sections = getattr(module, "mrope_section", None)
        return None if sections and len(sections) == 3 else f"its mrope_section is {sections}"

    def settings(self) -> rotary.Rotary:
        theta = self.config.rope_parameters["rope_theta"]
        return rotary.Rotary(theta, tuple(self.mrope_section), 2 * self.inv_freq.shape[0], self.interleaved)


class Attention(Replacement):
    """The attention's own forward, in which `apply_rotary_pos_emb` means ours."""

    turns: ClassVar = {name: getattr(rotary, name) for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.forward = rebound(cls.stock.forward, cls.turns)  # type: ignore[method-assign]

    @classmethod
    def unfit(cls, module: Any) -> str | None:
        if cls.turns.keys() & set(inspect.unwrap(type(module).forward).__code__.co_names):
            return None
        return f"its forward calls none of {', '.join(cls.turns)}"


def rebound(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """``function`` with some global names meaning something else; its module keeps its own."""
    inner = inspect.unwrap(function)
    scope = {**inner.__globals__, **names}
    del scope["__name__"]  # torch.compile would look names up in the module of that name
    copy = types.FunctionType(inner.__code__, scope, inner.__name__, inner.__defaults__, inner.__closure__)
    return functools.wraps(inner)(copy)


def pairs_are_adjacent(modeling: types.ModuleType) -> bool:
    """Whether a modeling file turns dims 2i and 2i + 1 together, or i and i + D/2: asked of its own function."""
    with torch.device("cpu"):  # `from_pretrained` builds models on meta, which has no values to ask for
        q = torch.arange(4.0).view(1, 1, 1, 4)
        turned, _ = modeling.apply_rotary_pos_emb(q, q, torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    return bool(turned[0, 0, 0, 0] == -1)
