"""Kernels of GLM-4.1V for torch: loads the native library and re-exports the public functions."""

from ._version import __version__
from .build import build_info
from .ops.rms_norm import rms_norm
from .ops.rope_2d import rope_2d, rope_2d_
from .ops.rope_3d import rope_3d, rope_3d_

__all__ = ["__version__", "build_info", "rms_norm", "rope_2d", "rope_2d_", "rope_3d", "rope_3d_"]
