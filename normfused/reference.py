"""The formulas in plain PyTorch: the specification that every backend is tested against, and the double backward.

Everything is computed in the dtype of the arguments (float64 for a specification), 16-bit arguments in float32; every
function is differentiable. An activation is a pair ``forward(z)``, ``backward(z, dz)``; the gradient of a
piecewise-linear one is selected, not multiplied, so that an infinite ``dy`` over its dead region gives 0.
"""

from collections.abc import Callable
from typing import Any

import torch


def _zero_where(dead: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.where(dead, torch.zeros_like(dy), dy)


def _silu_backward(z: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(z)
    return dy * (s * (1 + z * (1 - s)))


def _sigmoid_backward(z: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    # Not s * (1 - s): the difference is 0 where s rounds to 1.
    return dy * (torch.sigmoid(z) * torch.sigmoid(-z))


def _hardswish_backward(z: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    middle = torch.where(z < 3, dy * (z / 3 + 0.5), dy)
    return _zero_where(z <= -3, middle)


FORWARD: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda z: z,
    "relu": lambda z: torch.where(z < 0, torch.zeros_like(z), z),
    "relu6": lambda z: torch.where(z < 0, torch.zeros_like(z), torch.where(z > 6, torch.full_like(z, 6), z)),
    "silu": lambda z: z * torch.sigmoid(z),
    "hardswish": lambda z: z * torch.clamp(z + 3, 0, 6) / 6,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda z: torch.where(z > 0, z, z * 0.01),
}

BACKWARD: dict[str | None, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    None: lambda z, dy: dy,
    "relu": lambda z, dy: _zero_where(z <= 0, dy),
    "relu6": lambda z, dy: _zero_where((z <= 0) | (z >= 6), dy),
    "silu": _silu_backward,
    "hardswish": _hardswish_backward,
    "sigmoid": _sigmoid_backward,
    "leaky_relu": lambda z, dy: torch.where(z <= 0, dy * 0.01, dy),
}


def _wide(*tensors: torch.Tensor | None) -> list[Any]:
    """16-bit floats as float32, None as None."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _rounded(z: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``z`` as it is in an output of ``dtype``: where the output is at a kink, so is the gradient."""
    return z.to(dtype).to(z.dtype)


def _per_channel(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A ``(C,)`` tensor, shaped to broadcast over ``(N, C, *)``."""
    return t.view(-1, *(1,) * (x.dim() - 2))


def _affine(x_hat: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    z = x_hat if weight is None else x_hat * _per_channel(weight, x_hat)
    return z if bias is None else z + _per_channel(bias, x_hat)


def _channel_sum(t: torch.Tensor) -> torch.Tensor:
    return t.sum([0, *range(2, t.dim())])


def batch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of ``(N, C, *)``."""
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims)
    return mean, (x - _per_channel(mean, x)).square().mean(dims)


def running_statistics(
    x: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, momentum: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What training on ``x`` makes of the running statistics: ``(1 - momentum) * running + momentum * batch``."""
    if x.numel() == 0:
        return running_mean, running_var
    n = x.numel() // x.shape[1]
    mean, var = batch_statistics(x)
    return (
        (1 - momentum) * running_mean + momentum * mean,
        (1 - momentum) * running_var + momentum * var * (n / (n - 1)),
    )


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    """``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``."""
    x_hat = (x - _per_channel(mean, x)) * _per_channel((var + eps).rsqrt(), x)
    z = _affine(x_hat, weight, bias)
    return FORWARD[activation](z if residual is None else z + residual)


def batch_norm_act_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    pre_activation: str | None = None,
) -> Any:
    """(dx, dweight, dbias, dresidual) of batch_norm_act; in training the statistics are functions of ``x``.

    dx = weight * invstd * (dz - mean(dz) - x_hat * mean(dz * x_hat)), without the two means in evaluation; where
    ``pre_activation(x)`` was normalised, this is its gradient, and goes on to ``x``.
    """
    dtypes = [None if t is None else t.dtype for t in (x, weight, bias, residual)]
    dy, x, weight, bias, residual, mean, invstd = _wide(dy, x, weight, bias, residual, mean, invstd)
    input, x = x, _rounded(FORWARD[pre_activation](x), dtypes[0])
    if training and x.numel() > 0:
        mean, var = batch_statistics(x)
        invstd = (var + eps).rsqrt()
    x_hat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
    z = _affine(x_hat, weight, bias)
    dz = BACKWARD[activation](_rounded(z if residual is None else z + residual, dtypes[0]), dy)
    dweight, dbias = _channel_sum(dz * x_hat), _channel_sum(dz)
    scale = invstd if weight is None else invstd * weight
    if training:
        n = max(x.numel() // max(x.shape[1], 1), 1)
        dx = dz - _per_channel(dbias / n, x) - x_hat * _per_channel(dweight / n, x)
    else:
        dx = dz
    dx = BACKWARD[pre_activation](input, dx * _per_channel(scale, x))
    grads = [dx, dweight, dbias, dz]
    return tuple(grad if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def group_statistics(x: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each group, ``(N, num_groups)``."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(2)
    return mean, (groups - mean.unsqueeze(2)).square().mean(2)


def _per_group(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """An ``(N, G)`` tensor, repeated to broadcast over ``(N, C, *)``."""
    channels = x.shape[1] // t.shape[1]
    return t.repeat_interleave(channels, 1).view(*x.shape[:2], *(1,) * (x.dim() - 2))


def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    """``activation((x - mean) / sqrt(var + eps) * weight + bias)`` with the statistics of each group."""
    mean, var = group_statistics(x, num_groups)
    x_hat = (x - _per_group(mean, x)) * _per_group((var + eps).rsqrt(), x)
    return FORWARD[activation](_affine(x_hat, weight, bias))


def group_norm_act_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
) -> Any:
    """(dx, dweight, dbias) of group_norm_act.

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) with g = dz * weight and the means over a group.
    """
    dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    dy, x, weight, bias = _wide(dy, x, weight, bias)
    mean, var = group_statistics(x, num_groups)
    rstd = _per_group((var + eps).rsqrt(), x)
    x_hat = (x - _per_group(mean, x)) * rstd
    dz = BACKWARD[activation](_rounded(_affine(x_hat, weight, bias), dtypes[0]), dy)
    g = dz if weight is None else dz * _per_channel(weight, x)

    def group_mean(t: torch.Tensor) -> torch.Tensor:
        return _per_group(t.reshape(t.shape[0], num_groups, -1).mean(2), t)

    grads = [
        rstd * (g - group_mean(g) - x_hat * group_mean(g * x_hat)),
        _channel_sum(dz * x_hat),
        _channel_sum(dz),
    ]
    return tuple(grad if dtype is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
