"""SyncBatchNorm with its activation, over torch.distributed.

The four stages of stages.py, with one collective in each direction: the forward gathers count, mean and m2 of every
rank, the backward adds up dweight and dbias. Any backend serves that has both for the tensors' device: gloo on the CPU,
NCCL on CUDA. Nothing waits for the GPU but a rank with fewer than two values per channel.
"""

import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from . import backends, native, recompute, reference, stages
from .functional import _batch_norm_error
from .modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct


class SyncBatchNormActFunction(torch.autograd.Function):
    """``y = activation(batch_norm(x) + residual)`` with the statistics of all ranks of a group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        statistics: tuple[Any, ...],
        options: tuple[Any, ...],
    ) -> torch.Tensor:
        """statistics: (count, mean, invstd) of the whole batch; options: (activation, backend, group, eps)."""
        _, mean, invstd = statistics
        activation, backend, *_ = options
        ctx.statistics, ctx.options = statistics, options
        y = stages.apply(x, stages.scale(weight, invstd), bias, residual, mean, activation, backend)
        if activation is None:
            bias = residual = None
        ctx.save_for_backward(x, weight, bias, residual)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, residual = ctx.saved_tensors
        ctx.recipe = None
        count, mean, invstd = ctx.statistics
        activation, backend, group, eps = ctx.options
        need_dx, need_dweight, need_dbias, need_dresidual, *_ = ctx.needs_input_grad
        # The parameters' own gradients stay those of this rank: adding them up is left to DDP or FSDP.
        if torch.is_grad_enabled():
            dx, dweight, dbias, dresidual = _differentiable_backward(
                dy, x, weight, bias, residual, count, eps, activation, group
            )
        else:
            dx, dweight, dbias, dresidual = stages.backward_reduce(
                dy,
                x,
                weight,
                bias,
                residual,
                mean,
                invstd,
                activation,
                backend,
                need_dx,
                need_dresidual and activation is not None,
            )
            if need_dx:
                sums = torch.stack([dweight, dbias])
                dist.all_reduce(sums, group=group)
                dx = stages.backward_apply(dx, x, weight, mean, invstd, sums[0], sums[1], count, backend)
        if need_dresidual and activation is None:
            dresidual = dy
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dresidual if need_dresidual else None,
            None,
            None,
        )


class _SumOverRanks(torch.autograd.Function):
    """The sum of ``t`` over the ranks of ``group``, on each of them; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = t.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return _sum_over_ranks(dtotal, ctx.group), None


def _sum_over_ranks(t: torch.Tensor, group: Any) -> torch.Tensor:
    return cast(torch.Tensor, _SumOverRanks.apply(t, group))  # type: ignore[no-untyped-call]


