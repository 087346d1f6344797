"""Kernels of GLM-4.1V for torch: loads the native library and re-exports the public functions."""

from ._version import __version__
from .build import build_info
from .ops.add_rms_norm import add_rms_norm
from .ops.flash_attn_varlen import flash_attn_func, flash_attn_varlen_func
from .ops.linear import linear
from .ops.merge_patches import merge_patches
from .ops.patch_embed import patch_embed
from .ops.rms_norm import rms_norm
from .ops.rms_norm_add import rms_norm_add
from .ops.swiglu import swiglu

__all__ = [
    "__version__",
    "add_rms_norm",
    "build_info",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "linear",
    "merge_patches",
    "patch_embed",
    "rms_norm",
    "rms_norm_add",
    "swiglu",
]
