"""Kernels of GLM-4.1V for torch: loads the native library and re-exports the public functions."""

from ._version import __version__
from .build import build_info
from .ops.flash_attn_with_kvcache import flash_attn_with_kvcache
from .ops.rms_norm import rms_norm

__all__ = ["__version__", "build_info", "flash_attn_with_kvcache", "rms_norm"]
