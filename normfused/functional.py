"""Functional forms of the fused layers, with the arguments of torch.nn.functional."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import backends, native, ops, recompute
from .autograd import (
    BatchNormActFunction,
    GroupNormActFunction,
    batch_norm_act_eager,
    group_norm_act_eager,
)

_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def batch_norm_act(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = "relu6",
    residual: torch.Tensor | None = None,
    pre_activation: str | None = None,
) -> torch.Tensor:
    """Batch normalisation, an optional residual and an activation in one operator.

    Computes ``activation(z)`` with ``z = (x - mean) / sqrt(var + eps) * weight + bias + residual``
    (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167), where ``x`` is ``pre_activation(input)``.

    Args:
        input: ``(N, C, *)``; float32, float64, float16 or bfloat16; contiguous and channels_last are read as they are.
        running_mean, running_var: ``(C,)`` or None; updated in place when ``training``, used when not.
        weight, bias: ``(C,)`` or None, of ``input``'s dtype, or float32 for a 16-bit ``input``.
        training: normalise with the statistics of this batch.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance, positive when ``training``.
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.
        residual: added before the activation; shape and dtype of ``input``.
        pre_activation: applied to ``input`` before the statistics (a name as for ``activation``).

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        ValueError: one value per channel or one of running_mean and running_var in training, eps out of range,
            unknown activation, residual of another shape.
        NotImplementedError: integer, boolean or complex ``input``.
        TypeError: ``momentum`` is None, or an argument is not of its type.
        RuntimeError: sizes or dtypes of the other arguments do not fit, statistics are missing in evaluation, or they
            want a gradient or lie in the same memory.
    """
    if momentum is None:
        raise TypeError("batch_norm_act: momentum must be a number, got None")
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm_act: training must be a bool, got {training!r}")
    return _batch_norm_act(
        input,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training,
        momentum,
        eps,
        activation,
        residual,
        pre_activation,
    )


def group_norm_act(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """Group normalisation and an activation in one operator.

    Computes ``activation((x - mean) / sqrt(var + eps) * weight + bias)`` with the statistics of each sample's
    ``num_groups`` groups of channels (Wu & He 2018, https://arxiv.org/abs/1803.08494).

    Args:
        input: ``(N, C, *)``; float32, float64, float16 or bfloat16; contiguous and channels_last are read as they are.
        num_groups: divides ``C``.
        weight, bias: ``(C,)`` or None, of ``input``'s dtype, or float32 for a 16-bit ``input``.
        eps: added to the variance.
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.

    Returns:
        A tensor of ``input``'s shape and memory format; its dtype too, but float32 under CUDA's autocast, as native's.

    Raises:
        ValueError: one value per group, unknown activation.
        NotImplementedError: integer, boolean or complex ``input``.
        TypeError: an argument is not of its type.
        RuntimeError: sizes or dtypes of the other arguments do not fit.
    """
    if not isinstance(input, torch.Tensor):
        raise _not_a_tensor("group_norm_act", "input", input)
    if input.is_cuda and input.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        input = input.float()
    backend = "torch" if _is_transformed() else backends.choose(input)
    by_torch = backend == "torch"
    compiling = torch.compiler.is_compiling()
    if by_torch or compiling or input.is_meta:
        _raise(_group_norm_error(input, num_groups, activation))
    if by_torch:
        return native.group_norm_act(input, num_groups, weight, bias, eps, activation)
    y: torch.Tensor
    try:
        if not compiling and backend == "extension" and ops.AUTOGRAD is not None and recompute.local.choice is None:
            y = ops.AUTOGRAD.group_norm_act(input, weight, bias, num_groups, eps, activation)
            if y is not NotImplemented:
                return y
        if not (
            torch.is_grad_enabled()
            and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
            )
        ):
            y = backends.OPERATORS[backend].group_norm_act(input, weight, bias, num_groups, eps, activation)[0]
            return y
        apply: Any = GroupNormActFunction.apply if compiling else group_norm_act_eager
        y = apply(input, weight, bias, (num_groups, eps, activation, backend))
    except (RuntimeError, AttributeError):
        # Something is wrong: say it with the type of exception that PyTorch has for it.
        _raise(_not_tensors("group_norm_act", weight=weight, bias=bias))
        _raise(_group_norm_error(input, num_groups, activation))
        raise
    if recompute.local.choice is not None and recompute.takes(y):
        recompute.remember_group_norm(y, input, weight, bias, num_groups, eps, activation, backend)
    return y


def layer_norm_act(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """Layer normalisation and an activation in one operator.

    Computes ``activation((x - mean) / sqrt(var + eps) * weight + bias)`` with the statistics of the last dimensions
    (Ba et al. 2016, https://arxiv.org/abs/1607.06450): a group normalisation of rows, with one group.

    Args:
        input: ``(*, *normalized_shape)``; float32, float64, float16 or bfloat16; read as it is where contiguous.
        normalized_shape: the last dimensions of ``input``.
        weight, bias: of shape ``normalized_shape`` or None, of ``input``'s dtype, or float32 for a 16-bit ``input``.
        eps: added to the variance.
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.

    Returns:
        A contiguous tensor of ``input``'s shape; its dtype too, but float32 under CUDA's autocast, as native's.

    Raises:
        ValueError: unknown activation.
        NotImplementedError: integer, boolean or complex ``input``.
        TypeError: an argument is not of its type.
        RuntimeError: ``normalized_shape`` is empty or not what ``input``'s shape ends with; sizes or dtypes of the
            other arguments do not fit.
    """
    if not isinstance(input, torch.Tensor):
        raise _not_a_tensor("layer_norm_act", "input", input)
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"layer_norm_act: normalized_shape must be what input's shape ends with, got {shape} "
            f"for input of shape {tuple(input.shape)}"
        )
    _raise(_not_tensors("layer_norm_act", weight=weight, bias=bias))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != shape:
            raise RuntimeError(
                f"layer_norm_act: {name} must have the shape normalized_shape, {shape}, got {tuple(t.shape)}"
            )
    size = math.prod(shape)
    # Nothing to normalise, or one value, which native makes 0; and native's LayerNorm is not its GroupNorm of rows.
    if input.numel() <= 1 or _is_transformed() or backends.choose(input) == "torch":
        _raise(_activation_or_dtype_error("layer_norm_act", input, activation))
        return native.layer_norm_act(input, shape, weight, bias, eps, activation)
    if len(shape) > 1:
        weight, bias = (None if t is None else t.reshape(size) for t in (weight, bias))
    rows = input if input.dim() == 2 and len(shape) == 1 else input.reshape(-1, size)
    # By strides, a matrix with one column or a transposed one could be read as channels_last: rows are dense.
    y = group_norm_act(rows.contiguous(), 1, weight, bias, eps, activation=activation)
    return y if rows is input else y.view(input.shape)


def instance_norm_act(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """Instance normalisation and an activation in one operator.

    Computes ``activation((x - mean) / sqrt(var + eps) * weight + bias)`` with the statistics of each sample's channels
    (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022): a group normalisation with as many groups as channels. With
    running statistics to update it is a batch normalisation of one sample of N * C channels, and without
    ``use_input_stats`` one in evaluation.

    Args:
        input: ``(N, C, *)``; float32, float64, float16 or bfloat16; contiguous and channels_last are read as they are,
            but channels_last is copied where running statistics are updated.
        running_mean, running_var: ``(C,)`` or None; updated in place when ``use_input_stats``, used when not.
        weight, bias: ``(C,)`` or None, of ``input``'s dtype, or float32 for a 16-bit ``input``.
        use_input_stats: normalise with the statistics of ``input``.
        momentum: weight of the new value in the running statistics, whose new value is the mean over the samples.
        eps: added to the variance.
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.

    Returns:
        A tensor of ``input``'s shape and dtype, in its memory format; contiguous, as native's always is, where running
        statistics are updated.

    Raises:
        ValueError: one value per sample and channel, unknown activation, one of running_mean and running_var alone.
        NotImplementedError: integer, boolean or complex ``input``.
        TypeError: an argument is not of its type.
        RuntimeError: sizes or dtypes of the other arguments do not fit, or statistics are missing without
            ``use_input_stats``.
    """
    if not isinstance(input, torch.Tensor):
        raise _not_a_tensor("instance_norm_act", "input", input)
    _raise(_not_tensors("instance_norm_act", running_mean=running_mean, running_var=running_var))
    if not use_input_stats:
        return batch_norm_act(
            input, running_mean, running_var, weight, bias, False, momentum, eps, activation=activation
        )
    if math.prod(input.shape[2:]) == 1:
        raise ValueError(
            "instance_norm_act: expected more than 1 value per sample and channel, "
            f"got input of shape {tuple(input.shape)}"
        )
    if input.numel() == 0 or _is_transformed():
        _raise(_activation_or_dtype_error("instance_norm_act", input, activation))
        return native.instance_norm_act(input, running_mean, running_var, weight, bias, True, momentum, eps, activation)
    samples, channels = input.shape[:2]
    if running_mean is None and running_var is None:
        return group_norm_act(input, channels, weight, bias, eps, activation=activation)
    for name, t in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        if isinstance(t, torch.Tensor) and tuple(t.shape) != (channels,):
            raise RuntimeError(
                f"instance_norm_act: {name} must have shape ({channels}), one value for each channel of input, "
                f"got {tuple(t.shape)}"
            )
    mean, var, weight, bias = (
        t.repeat(samples) if isinstance(t, torch.Tensor) else t for t in (running_mean, running_var, weight, bias)
    )
    y = batch_norm_act(
        input.reshape(1, samples * channels, *input.shape[2:]),
        mean,
        var,
        weight,
        bias,
        True,
        momentum,
        eps,
        activation=activation,
    )
    # torch.utils.checkpoint runs this again in the backward pass: they have been updated.
    if torch.compiler.is_compiling() or not recompute.in_backward():
        with torch.no_grad():
            for running, repeated in ((running_mean, mean), (running_var, var)):
                if running is not None and repeated is not None:
                    running.copy_(repeated.view(samples, channels).mean(0))
    return y.view(input.shape)


def _activation_or_dtype_error(function: str, input: torch.Tensor, activation: str | None) -> Exception | None:
    if activation is not None and activation not in native.ACTIVATIONS:
        return _unknown_activation("activation", activation)
    return None if input.dtype in _DTYPES else _unsupported_dtype(function, input)


def _batch_norm_act(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: torch.Tensor | None,
    pre_activation: str | None,
) -> torch.Tensor:
    """batch_norm_act that also keeps ``num_batches_tracked``; momentum=None then averages cumulatively."""
    if not isinstance(input, torch.Tensor):
        raise _not_a_tensor("batch_norm_act", "input", input)
    # PyTorch takes a one-dimensional input if it is empty.
    backend = "torch" if _is_transformed() or input.dim() < 2 else backends.choose(input)
    by_torch = backend == "torch"
    compiling = torch.compiler.is_compiling()
    if by_torch or compiling or pre_activation is not None or input.is_meta:
        tensors = {"running_mean": running_mean, "running_var": running_var, "residual": residual}
        error = _not_tensors("batch_norm_act", **tensors) or _batch_norm_error(
            input, running_mean, running_var, training, eps, activation, residual, pre_activation
        )
        if error is not None:
            # torch.nn.BatchNorm counts the batch before it finds anything wrong with it; so does our operator.
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            raise error
    if training and not compiling and recompute.in_backward():
        # torch.utils.checkpoint runs this forward again: its batch is in the running statistics already.
        num_batches_tracked, momentum = None, 0.0
        if not by_torch:
            running_mean = running_var = None
    if by_torch:
        return native.batch_norm_act(
            input,
            running_mean,
            running_var,
            num_batches_tracked,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation,
            residual,
            pre_activation,
        )
    operators = backends.OPERATORS[backend]
    if pre_activation is not None and not operators.fuses_pre_activation(
        input.device.type, pre_activation, activation, residual
    ):
        input, pre_activation = native.activate(input, pre_activation), None
    arguments = (running_mean, running_var, num_batches_tracked, training, momentum, eps, activation, pre_activation)
    y: torch.Tensor
    try:
        grad_enabled = torch.is_grad_enabled()
        if grad_enabled and (
            (running_mean is not None and running_mean.requires_grad)
            or (running_var is not None and running_var.requires_grad)
        ):
            raise RuntimeError("batch_norm_act: running_mean and running_var get no gradient and must not require one")
        if not compiling and backend == "extension" and ops.AUTOGRAD is not None and recompute.local.choice is None:
            y = ops.AUTOGRAD.batch_norm_act(input, weight, bias, residual, *arguments)
            if y is not NotImplemented:
                return y
        if not (
            grad_enabled
            and (
                input.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            )
        ):
            y = operators.batch_norm_act(input, weight, bias, residual, *arguments)[0]
        else:
            if compiling and residual is input:
                # torch.compile takes no tensor for two arguments.
                residual = input.view_as(input)
            apply: Any = BatchNormActFunction.apply if compiling else batch_norm_act_eager
            y = apply(input, weight, bias, residual, (*arguments, backend))
        if training and not compiling:
            # What autograd saved of them before is no longer what it was (native says nothing: #73050).
            if running_mean is not None and running_var is not None:
                increment_version((running_mean, running_var))
            if num_batches_tracked is not None:
                increment_version(num_batches_tracked)
    except (RuntimeError, AttributeError):
        # Something is wrong: say it with the type of exception that PyTorch has for it.
        tensors = {"weight": weight, "bias": bias, "residual": residual}
        _raise(_not_tensors("batch_norm_act", running_mean=running_mean, running_var=running_var, **tensors))
        _raise(_batch_norm_error(input, running_mean, running_var, training, eps, activation, residual, None))
        raise
    if recompute.local.choice is not None and recompute.takes(y):
        mean, invstd = y.grad_fn.statistics  # type: ignore[union-attr]
        recompute.remember_batch_norm(
            y, input, weight, bias, residual, mean, invstd, activation, backend, pre_activation
        )
    return y


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation, which our operators do not know of, is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _batch_norm_error(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    activation: str | None,
    residual: torch.Tensor | None,
    pre_activation: str | None,
) -> Exception | None:
    """What is wrong with the call, as an exception of the type that PyTorch raises for it, or None."""
    if activation is not None and activation not in native.ACTIVATIONS:
        return _unknown_activation("activation", activation)
    if pre_activation is not None and pre_activation not in native.ACTIVATIONS:
        return _unknown_activation("pre_activation", pre_activation)
    if input.dtype not in _DTYPES:
        return _unsupported_dtype("batch_norm_act", input)
    if training:
        shape = input.shape
        if len(shape) >= 2 and input.numel() == shape[1] > 0:
            return ValueError(
                "batch_norm_act: expected more than 1 value per channel when training, "
                f"got input of shape {tuple(shape)}"
            )
        if not eps > 0.0:
            return ValueError(f"batch_norm_act: eps must be positive when training, got {eps}")
        if (running_mean is None) != (running_var is None):
            return ValueError("batch_norm_act: running_mean and running_var must both be given or both be None")
    elif not eps >= 0.0:
        return ValueError(f"batch_norm_act: eps must not be negative, got {eps}")
    if residual is not None and not isinstance(residual, torch.Tensor):
        return _not_a_tensor("batch_norm_act", "residual", residual)
    if residual is not None and residual.shape != input.shape:
        return ValueError(
            f"batch_norm_act: residual of shape {tuple(residual.shape)} does not match "
            f"input of shape {tuple(input.shape)}"
        )
    if residual is not None and residual.dtype != input.dtype:
        return RuntimeError(f"batch_norm_act: residual must have input's dtype, {input.dtype}, got {residual.dtype}")
    # PyTorch's own operators notice when the running statistics are written already.
    for name, t in (("running_mean", running_mean), ("running_var", running_var), ("residual", residual)):
        if t is not None and t.device != input.device:
            return RuntimeError(
                f"batch_norm_act: {name} must be on the device of input, {input.device}, got {t.device}"
            )
    return None


def _group_norm_error(input: torch.Tensor, num_groups: int, activation: str | None) -> Exception | None:
    """The same for group_norm_act."""
    if activation is not None and activation not in native.ACTIVATIONS:
        return _unknown_activation("activation", activation)
    if input.dtype not in _DTYPES:
        return _unsupported_dtype("group_norm_act", input)
    if num_groups <= 0:
        return RuntimeError(f"group_norm_act: num_groups must be positive, got {num_groups}")
    if input.dim() >= 2 and input.numel() == input.shape[0] * num_groups == num_groups:
        return ValueError(
            "group_norm_act: expected more than 1 value per group, "
            f"got input of shape {tuple(input.shape)} with num_groups {num_groups}"
        )
    return None


def _not_tensors(function: str, **tensors: object) -> Exception | None:
    """An error for the first that is neither a tensor nor None."""
    wrong = [(name, t) for name, t in tensors.items() if not (t is None or isinstance(t, torch.Tensor))]
    return _not_a_tensor(function, *wrong[0]) if wrong else None


def _not_a_tensor(function: str, argument: str, value: object) -> Exception:
    return TypeError(f"{function}: {argument} must be a Tensor, got {type(value).__name__}")


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error from None


def _unknown_activation(argument: str, name: object) -> Exception:
    known = ", ".join(repr(known) for known in native.ACTIVATIONS)
    return ValueError(f"{argument} must be one of {known} or None, got {name!r}")


def _unsupported_dtype(function: str, input: torch.Tensor) -> Exception:
    return NotImplementedError(f"{function}: input must be float32, float64, float16 or bfloat16, got {input.dtype}")
