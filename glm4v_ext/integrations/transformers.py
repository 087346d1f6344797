"""The ops inside Hugging Face's GLM-4.1V (4.5V, 4.6V, OCR) models, through transformers' public hooks.

`enable()` registers attention and patch mappings, so that models loaded from then on have the ops; `enable(model)`
changes a loaded one, its head included, which is in no tower. Both end in `_install`, which goes through the modules of
such a part by the one table below. A module changes its class, a tower the name of its attention; `disable()` changes
them back.
"""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from . import replacements as ours

FAMILIES = ("glm4v", "glm4v_moe", "glm_ocr")  # glm46v is made of the first two's towers
TOWERS = ("VisionModel", "TextModel")
ATTENTIONS, ROTARY_EMBEDDINGS = ("self_attn", "attn"), ("rotary_emb", "rotary_pos_emb")  # their names in the towers
TEXT_ATTENTION, VISION_ATTENTION = "glm4v_ext", "glm4v_ext_flash"  # "flash" makes the tower hand over cu_seqlens


class Hook(NamedTuple):
    op: str  # the switch
    name: str  # how the names of the classes end
    replacement: Any  # subclass of ours.Replacement


HOOKS = (
    Hook("rms_norm", "RMSNorm", ours.RMSNorm),
    Hook("linear", "Linear", ours.Linear),
    Hook("swiglu", "TextMLP", ours.Mlp),
    Hook("swiglu", "isionMlp", ours.Mlp),
    Hook("swiglu", "VisionPatchMerger", ours.PatchMerger),
    Hook("patch_embed", "VisionPatchEmbed", ours.PatchEmbed),
    Hook("interpolate_pos_embed", "VisionEmbeddings", ours.Embeddings),
    Hook("merge_patches", "Conv2d", ours.Downsample),
    Hook("rope", "VisionRotaryEmbedding", ours.VisionRotaryEmbedding),
    Hook("rope", "VisionAttention", ours.Attention),
    Hook("rope", "TextRotaryEmbedding", ours.TextRotaryEmbedding),
    Hook("rope", "TextAttention", ours.Attention),
)
OPS = ("flash_attn", *dict.fromkeys(hook.op for hook in HOOKS))

_one_at_a_time = threading.Lock()  # threads that load a model each may enable at once
_mapped: dict[str, type[nn.Module]] = {}  # the towers whose patch mappings are ours
_enabled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # towers and heads
# Modules whose forward another library has wrapped while it was ours.
_wrapped_as_ours: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def enable(model: nn.Module | None = None, **ops: bool) -> None:
    """Lets transformers' models compute with the ops.

    Args:
        model: a loaded model, or any module around one; None means every model that `from_pretrained` or `from_config`
            makes from now on, but for a tower that is loaded by itself. The last call decides, for each model and for
            those to come.
        ops: which ones, all True by default: ``flash_attn`` (attention of both towers, images of a batch in one call),
            ``rope``, ``rms_norm``, ``swiglu``, ``linear`` (with ``model`` also its head, ``lm_head``), ``patch_embed``,
            ``interpolate_pos_embed``, ``merge_patches`` (the downsample).

    A model that is loaded after `enable()` with another attention than the default sdpa keeps it; `enable(model)` is
    asked for, and replaces any.

    Raises:
        TypeError: an op is not among them, or is neither True nor False; ``model`` is no module.
        ValueError: there is no GLM tower in ``model``.

    Warns:
        UserWarning: what is left alone, and why: what this version of transformers lacks, or what the ops do not do.
    """
    if unknown := ops.keys() - set(OPS):
        raise TypeError(f"enable: ops must be among {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    for op, switch in ops.items():
        if not isinstance(switch, bool):
            raise TypeError(f"enable: {op} must be True or False, got {switch!r}")
    _check_model("enable", model)
    chosen = frozenset(op for op in OPS if ops.get(op, True))
    parts = [] if model is None else list(_parts_in(model))
    if model is not None and not parts:
        families = ", ".join(FAMILIES)
        raise ValueError(f"enable: model must hold a tower of transformers' {families}, got {type(model).__name__}")
    for kind in {} if model is None else dict.fromkeys(map(type, model.modules())):
        if made_of := next((base for base in kind.__mro__[1:] if _is_tower_class(base)), None):
            reason = f"it is made of {made_of.__name__}, and what it changes is not known"
            warnings.warn(f"glm4v_ext leaves {kind.__name__} alone: {reason}", stacklevel=2)
    with _one_at_a_time:
        register_attention()
        if model is None:
            _unmap_towers()
            _map_towers(chosen)
        for part in parts:
            _restore(part)
            _install(part, chosen)


def disable(model: nn.Module | None = None) -> None:
    """Undoes :func:`enable`: for ``model``, or for every living model, copies too, and for those loaded from now on."""
    _check_model("disable", model)
    with _one_at_a_time:
        if model is None:
            _unmap_towers()
        for part in {*_enabled, *_copied()} if model is None else list(_parts_in(model)):
            _restore(part)


def _copied() -> Iterator[nn.Module]:
    """What is enabled without a call of ours: copies of modules, as peft makes of what it trains whole, and what a
    pickle brings. Nobody tells of them."""
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module):  # isinstance would ask the thing, and some raise then
            continue
        if "_modules" in vars(thing) and (isinstance(thing, ours.Replacement) or "attention_before" in vars(thing)):
            yield thing  # no copy that is still being made


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"{name}: model must be a torch.nn.Module or None, got {type(model).__name__}")


