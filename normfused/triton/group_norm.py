"""normfused_triton::group_norm_act and its backward: check, allocate, launch."""

import torch

from .. import ops
from .checks import check, check_activation, check_input, check_per_channel, dense, like_input, statistics_dtype
from .drivers import run_backward, run_forward
from .plan import Extent


def _check_groups(op, num_groups, x):
    shape = tuple(x.shape)
    check(num_groups > 0, op, lambda: f"num_groups must be positive, got {num_groups}")
    check(x.shape[1] > 0, op, lambda: f"x must have at least one channel, got shape {shape}")
    check(
        x.shape[1] % num_groups == 0,
        op,
        lambda: f"num_groups must divide the channels of x, got {num_groups} for x of shape {shape}",
    )


def _check_statistics(op, argument, t, num_groups, x):
    """mean or rstd as the forward gives it."""
    dtype, shape = statistics_dtype(x), (x.shape[0], num_groups)
    check(
        t.device == x.device and t.dtype == dtype and t.shape == shape and t.is_contiguous(),
        op,
        lambda: f"{argument} must be contiguous {dtype} of shape {shape} on the device of x, {x.device}, "
        f"got {t.dtype} of shape {tuple(t.shape)} on {t.device}",
    )


def _extent(x, num_groups, memory_format):
    n, c = x.shape[:2]
    return Extent(n, 1, c, x.shape[2:].numel(), num_groups, memory_format != torch.contiguous_format)


def group_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "group_norm_act"
    check_activation(op, activation)
    check_input(op, x)
    _check_groups(op, num_groups, x)
    check(
        x.shape[0] != 1 or x.numel() != num_groups,
        op,
        lambda: f"expected more than 1 value per group, got x of shape {tuple(x.shape)} with num_groups {num_groups}",
    )
    check_per_channel(op, "weight", weight, x)
    check_per_channel(op, "bias", bias, x)

    memory_format = ops.group_norm_memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(x, memory_format=memory_format)
    mean = x.new_empty((x.shape[0], num_groups), dtype=statistics_dtype(x))
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        mean.zero_()
        rstd.zero_()
    else:
        extent = _extent(x, num_groups, memory_format)
        run_forward(x, None, dense(weight), dense(bias), y, mean, rstd, extent, eps, activation)
    return y, mean, rstd


def group_norm_act_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "group_norm_act_backward"
    check_activation(op, activation)
    check_input(op, x)
    _check_groups(op, num_groups, x)
    memory_format = ops.group_norm_memory_format(x)
    dy = like_input(op, "dy", dy, x, memory_format)
    check_per_channel(op, "weight", weight, x)
    check_per_channel(op, "bias", bias, x)
    _check_statistics(op, "mean", mean, num_groups, x)
    _check_statistics(op, "rstd", rstd, num_groups, x)

    x = x.contiguous(memory_format=memory_format)
    wide = statistics_dtype(x)
    dx = torch.empty_like(x, memory_format=memory_format) if need_dx else x.new_empty(0)
    dweight = x.new_empty(x.shape[1] if need_dweight else 0, dtype=wide)
    dbias = x.new_empty(x.shape[1] if need_dbias else 0, dtype=wide)
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        run_backward(
            dy,
            x,
            None,
            dense(weight),
            dense(bias),
            mean,
            rstd,
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            _extent(x, num_groups, memory_format),
            True,
            activation,
        )
    return dx, dweight, dbias
