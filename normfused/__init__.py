"""normfused: BatchNorm and GroupNorm fused with their activation, for PyTorch."""

from . import functional
from .backends import info, use_backend
from .convert import convert, revert
from .distributed import SyncBatchNormAct, convert_sync_batchnorm
from .memory import empty_cache, set_cache_limit
from .modules import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    GroupNormAct,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
    LayerNormAct,
)
from .recompute import checkpoint_policy, recompute_activations
from .version import __version__

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "GroupNormAct",
    "InstanceNormAct1d",
    "InstanceNormAct2d",
    "InstanceNormAct3d",
    "LayerNormAct",
    "SyncBatchNormAct",
    "__version__",
    "checkpoint_policy",
    "convert",
    "convert_sync_batchnorm",
    "empty_cache",
    "functional",
    "info",
    "recompute_activations",
    "revert",
    "set_cache_limit",
    "use_backend",
]
