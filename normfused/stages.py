"""The four stages of BatchNorm + activation one by one, for what comes between them: SyncBatchNorm, recomputation.

``mean`` and ``invstd`` are those of the whole batch, ``(C,)`` in float32 (float64 for float64 ``x``). Memory passes are
counted in S, the size of x. Together the stages move 3 S forward, as kernels of their own would (4 on the CPU, where
PyTorch's kernel reads x twice for the statistics), and 6 S backward, where those would move 5.
"""

from typing import TypeAlias, cast

import torch

from . import native, reference
from .backends import OPERATORS

# dx, dweight, dbias, dresidual
Gradients: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def statistics(x: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(count, mean, m2) of each channel of ``x``: a number, and the mean and the sum of squared deviations from it."""
    count = x.numel() // x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_zeros(x.shape[1], dtype=dtype)
    if count == 0:
        return 0, mean, torch.zeros_like(mean)
    # Running statistics in float32 are what makes PyTorch give float32 ones for 16-bit x; what becomes of them is
    # not used.
    mean, var = torch.batch_norm_update_stats(x, mean, torch.ones_like(mean), 0.0)
    return count, mean, var * count


def combine(
    counts: torch.Tensor, means: torch.Tensor, m2s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(count, mean, m2) of several parts together; ``counts (W, 1)``, ``means`` and ``m2s`` ``(W, C)``.

    The formula of Chan, Golub & LeVeque (1979) for W parts at once, summed in their order. Means are taken relative to
    the first, so that nothing cancels where they are large and close together.
    """
    count = counts.sum()
    share = counts / count.clamp(min=1)
    first = means[0]
    mean = first + (share * (means - first)).sum(0)
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    return count, mean, m2


def scale(weight: torch.Tensor | None, invstd: torch.Tensor) -> torch.Tensor:
    """``invstd * weight``, rounded as the operators round it."""
    return invstd if weight is None else invstd * weight.to(invstd.dtype)


def apply(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    activation: str | None,
    backend: str,
    pre_activation: str | None = None,
) -> torch.Tensor:
    """``activation((x' - mean) * scale + bias + residual)``, bit-equal to the y of the forward that found ``mean``.

    ``x'`` is ``pre_activation(x)``, which only a backend that fuses it takes.

    The operator's evaluation with a variance of 1, whose inverse deviation is exactly 1. Moves 2 S, 3 with residual.
    """
    ones = torch.ones_like(mean)
    if backend == "torch":
        bias = None if bias is None else bias.to(mean.dtype)
        return native.batch_norm_act(x, mean, ones, None, scale, bias, False, 0.0, 0.0, activation, residual, None)
    arguments = (x, scale, bias, residual, mean, ones, None, False, 0.0, 0.0, activation, pre_activation)
    y: torch.Tensor = OPERATORS[backend].batch_norm_act(*arguments)[0]
    return y


def backward_reduce(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    activation: str | None,
    backend: str,
    need_dx: bool,
    need_dresidual: bool,
) -> Gradients:
    """(dx as if mean and invstd were constants, dweight, dbias, dresidual) of this ``x`` alone.

    Moves 3 S, and 1 more for dresidual.
    """
    if backend == "torch":
        weight, bias = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        arguments = (dy, x, weight, bias, residual, mean, invstd, False, 0.0, activation)
        return cast(Gradients, reference.batch_norm_act_backward(*arguments))
    gradients: Gradients = OPERATORS[backend].batch_norm_act_backward(
        dy,
        x,
        weight,
        bias,
        residual,
        mean,
        invstd,
        False,
        activation,
        None,
        need_dx,
        True,
        True,
        need_dresidual,
    )
    return gradients


def backward_apply(
    frozen_dx: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    count: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """``dx = frozen_dx - scale * (dbias + x_hat * dweight) / count``, the sums and the count of the whole batch.

    An affine map of x plus a residual. Moves 3 S; in 16 bits frozen_dx is a rounding more, no larger than dy's own.
    """
    factor = -scale(weight, invstd) / count
    return apply(x, factor * invstd * dweight, factor * dbias, frozen_dx, mean, None, backend)
