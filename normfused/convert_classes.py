"""Which classes convert knows: normalisation layers, their fused classes, and the activations in their two forms."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import SyncBatchNormAct
from .modules import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    GroupNormAct,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
    LayerNormAct,
)

_FUSED_CLASS = {
    nn.BatchNorm1d: BatchNormAct1d,
    nn.BatchNorm2d: BatchNormAct2d,
    nn.BatchNorm3d: BatchNormAct3d,
    nn.GroupNorm: GroupNormAct,
}
# What revert knows beside them.
_PLAIN_CLASS: dict[type, type] = {
    **{fused: plain for plain, fused in _FUSED_CLASS.items()},
    SyncBatchNormAct: nn.SyncBatchNorm,
    InstanceNormAct1d: nn.InstanceNorm1d,
    InstanceNormAct2d: nn.InstanceNorm2d,
    InstanceNormAct3d: nn.InstanceNorm3d,
    LayerNormAct: nn.LayerNorm,
}
_NORM_BASES = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

ACTIVATION_CLASS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
}
_ACTIVATION_NAME = {cls: name for name, cls in ACTIVATION_CLASS.items()}
_ACTIVATION_FUNCTION: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.hardtanh: "hardtanh",
    F.hardtanh_: "hardtanh",
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("sigmoid", "sigmoid_"), "sigmoid"),
}
_CLAMP: set[Any] = {torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_"}
_SUM: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__"}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fused_class(plain: type) -> type | None:
    """The class that a layer of class ``plain`` becomes, or None."""
    if plain.__module__.startswith("timm."):
        from . import convert_timm

        return convert_timm.FUSED_CLASS.get(plain)
    return _FUSED_CLASS.get(plain)


def plain_class(fused: type) -> type | None:
    """The class that a layer of class ``fused`` was, or None."""
    return vars(fused).get("plain_class") or _PLAIN_CLASS.get(fused)


def is_norm(module: nn.Module) -> bool:
    """Whether a report names the module."""
    kind = norm_kind(module)
    return isinstance(module, _NORM_BASES) or kind.startswith(("BatchNorm", "GroupNorm", "FrozenBatchNorm"))


def norm_kind(module: nn.Module) -> str:
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def is_convertible(module: nn.Module | None) -> bool:
    return module is not None and fused_class(type(module)) is not None and why_not_convertible(module) is None


def why_not_convertible(module: nn.Module) -> str | None:
    """What keeps a layer of a class that can be fused from being touched, or None."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if getattr(module, "_fast_norm", False):
        return "timm's fast_norm computes it in low precision"
    drop, act = inner_modules(module)
    if drop is not None and not is_identity(drop):
        return f"it has a {type(drop).__name__} before its activation"
    if act is not None and not is_identity(act) and activation_name(act) is None:
        return f"its {type(act).__name__} is not an activation that can be fused"
    return None


def inner_modules(norm: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """(drop, act) of timm's layers, which hold what follows them; (None, None) of others."""
    return norm._modules.get("drop"), norm._modules.get("act")


def is_identity(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and "forward" not in vars(module) and not has_hooks(module)


def activation_name(module: nn.Module | None) -> str | None:
    """The fused name of an activation module, None for anything else."""
    if module is None or "forward" in vars(module):
        return None
    if type(module) is nn.Hardtanh:
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    if type(module) is nn.LeakyReLU and module.negative_slope != 0.01:
        return None
    return _ACTIVATION_NAME.get(type(module))


def called_activation(node: Any) -> str | None:
    """The fused name of a function or method that a node calls, None for anything else."""
    name = _ACTIVATION_FUNCTION.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None or not node.args:
        return None
    names = {"hardtanh": ("min_val", "max_val"), "leaky_relu": ("negative_slope",)}.get(name, ())
    arguments = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    arguments.pop("inplace", None)
    if name == "hardtanh":
        return "relu6" if (arguments.get("min_val", -1), arguments.get("max_val", 1)) == (0, 6) else None
    return name if arguments in ({}, {"negative_slope": 0.01}) else None


def is_clamp(node: Any) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _CLAMP


def is_sum(node: Any) -> Any:
    """Whether a node adds two values, as they are."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUM
        and len(node.args) == 2
        and not set(node.kwargs) - {"alpha"}
        and node.kwargs.get("alpha", 1) == 1
    )


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)
