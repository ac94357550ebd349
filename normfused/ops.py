"""Typed access to the operators in torch.ops.normfused, and their fake (meta) kernels.

LOADED says whether the C++ core is there; WHY_NOT says in a sentence why it is not; BUILD holds the build information.
"""

from pathlib import Path

import torch
from torch._prims_common import suggest_memory_format

LOADED = False
WHY_NOT: str | None = None
BUILD: dict = {}


def _load():
    """Load the operator library; returns why it could not be loaded, or None."""
    try:
        from . import _C
    except ImportError:
        cure = "install a C++ compiler (Debian: apt-get install g++) and reinstall normfused"
        return f"the C++ core is not built; {cure}"
    BUILD.update(_C.build_info())
    (library,) = Path(_C.__file__).parent.glob("_cpu*.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the C++ core does not load under torch {torch.__version__} (it needs torch >= 2.10): {error}"
    return None


WHY_NOT = _load()
LOADED = WHY_NOT is None

if LOADED:
    batch_norm_act = torch.ops.normfused.batch_norm_act.default
    batch_norm_act_backward = torch.ops.normfused.batch_norm_act_backward.default
    group_norm_act = torch.ops.normfused.group_norm_act.default
    group_norm_act_backward = torch.ops.normfused.group_norm_act_backward.default

    BUILD["instruction_set"] = torch.ops.normfused.cpu_instruction_set()

    def _check_devices(x, *others):
        for t in others:
            torch._check(
                t is None or t.device == x.device,
                lambda t=t: f"normfused: all tensors must be on one device, got {x.device} and {t.device}",
            )

    def _group_norm_empty_like(x):
        return torch.empty_like(x, memory_format=suggest_memory_format(x))

    def _batch_norm_empty_like(x):
        # As in PyTorch's own batch_norm, what is dense in both memory formats counts as contiguous.
        if x.is_contiguous():
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        return _group_norm_empty_like(x)

    def _statistics_dtype(x):
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    @torch.library.register_fake("normfused::batch_norm_act")
    def _(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        activation,
        pre_activation,
    ):
        _check_devices(x, weight, bias, residual, running_mean, running_var, num_batches_tracked)
        mean = x.new_empty(x.shape[1], dtype=_statistics_dtype(x))
        return _batch_norm_empty_like(x), mean, torch.empty_like(mean)

    @torch.library.register_fake("normfused::batch_norm_act_backward")
    def _(
        dy,
        x,
        weight,
        bias,
        residual,
        mean,
        invstd,
        training,
        activation,
        pre_activation,
        need_dx,
        need_dweight,
        need_dbias,
        need_dresidual,
    ):
        _check_devices(x, dy, weight, bias, residual, mean, invstd)
        return (
            _batch_norm_empty_like(x) if need_dx else x.new_empty(0),
            mean.new_empty(x.shape[1]) if need_dweight else mean.new_empty(0),
            mean.new_empty(x.shape[1]) if need_dbias else mean.new_empty(0),
            _batch_norm_empty_like(x) if need_dresidual else x.new_empty(0),
        )

    @torch.library.register_fake("normfused::group_norm_act")
    def _(x, weight, bias, num_groups, eps, activation):
        _check_devices(x, weight, bias)
        mean = x.new_empty((x.shape[0], num_groups), dtype=_statistics_dtype(x))
        return _group_norm_empty_like(x), mean, torch.empty_like(mean)

    @torch.library.register_fake("normfused::group_norm_act_backward")
    def _(dy, x, weight, bias, mean, rstd, num_groups, activation, need_dx, need_dweight, need_dbias):
        _check_devices(x, dy, weight, bias, mean, rstd)
        return (
            _group_norm_empty_like(x) if need_dx else x.new_empty(0),
            mean.new_empty(x.shape[1]) if need_dweight else mean.new_empty(0),
            mean.new_empty(x.shape[1]) if need_dbias else mean.new_empty(0),
        )
