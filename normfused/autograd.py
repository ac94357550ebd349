"""Gradients of the fused operators.

The backward recomputes the pre-activation z from x, so the output is never saved. Under ``create_graph=True`` the
gradient is the differentiable formula of reference.py instead of the operator.
"""

import torch

from . import ops, reference


class BatchNormActFunction(torch.autograd.Function):
    """``y = activation(batch_norm(x) + residual)``; updates the running statistics it is given."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        activation,
    ):
        y, mean, invstd = ops.batch_norm_act(
            x,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            eps,
            activation,
            None,
        )
        # Without an activation the gradient does not depend on z, hence not on bias and residual.
        if activation is None:
            bias = residual = None
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd)
        ctx.training = training
        ctx.eps = eps
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, residual, mean, invstd = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, need_dresidual, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = reference.batch_norm_act_backward(
                dy, x, weight, bias, residual, mean, invstd, ctx.training, ctx.eps, ctx.activation
            )
        else:
            grads = ops.batch_norm_act_backward(
                dy,
                x,
                weight,
                bias,
                residual,
                mean,
                invstd,
                ctx.training,
                ctx.activation,
                None,
                need_dx,
                need_dweight,
                need_dbias,
                need_dresidual and ctx.activation is not None,
            )
        dx, dweight, dbias, dresidual = grads
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            (dy if ctx.activation is None else dresidual) if need_dresidual else None,
            *(None,) * 7,
        )


class GroupNormActFunction(torch.autograd.Function):
    """``y = activation(group_norm(x))``."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, activation):
        y, mean, rstd = ops.group_norm_act(x, weight, bias, num_groups, eps, activation)
        ctx.save_for_backward(x, weight, None if activation is None else bias, mean, rstd)
        ctx.num_groups = num_groups
        ctx.eps = eps
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = reference.group_norm_act_backward(dy, x, weight, bias, ctx.num_groups, ctx.eps, ctx.activation)
        else:
            grads = ops.group_norm_act_backward(
                dy,
                x,
                weight,
                bias,
                mean,
                rstd,
                ctx.num_groups,
                ctx.activation,
                need_dx,
                need_dweight,
                need_dbias,
            )
        dx, dweight, dbias = grads
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            None,
            None,
        )