def _parts_in(model: nn.Module) -> Iterator[nn.Module]:
    """The towers, and the head of whatever holds a tower and a head."""
    for module in model.modules():
        if _is_tower(module):
            yield module
        head = dict(module.named_children()).get("lm_head")  # an adapter's, where one is around the linear layer
        if head is not None and any(map(_is_tower, module.modules())):
            yield head


def _is_tower(module: nn.Module) -> bool:
    return _is_tower_class(type(module))


def _is_tower_class(cls: type) -> bool:
    return cls.__name__.endswith(TOWERS) and _family(cls) is not None


def _family(cls: type) -> str | None:
    """The family whose modeling file ``cls`` is from."""
    *_, family, file = ("", *cls.__module__.split("."))
    return family if family in FAMILIES and file == f"modeling_{family}" else None


def _install(part: nn.Module, ops: frozenset[str], loading: bool = False) -> None:
    """Puts ``ops`` into a tower or a head. Of each op's modules in it all change, or none."""
    name = type(part).__name__
    if not _is_tower(part):
        name, ops = "lm_head", ops & {"linear"}
    changes: dict[str, list[tuple[nn.Module, Any]]] = {op: [] for op in ops}
    unfit: dict[str, str] = {}
    if reason := _unserved(part):
        unfit = dict.fromkeys(sorted(ops), reason)
    for module in part.modules():
        stock: Any = type(module)
        if _family(stock) is None and stock not in (nn.Linear, nn.Conv2d):
            continue
        for op, ending, replacement in HOOKS:
            if op in ops and stock.__name__.endswith(ending):
                changes[op].append((module, (replacement, stock)))
                if op not in unfit and (reason := _wrapped(module) or replacement.unfit(module)):
                    unfit[op] = f"{stock.__name__}: {reason}"
    for op, called in ("flash_attn", ATTENTIONS), ("rope", ATTENTIONS + ROTARY_EMBEDDINGS):
        if op in ops and (reason := _of_others(part, called)):
            unfit.setdefault(op, reason)
    _enabled.add(part)
    if "flash_attn" in ops - unfit.keys() and (reason := _change_attention(part, loading)):
        unfit["flash_attn"] = reason
    for op in ops - unfit.keys():
        for module, pair in changes[op]:
            module.__class__ = ours.replacing(*pair)
    for reason in dict.fromkeys(unfit.values()):
        names = ", ".join(op for op in unfit if unfit[op] == reason)
        where = f"{name} of transformers {_version()}"
        warnings.warn(f"glm4v_ext leaves {names} alone in {where}: {reason}", stacklevel=3)


def _restore(part: nn.Module) -> None:
    for module in part.modules():
        if not isinstance(module, ours.Replacement):
            continue
        if "stock" in vars(type(module)):
            if "forward" in vars(module):
                _wrapped_as_ours.add(module)
            stock: Any = type(module).stock
            module.__class__ = stock
        else:  # a class made of ours, as parametrizations and FSDP do: without it what they keep is lost
            name = f"{type(module).__name__}, which another library has made of {type(module).stock.__name__}"
            warnings.warn(f"glm4v_ext leaves {name}, as it is", stacklevel=3)
    _enabled.discard(part)
    if _is_tower(part):
        _restore_attention(part, vars(part).pop("attention_before", None))


def _unserved(part: nn.Module) -> str | None:
    for parameter in part.parameters():
        if parameter.is_floating_point() and parameter.dtype not in ours.DTYPES:
            return f"its weights are {parameter.dtype}"
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            return f"its weights are on {parameter.device}"
    return None


def _of_others(tower: nn.Module, names: tuple[str, ...]) -> str | None:
    """What is called so and not as transformers made it: of it is not known what masks, cosines and sines it takes."""
    for name, module in tower.named_modules():
        made = (cls for cls in map(type, module.modules()) if cls.__name__.endswith(("Attention", "RotaryEmbedding")))
        if name.rpartition(".")[2] in names and not any(_family(cls) and not _changed(cls) for cls in made):
            return f"{name}, a {type(module).__name__}, is not as transformers made it"
    return None


