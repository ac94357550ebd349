"""normfused_triton::batch_norm_act and its backward: check, allocate, launch."""

import torch

from .. import ops
from .checks import check, check_activation, check_input, check_per_channel, dense, like_input, statistics_dtype
from .drivers import run_backward, run_evaluation, run_forward
from .plan import Extent


def _count_batch(op, num_batches_tracked, x):
    if num_batches_tracked is None:
        return
    t = num_batches_tracked
    check(
        t.device == x.device and t.dtype == torch.int64 and t.numel() == 1,
        op,
        lambda: f"num_batches_tracked must be one int64 on the device of x, {x.device}, "
        f"got {t.dtype} of shape {tuple(t.shape)} on {t.device}",
    )
    num_batches_tracked.add_(1)


def _check_written(op, argument, t):
    """Running statistics are written in place: every channel needs a place of its own."""
    check(
        t is None or t.dim() != 1 or t.shape[0] <= 1 or t.stride(0) != 0,
        op,
        lambda: f"{argument} is written in place and must not be expanded",
    )


def _check_disjoint(op, running_mean, running_var):
    """Both are written, channel by channel: a place that they share would hold whichever came last."""
    # What torch.compile traces with has no addresses.
    traced = type(running_mean) is not torch.Tensor or running_mean.is_meta or torch._is_functional_tensor(running_mean)
    if running_mean is None or traced or running_mean.numel() == 0:
        return
    stride = running_mean.stride(-1) * running_mean.element_size() if running_mean.dim() == 1 else 0
    distance = running_var.data_ptr() - running_mean.data_ptr()
    same_strides = stride > 0 and running_var.stride() == running_mean.stride() and distance % stride == 0
    check(
        distance != 0 and not (same_strides and abs(distance // stride) < running_mean.numel()),
        op,
        lambda: "running_mean and running_var are written in place and must not overlap",
    )


def _extent(x, memory_format):
    n, c = x.shape[:2]
    s = x.shape[2:].numel()
    return Extent(1, n, c, s, c, memory_format != torch.contiguous_format)


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    pre_activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "batch_norm_act"
    if training:
        # First, as in torch.nn.BatchNorm: a batch is counted even if something is wrong with it.
        _count_batch(op, num_batches_tracked, x)
    check_activation(op, activation)
    check_activation(op, pre_activation, "pre_activation")
    check_input(op, x)
    shape = tuple(x.shape)
    channels = x.shape[1]
    check(channels > 0, op, lambda: f"x must have at least one channel, got shape {shape}")
    if training:
        check(
            x.numel() != channels,
            op,
            lambda: f"expected more than 1 value per channel when training, got x of shape {shape}",
        )
        check(eps > 0, op, lambda: f"eps must be positive when training, got {eps}")
        check(
            (running_mean is None) == (running_var is None),
            op,
            lambda: "running_mean and running_var must both be given or both be None",
        )
        _check_written(op, "running_mean", running_mean)
        _check_written(op, "running_var", running_var)
        _check_disjoint(op, running_mean, running_var)
    else:
        check(eps >= 0, op, lambda: f"eps must not be negative, got {eps}")
        check(running_mean is not None, op, lambda: "running_mean must be given in evaluation")
        check(running_var is not None, op, lambda: "running_var must be given in evaluation")
    for argument, t in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        check_per_channel(op, argument, t, x)
    memory_format = ops.batch_norm_memory_format(x)
    if residual is not None:
        residual = like_input(op, "residual", residual, x, memory_format)

    x = x.contiguous(memory_format=memory_format)
    y = torch.empty_like(x, memory_format=memory_format)
    mean = x.new_empty(channels, dtype=statistics_dtype(x))
    invstd = torch.empty_like(mean)
    weight, bias = dense(weight), dense(bias)
    extent = _extent(x, memory_format)
    if not training:
        run_evaluation(
            x,
            residual,
            weight,
            bias,
            dense(running_mean),
            dense(running_var),
            y,
            mean,
            invstd,
            extent,
            eps,
            activation,
            pre_activation,
        )
    elif x.numel() == 0:
        mean.zero_()
        invstd.zero_()
    else:
        running = None
        if running_mean is not None:
            counter = num_batches_tracked if momentum is None else None
            running = dense(running_mean), dense(running_var), counter, momentum or 0.0
        run_forward(x, residual, weight, bias, y, mean, invstd, extent, eps, activation, running, pre_activation)
        if running is not None:
            for statistic, written in ((running_mean, running[0]), (running_var, running[1])):
                if statistic is not None and written is not statistic:
                    statistic.copy_(written)
    return y, mean, invstd


def batch_norm_act_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    training: bool,
    activation: str | None,
    pre_activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dresidual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "batch_norm_act_backward"
    check_activation(op, activation)
    check_activation(op, pre_activation, "pre_activation")
    check_input(op, x)
    check(
        residual is not None or not need_dresidual,
        op,
        lambda: "need_dresidual asks for the gradient of residual, which is None",
    )
    memory_format = ops.batch_norm_memory_format(x)
    dy = like_input(op, "dy", dy, x, memory_format)
    for argument, t in (("weight", weight), ("bias", bias), ("mean", mean), ("invstd", invstd)):
        check_per_channel(op, argument, t, x)
    if residual is not None:
        residual = like_input(op, "residual", residual, x, memory_format)

    x = x.contiguous(memory_format=memory_format)
    wide = statistics_dtype(x)
    channels = x.shape[1]
    dx = torch.empty_like(x, memory_format=memory_format) if need_dx else x.new_empty(0)
    dweight = x.new_empty(channels if need_dweight else 0, dtype=wide)
    dbias = x.new_empty(channels if need_dbias else 0, dtype=wide)
    dresidual = torch.empty_like(x, memory_format=memory_format) if need_dresidual else x.new_empty(0)
    if x.numel() == 0:
        dweight.zero_()
        dbias.zero_()
    else:
        run_backward(
            dy,
            x,
            residual,
            dense(weight),
            dense(bias),
            dense(mean.to(wide)),
            dense(invstd.to(wide)),
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dresidual if need_dresidual else None,
            _extent(x, memory_format),
            training,
            activation,
            pre_activation,
        )
    return dx, dweight, dbias, dresidual
