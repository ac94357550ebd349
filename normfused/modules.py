"""Drop-in modules: torch.nn's arguments, numbers and state_dict, with the activation in the same operator."""

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import native
from .functional import (
    _batch_norm_act,
    _unknown_activation,
    group_norm_act,
    instance_norm_act,
    layer_norm_act,
)


class _RefuseSyncConversion:
    """Stops torch's convert_sync_batchnorm from dropping a fused activation in silence.

    The converter builds a plain SyncBatchNorm from any BatchNorm subclass, and asks the module one thing that nothing
    else here answers: ``hasattr(module, "qconfig")``. Raising there is what makes it loud. In every other respect
    ``qconfig`` is the plain attribute that quantisation sets.
    """

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is not None and (module.activation, module.pre_activation) != (None, None):
            converter = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]
            if sys._getframe(1).f_code is converter:
                raise RuntimeError(
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the fused activation "
                    f"{module.activation or module.pre_activation!r} of {type(module).__name__}; "
                    "normfused.convert_sync_batchnorm(model) keeps it; or call normfused.revert(model) first"
                )
        if module is None or "qconfig" not in vars(module):
            raise AttributeError("qconfig")
        return vars(module)["qconfig"]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)["qconfig"] = value

    def __delete__(self, module: Any) -> None:
        del vars(module)["qconfig"]


class _RefuseFolding:
    """Stops torch's fuse_conv_bn_eval and fuse_linear_bn_eval from dropping a fused activation in silence.

    They read a BatchNorm's numbers, ``eps`` among them, into the weights of the layer before it, and return that layer
    alone. In every other respect ``eps`` is the plain attribute that it is in torch.nn.
    """

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            raise AttributeError("eps")
        fused = (module.activation, module.pre_activation) != (None, None)
        if fused and not torch.compiler.is_compiling() and sys._getframe(1).f_code in _FOLDING:
            raise RuntimeError(
                f"{sys._getframe(1).f_code.co_name} would drop the fused activation "
                f"{module.activation or module.pre_activation!r} of {type(module).__name__}; "
                "call normfused.revert(model) first"
            )
        return vars(module)["eps"]

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)["eps"] = value


_FOLDING = {nn.utils.fuse_conv_bn_eval.__code__, nn.utils.fuse_linear_bn_eval.__code__}

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as _Base  # what the classes with it have beside it
else:
    _Base = object


