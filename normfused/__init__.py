"""normfused: BatchNorm and GroupNorm fused with their activation, for PyTorch."""

from . import functional
from .backends import info, use_backend
from .convert import convert, revert
from .memory import empty_cache, set_cache_limit
from .modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from .version import __version__

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "GroupNormAct",
    "__version__",
    "convert",
    "empty_cache",
    "functional",
    "info",
    "revert",
    "set_cache_limit",
    "use_backend",
]
