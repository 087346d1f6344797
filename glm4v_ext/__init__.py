"""Kernels of GLM-4.1V for torch: loads the native library and re-exports the public functions."""

from . import integrations as integrations
from ._version import __version__
from .build import build_info
from .ops.add_rms_norm import add_rms_norm
from .ops.flash_attn_varlen import flash_attn_func, flash_attn_varlen_func
from .ops.flash_attn_with_kvcache import flash_attn_with_kvcache
from .ops.interpolate_pos_embed import interpolate_pos_embed
from .ops.linear import linear
from .ops.merge_patches import merge_patches
from .ops.patch_embed import patch_embed
from .ops.patchify import patchify
from .ops.rms_norm import rms_norm
from .ops.rms_norm_add import rms_norm_add
from .ops.rope_2d import rope_2d, rope_2d_
from .ops.rope_3d import rope_3d, rope_3d_
from .ops.swiglu import swiglu
from .ops.token_logprob import token_logprob
from .replay import Replayed

__all__ = [
    "Replayed",
    "__version__",
    "add_rms_norm",
    "build_info",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "interpolate_pos_embed",
    "linear",
    "merge_patches",
    "patch_embed",
    "patchify",
    "rms_norm",
    "rms_norm_add",
    "rope_2d",
    "rope_2d_",
    "rope_3d",
    "rope_3d_",
    "swiglu",
    "token_logprob",
]
