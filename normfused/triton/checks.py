"""Argument checks and tensor plumbing of both families, as csrc/torch/checks.cpp: errors name argument and value."""

import torch

from .. import native

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check(ok, op, message):
    """Raise RuntimeError "normfused_triton::op: message" unless ``ok``; ``message`` is a function."""
    if not ok:
        raise RuntimeError(f"normfused_triton::{op}: {message()}")


def check_activation(op, activation, argument="activation"):
    known = ", ".join(native.ACTIVATIONS)
    check(
        activation is None or activation in native.ACTIVATIONS,
        op,
        lambda: f"{argument} must be {known} or None, got {activation!r}",
    )


def statistics_dtype(x):
    """The dtype of statistics and per-channel arithmetic."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_input(op, x):
    check(x.layout == torch.strided, op, lambda: f"x must be a dense tensor, got {x.layout}")
    check(x.dtype in _DTYPES, op, lambda: f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    check(x.dim() >= 2, op, lambda: f"x must be (N, C, *), got shape {tuple(x.shape)}")


def like_input(op, argument, t, x, memory_format):
    """``t``, which must have the shape and dtype of ``x``, in its memory format."""
    check(t.device == x.device, op, lambda: f"{argument} must be on the device of x, {x.device}, got {t.device}")
    check(t.dtype == x.dtype, op, lambda: f"{argument} must have the dtype of x, {x.dtype}, got {t.dtype}")
    check(
        t.shape == x.shape,
        op,
        lambda: f"{argument} must have the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}",
    )
    return t.contiguous(memory_format=memory_format)


def check_per_channel(op, argument, t, x):
    """One value for each channel of ``x``, or None."""
    if t is None:
        return
    channels = x.shape[1]
    check(t.device == x.device, op, lambda: f"{argument} must be on the device of x, {x.device}, got {t.device}")
    check(
        t.dim() == 1 and t.shape[0] == channels,
        op,
        lambda: f"{argument} must have shape ({channels}), one value for each channel of x, got {tuple(t.shape)}",
    )
    wide = statistics_dtype(x)
    check(
        t.dtype in (wide, x.dtype),
        op,
        lambda: f"{argument} must be {wide} or have the dtype of x, {x.dtype}, got {t.dtype}",
    )


def dense(t):
    """A per-channel tensor that kernels can index, or None."""
    return None if t is None else t.contiguous()
