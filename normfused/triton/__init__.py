"""The operators in Triton, torch.ops.normfused_triton.*, with the schemas and the fake kernels of ops.py.

Imported when a tensor is first served by Triton: importing normfused does not import triton.
"""

from typing import Any

import torch

from .. import ops
from . import batch_norm, group_norm
from .launch import INTERPRETED


def fuses_pre_activation(
    device_type: str, pre_activation: str, activation: str | None, residual: torch.Tensor | None
) -> bool:
    """Whether the kernels apply ``pre_activation``: wherever Triton runs, the interpreter's CPU among it."""
    return device_type in ("cuda", "xpu", "cpu")


def _register(function, fake, mutates_args=()):
    """Register an operator; torch.compile sees the kernels inside of it, unless they are interpreted."""
    name = f"normfused_triton::{function.__name__}"
    register: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    register(name, function, mutates_args=mutates_args).register_fake(fake)
    return getattr(torch.ops.normfused_triton, function.__name__).default


batch_norm_act = _register(
    batch_norm.batch_norm_act,
    ops.fake_batch_norm_act,
    ("running_mean", "running_var", "num_batches_tracked"),
)
batch_norm_act_backward = _register(batch_norm.batch_norm_act_backward, ops.fake_batch_norm_act_backward)
group_norm_act = _register(group_norm.group_norm_act, ops.fake_group_norm_act)
group_norm_act_backward = _register(group_norm.group_norm_act_backward, ops.fake_group_norm_act_backward)