def _tensors(module: Any) -> tuple[torch.Tensor | None, ...]:
    """A BatchNorm's (weight, bias, running_mean, running_var, num_batches_tracked)."""
    # Past Module.__getattr__, whose five calls would cost the host as much as the rest of a small layer in evaluation.
    parameters, buffers = module._parameters, module._buffers
    try:
        return (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
    except KeyError:
        # Something has taken a place: a parametrization, pruning, a wrapper for distributed training.
        return module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked


class _BatchNormAct(_Base):
    """What BatchNormAct1d, 2d and 3d add to their torch.nn base class."""

    activation: str | None
    pre_activation: str | None
    qconfig = _RefuseSyncConversion()
    eps = _RefuseFolding()

    def __init__(
        self, *args: Any, activation: str | None = "relu6", pre_activation: str | None = None, **kwargs: Any
    ) -> None:
        if activation is not None and activation not in native.ACTIVATIONS:
            raise _unknown_activation("activation", activation)
        if pre_activation is not None and pre_activation not in native.ACTIVATIONS:
            raise _unknown_activation("pre_activation", pre_activation)
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.pre_activation = pre_activation

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        weight, bias, running_mean, running_var, num_batches_tracked = _tensors(self)
        training = self.training
        if not training:
            num_batches_tracked = None
            training = running_mean is None and running_var is None
        elif not self.track_running_stats:
            running_mean = running_var = num_batches_tracked = None
        return _batch_norm_act(
            input,
            running_mean,
            running_var,
            num_batches_tracked,
            weight,
            bias,
            training,
            self.momentum,
            self.__dict__["eps"],  # past the descriptor, which costs time
            self.activation,
            residual,
            self.pre_activation,
        )

    def extra_repr(self) -> str:
        extra = f"{super().extra_repr()}, activation={self.activation!r}"  # type: ignore[no-untyped-call]
        return extra if self.pre_activation is None else f"{extra}, pre_activation={self.pre_activation!r}"


_BATCH_NORM_DOC = """torch.nn.BatchNorm{d}d followed by an activation, in one operator.

Takes torch.nn.BatchNorm{d}d's arguments, has its parameters, buffers and state_dict, and is an instance of it.

Args:
    activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.
    pre_activation: applied before the statistics (Layer -> activation -> BatchNorm), a name as above or None.

``forward(input, residual=None)`` takes {shape} and adds ``residual``, of the same shape and dtype, before the
activation. Errors are those of :func:`normfused.functional.batch_norm_act`.
"""


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    __doc__ = _BATCH_NORM_DOC.format(d=1, shape="``(N, C)`` or ``(N, C, L)``")


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    __doc__ = _BATCH_NORM_DOC.format(d=2, shape="``(N, C, H, W)``")


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    __doc__ = _BATCH_NORM_DOC.format(d=3, shape="``(N, C, D, H, W)``")


class _NormAct:
    """What the layers that normalise each sample by itself add to their torch.nn base class."""

    activation: str | None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        if activation is not None and activation not in native.ACTIVATIONS:
            raise _unknown_activation("activation", activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    @property
    def pre_activation(self) -> None:
        """Always None: only a BatchNorm is fused with an activation before it."""
        return None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"  # type: ignore[misc]


class GroupNormAct(_NormAct, nn.GroupNorm):
    """torch.nn.GroupNorm followed by an activation, in one operator.

    Takes torch.nn.GroupNorm's arguments, has its parameters and state_dict, and is an instance of it.

    Args:
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.

    ``forward(input)`` takes ``(N, C, *)``. Errors are those of :func:`normfused.functional.group_norm_act`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm_act(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)


class LayerNormAct(_NormAct, nn.LayerNorm):
    """torch.nn.LayerNorm followed by an activation, in one operator.

    Takes torch.nn.LayerNorm's arguments, has its parameters and state_dict, and is an instance of it.

    Args:
        activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.

    ``forward(input)`` takes ``(*, *normalized_shape)``. Errors are those of
    :func:`normfused.functional.layer_norm_act`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm_act(
            input, self.normalized_shape, self.weight, self.bias, self.eps, activation=self.activation
        )


class _InstanceNormAct(_NormAct):
    """What InstanceNormAct1d, 2d and 3d add: the rest of the forward, the checks among it, is torch.nn's."""

    def _apply_instance_norm(self: Any, input: torch.Tensor) -> torch.Tensor:
        return instance_norm_act(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            activation=self.activation,
        )


_INSTANCE_NORM_DOC = """torch.nn.InstanceNorm{d}d followed by an activation, in one operator.

Takes torch.nn.InstanceNorm{d}d's arguments, has its parameters, buffers and state_dict, and is an instance of it.

Args:
    activation: "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu" (slope 0.01) or None.

``forward(input)`` takes {shape}, keeps its memory format, and raises what torch.nn.InstanceNorm{d}d raises, or
:func:`normfused.functional.instance_norm_act`.
"""


class InstanceNormAct1d(_InstanceNormAct, nn.InstanceNorm1d):
    __doc__ = _INSTANCE_NORM_DOC.format(d=1, shape="``(N, C, L)`` or ``(C, L)``")


class InstanceNormAct2d(_InstanceNormAct, nn.InstanceNorm2d):
    __doc__ = _INSTANCE_NORM_DOC.format(d=2, shape="``(N, C, H, W)`` or ``(C, H, W)``")


class InstanceNormAct3d(_InstanceNormAct, nn.InstanceNorm3d):
    __doc__ = _INSTANCE_NORM_DOC.format(d=3, shape="``(N, C, D, H, W)`` or ``(C, D, H, W)``")
