"""Gradients of the fused operators.

The backward recomputes the pre-activation z from x, so the output is never saved. Under ``create_graph=True`` the
gradient is the differentiable formula of reference.py instead of the operator.

What needs no gradient comes in one tuple: autograd's bookkeeping costs time for every argument. The functions called
``*_eager`` leave out the Python half of Function.apply, which serves torch.func (functional.py sends its transforms
elsewhere); torch.compile knows only Function.apply. Where the C++ core was built with the torch that runs, eager calls
of its operators take csrc/autograd.cpp instead, which is the same in C++.
"""

from typing import Any

import torch

from . import ops, reference
from .backends import OPERATORS


class BatchNormActFunction(torch.autograd.Function):
    """``y = activation(batch_norm(x) + residual)``; updates the running statistics it is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        options: tuple[Any, ...],
    ) -> torch.Tensor:
        """options: (running_mean, running_var, num_batches_tracked, training, momentum, eps, activation,
        pre_activation, backend)."""
        y: torch.Tensor
        y, mean, invstd = OPERATORS[options[8]].batch_norm_act(x, weight, bias, residual, *options[:8])
        ctx.options = options[3:]
        # Without an activation the gradient does not depend on z, hence not on bias and residual.
        if options[6] is None:
            bias = residual = None
        ctx.save_for_backward(x, weight, bias, residual)
        # Nobody else holds these, so that nothing can change them: no need for autograd's guard.
        ctx.statistics = mean, invstd
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, residual = ctx.saved_tensors
        ctx.recipe = None
        mean, invstd = ctx.statistics
        training, _, eps, activation, pre_activation, backend = ctx.options
        need_dx, need_dweight, need_dbias, need_dresidual, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight, dbias, dresidual = reference.batch_norm_act_backward(
                dy, x, weight, bias, residual, mean, invstd, training, eps, activation, pre_activation
            )
        else:
            dx, dweight, dbias, dresidual = OPERATORS[backend].batch_norm_act_backward(
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
                need_dresidual and activation is not None,
            )
        if need_dresidual and activation is None:
            dresidual = dy
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dresidual if need_dresidual else None,
            None,
        )


class GroupNormActFunction(torch.autograd.Function):
    """``y = activation(group_norm(x))``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, options: tuple[Any, ...]
    ) -> torch.Tensor:
        """options: (num_groups, eps, activation, backend)."""
        y: torch.Tensor
        y, mean, rstd = OPERATORS[options[3]].group_norm_act(x, weight, bias, *options[:3])
        ctx.options = options
        ctx.save_for_backward(x, weight, None if options[2] is None else bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        ctx.recipe = None
        num_groups, eps, activation, backend = ctx.options
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight, dbias = reference.group_norm_act_backward(dy, x, weight, bias, num_groups, eps, activation)
        else:
            dx, dweight, dbias = OPERATORS[backend].group_norm_act_backward(
                dy, x, weight, bias, mean, rstd, num_groups, activation, need_dx, need_dweight, need_dbias
            )
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None


batch_norm_act_eager = super(torch.autograd.Function, BatchNormActFunction).apply
group_norm_act_eager = super(torch.autograd.Function, GroupNormActFunction).apply

if ops.AUTOGRAD is not None:
    ops.AUTOGRAD.set_formulas(reference.batch_norm_act_backward, reference.group_norm_act_backward)