def _differentiable_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    count: torch.Tensor,
    eps: float,
    activation: str | None,
    group: Any,
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dweight, dbias, dresidual) by formulas that autograd follows, across ranks too; as ``_SumOverRanks``, every
    rank has to differentiate them."""
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    wide = x.to(dy.dtype if dy.dtype == torch.float64 else torch.float32)
    mean = _sum_over_ranks(wide.sum(dims), group) / count
    centred = wide - mean.view(shape)
    invstd = (_sum_over_ranks(centred.square().sum(dims), group) / count + eps).rsqrt()
    frozen_dx, dweight, dbias, dresidual = reference.batch_norm_act_backward(
        dy, x, weight, bias, residual, mean, invstd, False, eps, activation
    )
    # As stages.backward_apply; where there is no weight or bias, its gradient is this sum all the same.
    total_dweight, total_dbias = _sum_over_ranks(torch.stack([dweight, dbias]).to(mean.dtype), group) / count
    correction = total_dbias.view(shape) + centred * (invstd * total_dweight).view(shape)
    dx = frozen_dx - (stages.scale(weight, invstd).view(shape) * correction).to(frozen_dx.dtype)
    return dx, dweight, dbias, dresidual


class SyncBatchNormAct(_BatchNormAct, nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm followed by an activation: in training, the statistics are those of all ranks together.

    Takes torch.nn.SyncBatchNorm's arguments and has its parameters, buffers and state_dict. It serves every device and
    every backend of torch.distributed, and so is no instance of torch.nn.SyncBatchNorm, which DistributedDataParallel
    refuses on the CPU. Where nothing is to be synchronised (evaluation, no process group, a group of one) it is
    BatchNormAct.

    Args:
        process_group: the ranks that share statistics, all by default.
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.
        pre_activation: applied before the statistics (Layer -> activation -> BatchNorm), a name as above or None.

    ``forward(input, residual=None)`` takes ``(N, C, *)``, float32, float64, float16 or bfloat16, and adds ``residual``,
    of the same shape and dtype, before the activation. N may differ from rank to rank, and be 0; C and the statistics'
    dtype (float64 for float64, float32 for the others) must not. Every rank of the group must call the layer, and all
    of them or none must want the gradient of ``input``.

    Raises:
        ValueError: one value per channel on all ranks together (on all of them), and what
            :func:`normfused.functional.batch_norm_act` raises it for.
        NotImplementedError: integer, boolean or complex ``input``.
        RuntimeError: sizes or dtypes do not fit.

    What is wrong on one rank alone is raised there alone, and leaves the others waiting, as any exception between
    collectives does.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        self.process_group = process_group

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNormAct: expected input of at least 2 dimensions, got {input.dim()}")
        if input.shape[1] != self.num_features:
            raise RuntimeError(
                f"SyncBatchNormAct: expected input of {self.num_features} channels, got shape {tuple(input.shape)}"
            )

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        group = self._group() if self.training else None
        if group is None:
            return super().forward(input, residual)
        self._check_input_dim(input)
        # One value per channel is enough here, if other ranks have more: that check comes when all are counted.
        error = _batch_norm_error(input, None, None, False, 0.0, self.activation, residual, self.pre_activation)
        if error is None and self.eps <= 0.0:
            error = ValueError(f"SyncBatchNormAct: eps must be positive when training, got {self.eps}")
        tracks = self.track_running_stats and self.running_mean is not None
        # What is computed again in a backward pass is counted already.
        again = not torch.compiler.is_compiling() and recompute.in_backward()
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(0 if again else 1)
        if error is not None:
            raise error
        if self.pre_activation is not None:
            input = native.activate(input, self.pre_activation)
        options = self.activation, backends.choose(input), group, self.eps
        count, mean, m2 = _statistics_of_all(input, group)
        n = count.clamp(min=1)
        statistics = n, mean, (m2 / n + self.eps).sqrt().reciprocal()
        y: torch.Tensor = SyncBatchNormActFunction.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, residual, statistics, options
        )
        if tracks:
            factor = 0.0 if again else self._factor(mean.dtype)
            if input.numel() == 0:
                factor *= count > 0  # Without a value anywhere nothing moves; a rank that has some need not look.
            _move(self.running_mean, mean, factor)
            _move(self.running_var, m2 / (n - 1).clamp(min=1), factor)
        if recompute.takes(y):
            recompute.remember_batch_norm(y, input, self.weight, self.bias, residual, *statistics[1:], *options[:2])
        return y

    def _factor(self, dtype: torch.dtype) -> float | torch.Tensor:
        """The weight of this batch in the running statistics: a number, or one on the device."""
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None:
            return 0.0
        return self.num_batches_tracked.to(dtype).reciprocal()

    def _group(self) -> dist.ProcessGroup | None:
        """The process group to synchronise with, None where there is nothing to."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """As normfused.convert_sync_batchnorm."""
        return convert_sync_batchnorm(module, process_group)


@torch.no_grad()
def _statistics_of_all(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(count, mean, m2) over the ranks of ``group``, the same bits on each; the one collective of the forward."""
    count, mean, m2 = stages.statistics(x)
    mine = torch.cat([mean, m2, mean.new_full((1,), count)])
    world_size = dist.get_world_size(group)
    ranks = mine.new_empty(world_size * mine.numel())
    _all_gather(ranks, mine, group=group)
    means, m2s, counts = ranks.view(world_size, -1).split([mean.numel(), mean.numel(), 1], 1)
    total, mean, m2 = stages.combine(counts, means, m2s)
    # If there is one value in all, every rank has at most one, and every rank comes here.
    if count <= 1 and total.item() == 1:
        raise ValueError(
            "SyncBatchNormAct: expected more than 1 value per channel on all ranks together when training, "
            f"got input of shape {tuple(x.shape)} on this one"
        )
    return total, mean, m2


# all_gather_into_tensor is what torch < 2.13 calls it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def _move(running: torch.Tensor | None, batch: torch.Tensor, factor: float | torch.Tensor) -> None:
    """``running = (1 - factor) * running + factor * batch``; ``factor`` is a number or one on the device."""
    assert running is not None
    moved = torch.lerp(running.to(batch.dtype), batch, factor)
    running.copy_(moved)


_SYNCHRONISED = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNormAct,
)


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make every BatchNorm of ``module`` a SyncBatchNormAct, in place; what was fused with an activation keeps it.

    The layers of torch.nn (BatchNorm1d, 2d, 3d and SyncBatchNorm) and ours change class: parameters, buffers, hooks,
    state_dict and an optimizer built before stay valid, and ``normfused.revert`` undoes it together with ``convert``.
    Call it after ``convert`` and before DistributedDataParallel or fully_shard.

    Args:
        module: any module, in any mode, on any device.
        process_group: the ranks that share statistics, all by default.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is not a torch.nn.Module.

    Warns:
        UserWarning: names the BatchNorms of other classes, which stay as they are and are not synchronised.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_sync_batchnorm: module must be a torch.nn.Module, got {type(module).__name__}")
    left = []
    for name, layer in module.named_modules():
        if type(layer) in _SYNCHRONISED and "forward" not in vars(layer):
            _synchronise(layer, process_group)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            left.append(f"{name or '(model)'} ({type(layer).__module__}.{type(layer).__qualname__})")
    if left:
        warnings.warn(
            f"convert_sync_batchnorm left what it does not know unsynchronised: {', '.join(left)}", stacklevel=2
        )
    return module


def _synchronise(layer: Any, process_group: dist.ProcessGroup | None) -> None:
    cls = type(layer)
    layer.process_group = process_group
    if cls is not SyncBatchNormAct:
        layer.__class__ = SyncBatchNormAct
        layer.__dict__["class_before_sync"] = cls
        layer.__dict__.setdefault("activation", None)
        layer.__dict__.setdefault("pre_activation", None)


def unsynchronise(layer: nn.Module) -> None:
    """Give a SyncBatchNormAct that convert_sync_batchnorm made the class back that it had; for normfused.revert."""
    cls = vars(layer).pop("class_before_sync", None)
    if cls is None:
        return
    layer.__class__ = cls
    if cls is not nn.SyncBatchNorm:
        del layer.process_group
    if not isinstance(layer, _BatchNormAct):
        del layer.activation, layer.pre_activation
