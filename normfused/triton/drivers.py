"""Both families from an Extent to the launches that fill the outputs; called for non-empty inputs only."""

import torch

from .launch import groups, halves, on_device, programs, tiles, wrap_triton
from .plan import APPLY_TILES, FINISH_COLUMNS, FINISH_ROWS, divide_up, plan
from .stages import (
    apply_kernel,
    backward_apply_kernel,
    backward_finish_kernel,
    backward_kernel,
    backward_reduce_kernel,
    forward_kernel,
    parameter_gradients_kernel,
    stats_finish_kernel,
    stats_kernel,
)


def _partials(x, extent, plan, count):
    """Memory for ``count`` sums of every channel, sample and split, and the distance from one sum to the next."""
    stride = extent.B * plan.splits * extent.C
    return torch.empty(count * stride, dtype=torch.float64, device=x.device), stride


def _finish_grid(extent):
    return (extent.B * divide_up(extent.G, FINISH_COLUMNS),)


@on_device
def run_forward(x, residual, weight, bias, y, mean, rstd, extent, eps, activation, running=None, pre_activation=None):
    """Statistics of the batch, then y.

    ``running``: None or (running_mean, running_var, num_batches_tracked, momentum), all to be moved; a counter that is
    not None gives the momentum, 1 / num_batches_tracked.
    """
    p = plan(extent)
    running_mean, running_var, num_batches_tracked, momentum = running or (None, None, None, 0.0)
    statistics = {
        "saved_mean": mean,
        "saved_rstd": rstd,
        "running_mean": running_mean,
        "running_var": running_var,
        "num_batches_tracked": num_batches_tracked,
        **halves("momentum", momentum),
        **halves("eps", eps),
    }
    if p.fused:
        wrap_triton(forward_kernel)[programs(extent, p)](
            x=x,
            residual=residual,
            weight=weight,
            bias=bias,
            y=y,
            **statistics,
            **tiles(extent, p),
            **groups(extent),
            GROUPED=bool(extent.G != extent.C),
            ACTIVATION=activation,
            PRE_ACTIVATION=pre_activation,
        )
        return
    partial, stride = _partials(x, extent, p, 3)
    wrap_triton(stats_kernel)[programs(extent, p)](
        x=x, partial=partial, stride=stride, **tiles(extent, p), PRE_ACTIVATION=pre_activation
    )
    wrap_triton(stats_finish_kernel)[_finish_grid(extent)](
        partial=partial,
        stride=stride,
        **statistics,
        **groups(extent),
        C=extent.C,
        splits=p.splits,
        BLOCK_J=FINISH_ROWS,
        BLOCK_G=FINISH_COLUMNS,
    )
    _apply(x, residual, weight, bias, mean, rstd, None, None, y, extent, p, eps, activation, pre_activation)


@on_device
def run_evaluation(
    x, residual, weight, bias, running_mean, running_var, y, mean, invstd, extent, eps, activation, pre_activation
):
    """y with the running statistics, of which ``mean`` and ``invstd`` are made."""
    _apply(
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        mean,
        invstd,
        y,
        extent,
        plan(extent),
        eps,
        activation,
        pre_activation,
    )


def _apply(
    x, residual, weight, bias, mean, rstd, saved_mean, saved_rstd, y, extent, p, eps, activation, pre_activation
):
    p = p.divided(APPLY_TILES)
    wrap_triton(apply_kernel)[programs(extent, p)](
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        mean=mean,
        rstd=rstd,
        saved_mean=saved_mean,
        saved_rstd=saved_rstd,
        y=y,
        **halves("eps", eps),
        **tiles(extent, p),
        **groups(extent),
        ACTIVATION=activation,
        PRE_ACTIVATION=pre_activation,
    )


@on_device
def run_backward(
    dy,
    x,
    residual,
    weight,
    bias,
    mean,
    rstd,
    dx,
    dweight,
    dbias,
    dresidual,
    extent,
    statistics,
    activation,
    pre_activation=None,
):
    """The gradients that are not None. ``statistics``: mean and rstd are functions of x."""
    p = plan(extent)
    grouped = bool(extent.G != extent.C)
    values = extent.N * extent.S * (extent.C // extent.G)
    # The sums of a channel over several samples are added in a launch of their own.
    several = extent.B > 1 or grouped
    reduces = dweight is not None or dbias is not None or (statistics and dx is not None)
    operands = {"x": x, "dy": dy, "residual": residual, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    if p.fused and reduces:
        wants = several and (dweight is not None or dbias is not None)
        partial, stride = _partials(x, extent, p, 2) if wants else (None, 0)
        wrap_triton(backward_kernel)[programs(extent, p)](
            **operands,
            partial=partial,
            stride=stride,
            dweight=None if several else dweight,
            dbias=None if several else dbias,
            dx=dx,
            dresidual=dresidual,
            values=values,
            **tiles(extent, p),
            **groups(extent),
            GROUPED=grouped,
            STATISTICS=statistics,
            ACTIVATION=activation,
            PRE_ACTIVATION=pre_activation,
        )
        if wants:
            _parameter_gradients(partial, stride, rstd, dweight, dbias, extent, p)
        return
    offset = slope = None
    if reduces:
        partial, stride = _partials(x, extent, p, 2)
        wrap_triton(backward_reduce_kernel)[programs(extent, p)](
            **operands,
            partial=partial,
            stride=stride,
            **tiles(extent, p),
            **groups(extent),
            ACTIVATION=activation,
            PRE_ACTIVATION=pre_activation,
        )
        if several and (dweight is not None or dbias is not None):
            _parameter_gradients(partial, stride, rstd, dweight, dbias, extent, p)
        if statistics and dx is not None:
            offset, slope = torch.empty_like(rstd), torch.empty_like(rstd)
        if offset is not None or not several:
            wrap_triton(backward_finish_kernel)[_finish_grid(extent)](
                partial=partial,
                stride=stride,
                weight=weight,
                rstd=rstd,
                offset_out=offset,
                slope_out=slope,
                dweight=None if several else dweight,
                dbias=None if several else dbias,
                values=values,
                **groups(extent),
                C=extent.C,
                splits=p.splits,
                GROUPED=grouped,
                BLOCK_J=FINISH_ROWS,
                BLOCK_G=FINISH_COLUMNS,
            )
    if dx is not None or dresidual is not None:
        p = p.divided(APPLY_TILES)
        wrap_triton(backward_apply_kernel)[programs(extent, p)](
            **operands,
            minus=offset,
            slope=slope,
            dx=dx,
            dresidual=dresidual,
            **tiles(extent, p),
            **groups(extent),
            GROUPED=grouped,
            STATISTICS=statistics,
            ACTIVATION=activation,
            PRE_ACTIVATION=pre_activation,
        )


def _parameter_gradients(partial, stride, rstd, dweight, dbias, extent, p):
    wrap_triton(parameter_gradients_kernel)[(divide_up(extent.C, FINISH_COLUMNS),)](
        partial=partial,
        stride=stride,
        rstd=rstd,
        dweight=dweight,
        dbias=dbias,
        B=extent.B,
        C=extent.C,
        **groups(extent),
        splits=p.splits,
        BLOCK_J=FINISH_ROWS,
        BLOCK_C=FINISH_COLUMNS,
    )