def _version() -> str:
    from transformers import __version__

    return __version__


def _wrapped(module: nn.Module) -> str | None:
    if _changed(type(module)):
        return "another library has changed the forward of its class"
    if "forward" in vars(module) and module not in _wrapped_as_ours:
        return "another library has wrapped its forward; enable() before from_pretrained instead"
    return None


def _changed(cls: type[nn.Module]) -> bool:
    return getattr(cls.forward, "__module__", None) != cls.__module__


# --- attention --------------------------------------------------------------------------------------------------------


def register_attention() -> None:
    """Registers ``attn_implementation="glm4v_ext"`` with transformers, as :func:`enable` does. It changes no model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from .attention import attention, attention_mask

    for name in (TEXT_ATTENTION, VISION_ATTENTION):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, attention_mask)


def _change_attention(tower: Any, loading: bool) -> str | None:
    """Names our attention in the tower's configuration, or says why not."""
    config = tower.config
    if config.attention_dropout:
        return f"attention_dropout is {config.attention_dropout}, not 0"
    if loading and config._attn_implementation not in ("sdpa", TEXT_ATTENTION):
        return f"attn_implementation is {config._attn_implementation!r}, as asked for"
    if type(tower).__name__.endswith("TextModel"):
        tower.attention_before = config._attn_implementation  # where copies of the model have it, too
        config._attn_implementation = TEXT_ATTENTION
    else:
        # A name with "flash" is refused where a model is made from a configuration: the caller's stays as it is.
        tower.attention_before = config
        own = copy.deepcopy(config)
        own._attn_implementation = VISION_ATTENTION
        _give_config(tower, own)
    return None


def _restore_attention(tower: Any, before: Any) -> None:
    name = tower.config._attn_implementation
    if before is not None and not isinstance(before, str):  # its configuration
        _give_config(tower, before)
        if name not in (TEXT_ATTENTION, VISION_ATTENTION):  # chosen since
            before._attn_implementation = name
    elif name in (TEXT_ATTENTION, VISION_ATTENTION):
        tower.config._attn_implementation = before or "sdpa"  # asked for by name, with nothing enabled


def _give_config(tower: Any, config: Any) -> None:
    before = tower.config
    for module in tower.modules():
        if getattr(module, "config", None) is before:
            module.config = config


# --- loading ----------------------------------------------------------------------------------------------------------


def _map_towers(ops: frozenset[str]) -> None:
    try:
        from transformers.monkey_patching import register_patch_mapping

        lacks = _mapping_fails()
    except ImportError:
        lacks = "has no patch mapping"
    if lacks:
        warnings.warn(
            f"glm4v_ext: transformers {_version()} {lacks}: enable(model) after loading. Attention is "
            f"registered, from_pretrained(…, attn_implementation={TEXT_ATTENTION!r}) has it",
            stacklevel=3,
        )
        return
    for family in FAMILIES:
        try:
            file = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ModuleNotFoundError:  # younger than this transformers
            continue
        for name, cls in vars(file).copy().items():
            if isinstance(cls, type) and _family(cls) == family and name.endswith(TOWERS):
                mapped = _self_enabling(cls, ops)
                register_patch_mapping({name: mapped})
                _mapped[name] = mapped


def _mapping_fails() -> str:
    """What ends every `from_pretrained` with a patch mapping, in versions that list the names of modules which they
    import only then, and which need what may not be installed; empty where nothing does."""
    for module in [m for name, m in sys.modules.copy().items() if name.startswith("transformers.")]:
        try:
            "__dir__" in vars(module) and dir(module)
        except Exception as error:  # of a foreign import
            return f"cannot map its classes here ({error})"
    return ""


def _unmap_towers() -> None:
    if not _mapped:
        return
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    registered = get_patch_mapping()  # others may have cleared it
    unregister_patch_mapping([name for name, cls in _mapped.items() if registered.get(name) is cls])
    # A `from_pretrained` that ends in an exception leaves the classes of the mapping in transformers' modules.
    for module in [m for name, m in sys.modules.copy().items() if name.startswith("transformers.")]:
        for name, cls in _mapped.items():
            if vars(module).get(name) is cls:
                setattr(module, name, cls.__base__)
    _mapped.clear()


def _self_enabling(stock: type[nn.Module], ops: frozenset[str]) -> type[nn.Module]:
    """A class that makes a ``stock`` with ``ops`` in it."""

    def make(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self.__class__ = stock
        _install(self, ops, loading=True)

    origin = {"__init__": make, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), origin)
