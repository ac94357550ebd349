"""The same layers composed of PyTorch's own operators.

Serves the tensors that no kernel of ours covers (backend "torch") and everything that lives on composition: torch.func
transforms, forward-mode differentiation and a ``pre_activation`` that no kernel applies.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


def activate(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Apply the activation called ``activation`` (None: the identity) to ``z``."""
    return z if activation is None else ACTIVATIONS[activation](z)


def _weight(weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``weight``, or ones where there is a bias alone.

    Torch's batch norm then gets its double backward wrong, and its group norm raises in backward (2.13).
    """
    return torch.ones_like(bias) if weight is None and bias is not None else weight


def batch_norm_act(
    x: torch.Tensor,
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
    """``activation(batch_norm(pre_activation(x)) + residual)`` with torch.nn.BatchNorm's bookkeeping."""
    factor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    z = F.batch_norm(
        activate(x, pre_activation),
        running_mean,
        running_var,
        _weight(weight, bias),
        bias,
        training,
        factor,
        eps,
    )
    return activate(z if residual is None else z + residual, activation)


def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    """``activation(group_norm(x))``."""
    return activate(F.group_norm(x, num_groups, _weight(weight, bias), bias, eps), activation)


def layer_norm_act(
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    """``activation(layer_norm(x))``."""
    return activate(F.layer_norm(x, normalized_shape, _weight(weight, bias), bias, eps), activation)


def instance_norm_act(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    activation: str | None,
) -> torch.Tensor:
    """``activation(instance_norm(x))``."""
    weight = _weight(weight, bias)
    z = F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return activate(z, activation)
