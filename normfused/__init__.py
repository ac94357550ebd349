"""normfused: BatchNorm and GroupNorm fused with their activation, for PyTorch."""

from . import functional
from .backends import info, use_backend
from .convert import convert, revert
from .modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from .version import __version__

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "GroupNormAct",
    "__version__",
    "convert",
    "functional",
    "info",
    "revert",
    "use_backend",
]
