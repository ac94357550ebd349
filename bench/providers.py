"""Who competes. A provider builds, for a case, a Layer: what is called, and how."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import normfused

from . import cases
from . import onednn as onednn_library

EPS = 1e-5
MOMENTUM = 0.1


class Unavailable(Exception):
    """Why a provider cannot take part."""


@dataclass(frozen=True)
class Layer:
    """``run(x)`` or ``run(x, residual)`` gives y; ``context()`` is what it has to be called in."""

    run: Callable
    parameters: tuple  # (weight, bias)
    context: Callable = contextlib.nullcontext


def statistics(case, device):
    """(running_mean, running_var) of evaluation: about x's own, seeded."""
    generator = torch.Generator().manual_seed(1)
    channels = case.shape[1]
    mean = torch.randn(channels, generator=generator) * 0.3 + 0.5
    return mean.to(device), (torch.rand(channels, generator=generator) + 3.5).to(device)


def _prepare(norm, case, device, training):
    """Give a layer seeded weights about 1, biases about 0 and statistics, the same for every provider."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.3)
        norm.to(device, torch.float64 if case.dtype == "float64" else torch.float32).train(training)
        if case.groups is None and not training:
            for buffer, value in zip((norm.running_mean, norm.running_var), statistics(case, device), strict=True):
                buffer.copy_(value)
    return norm


ACTIVATIONS = {
    "relu": functools.partial(nn.ReLU, inplace=True),
    "relu6": functools.partial(nn.ReLU6, inplace=True),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": functools.partial(nn.LeakyReLU, inplace=True),
}


class _Residual(nn.Module):
    """As torchvision writes it: the residual is added in place."""

    def __init__(self, norm, activation):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x, residual):
        z = self.norm(x)
        z += residual
        return self.activation(z)


def _with_activation(norm, case):
    """``norm`` followed by the case's residual and activation, as PyTorch's own modules."""
    if case.pre_activation is not None:
        # Not in place: x is a leaf, and what overwrote it would need a copy, which costs more.
        norm = nn.Sequential(ACTIVATIONS[case.pre_activation](inplace=False), norm)
    activation = nn.Identity() if case.activation is None else ACTIVATIONS[case.activation]()
    if case.residual:
        return _Residual(norm, activation)
    return norm if case.activation is None else nn.Sequential(norm, activation)


def _modules(case, device, training):
    """(PyTorch's own modules for a case, (weight, bias))."""
    channels = case.shape[1]
    if case.groups is not None:
        norm = nn.GroupNorm(case.groups, channels, eps=EPS)
    else:
        norm = (nn.BatchNorm2d if len(case.shape) == 4 else nn.BatchNorm3d)(channels, eps=EPS, momentum=MOMENTUM)
    _prepare(norm, case, device, training)
    return _with_activation(norm, case).train(training), (norm.weight, norm.bias)


def eager(case, device, training):
    """PyTorch's own layers, nn.BatchNorm2d and nn.ReLU6(inplace=True) say, or their functional forms."""
    layer, (weight, bias) = _modules(case, device, training)
    if case.form == "module":
        return Layer(layer, (weight, bias))

    # Looked up once: a functional call pays for no attribute of a module.
    running_mean, running_var = layer[0].running_mean, layer[0].running_var

    def functional(x):
        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS)
        return F.relu6(z, inplace=True)

    return Layer(functional, (weight, bias))


def _keeps_what_backward_reads():
    # A graph of backward calls is replayed, so that a compiled backward must not reuse the memory of its inputs.
    return torch._functorch.config.patch(donated_buffer=False)


def _compile(case, device, training, mode):
    layer = eager(case, device, training)
    context = contextlib.nullcontext if torch.device(device).type == "cpu" else _keeps_what_backward_reads
    return Layer(torch.compile(layer.run, dynamic=False, mode=mode), layer.parameters, context)


def compiled(case, device, training):
    """torch.compile of what ``eager`` runs, specialised to the case's shape."""
    return _compile(case, device, training, None)


def compiled_max_autotune(case, device, training):
    """The same, with the kernels' configurations searched for."""
    return _compile(case, device, training, "max-autotune-no-cudagraphs")


def fused(case, device, training):
    """normfused's modules, or its functional form, served by the backend that serves them by default."""
    channels, activation = case.shape[1], case.activation
    if case.groups is not None:
        norm = normfused.GroupNormAct(case.groups, channels, eps=EPS, activation=activation)
    else:
        kind = normfused.BatchNormAct2d if len(case.shape) == 4 else normfused.BatchNormAct3d
        norm = kind(channels, eps=EPS, momentum=MOMENTUM, activation=activation, pre_activation=case.pre_activation)
    _prepare(norm, case, device, training)
    weight, bias = norm.weight, norm.bias
    if case.form == "module":
        return Layer(norm, (weight, bias))
    batch_norm_act = normfused.functional.batch_norm_act
    running_mean, running_var = norm.running_mean, norm.running_var

    def functional(x):
        return batch_norm_act(
            x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS, activation=activation
        )

    return Layer(functional, (weight, bias))


def triton(case, device, training):
    """What ``fused`` runs, served by normfused's Triton kernels."""
    if torch.device(device).type == "cpu":
        raise Unavailable("not on this device: Triton compiles for GPUs, and its interpreter is nothing to time")
    layer = fused(case, device, training)
    return Layer(layer.run, layer.parameters, functools.partial(normfused.use_backend, "triton"))


# Ways in which csrc/kernels/cuda/launch_plan.h can divide a call, where they can serve it; it chooses one by itself.
LAUNCH_PATHS = ("two_kernels", "block", "cluster", "cooperative")


@contextlib.contextmanager
def launch_path(path):
    """Calls of the CUDA kernels in the block go one of LAUNCH_PATHS where it can serve them."""
    torch.ops.normfused.use_launch_path(path)
    try:
        yield
    finally:
        torch.ops.normfused.use_launch_path("automatic")


def on_path(case, device, training, path):
    """What ``fused`` runs, by the CUDA kernels on a given path."""
    if torch.device(device).type == "cpu":
        raise Unavailable("not on this device: only the CUDA kernels have launch paths")
    layer = fused(case, device, training)

    @contextlib.contextmanager
    def context():
        with normfused.use_backend("extension"), launch_path(path):
            yield

    return Layer(layer.run, layer.parameters, context)


def _import(name):
    try:
        return importlib.import_module(name)
    except Exception as error:
        # Whatever a package raises that was built for another torch.
        raise Unavailable(f"{name.split('.')[0]} does not import: {error}") from error


def liger(case, device, training):
    """Liger's Triton GroupNorm (https://github.com/linkedin/Liger-Kernel)."""
    module = _import("liger_kernel.transformers.group_norm")
    norm = _prepare(module.LigerGroupNorm(case.shape[1], case.groups, eps=EPS), case, device, training)
    return Layer(_with_activation(norm, case), (norm.weight, norm.bias))


def inplace_abn(case, device, training):
    """InPlaceABN (https://github.com/mapillary/inplace_abn), followed by the activation. It overwrites its input, so
    that it is given a copy, whose time counts."""
    module = _import("inplace_abn")
    norm = module.InPlaceABN(case.shape[1], eps=EPS, momentum=MOMENTUM, activation="identity")
    layer = _with_activation(_prepare(norm, case, device, training), case)
    return Layer(lambda x, *residual: layer(x.clone(), *residual), (norm.weight, norm.bias))


def apex(case, device, training):
    """apex.contrib's GroupNorm (https://github.com/NVIDIA/apex): channels_last, with SiLU or without activation."""
    module = _import("apex.contrib.group_norm")
    if case.layout != "channels_last" or case.activation not in (None, "silu"):
        raise Unavailable("apex's GroupNorm takes channels_last, and no activation but SiLU")
    norm = module.GroupNorm(case.groups, case.shape[1], eps=EPS, act=case.activation or "")
    _prepare(norm, case, device, training)
    return Layer(norm, (norm.weight, norm.bias))


def onednn(case, device, training):
    """oneDNN's BatchNorm with its ReLU fused, of Debian's libdnnl2 (https://github.com/uxlfoundation/oneDNN)."""
    if torch.device(device).type != "cpu" or case.dtype not in ("float32", "bfloat16"):
        raise Unavailable("oneDNN's BatchNorm is measured on the CPU, in float32 and bfloat16")
    norm = _prepare(nn.BatchNorm2d(case.shape[1], eps=EPS), case, device, training)
    x = torch.empty(case.shape, dtype=cases.DTYPES[case.dtype], memory_format=cases.memory_format(case))
    fixed = None if training else (norm.running_mean, norm.running_var)
    try:
        run = onednn_library.batch_norm_relu(x, norm.weight, norm.bias, EPS, fixed)
    except OSError as error:
        raise Unavailable(f"oneDNN 2 is not installed (Debian: apt-get install libdnnl2): {error}") from error
    return Layer(run, (norm.weight, norm.bias))


# Whose ratios are reported comes last.
PROVIDERS = {
    "eager": eager,
    "compile": compiled,
    "compile-max": compiled_max_autotune,
    "liger": liger,
    "inplace_abn": inplace_abn,
    "apex": apex,
    "onednn": onednn,
    "triton": triton,
    **{f"path-{path}": functools.partial(on_path, path=path) for path in LAUNCH_PATHS},
    "normfused": fused,
}
OURS = ("normfused", "triton", *(f"path-{path}" for path in LAUNCH_PATHS))
# Importable name of a peer, and whether it has the layer of a case.
_PACKAGES = {"liger": "liger_kernel", "inplace_abn": "inplace_abn", "apex": "apex"}
_GROUP_NORM_ONLY = ("liger", "apex")
_BATCH_NORM_ONLY = ("inplace_abn",)


def defaults(device_type):
    """Names of the providers that take part unless others are asked for: peers where they are installed."""
    found = [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package) is not None]
    own = ["triton"] if device_type != "cpu" else ["onednn"] if onednn_library.version() else []
    return [name for name in PROVIDERS if name in ("eager", "compile", "normfused", *found, *own)]


def applies(name, case):
    """Whether a provider has the layer of a case at all."""
    if name == "onednn":
        wanted = (None, None, "relu", False, "module")
        return (case.groups, case.pre_activation, case.activation, case.residual, case.form) == wanted
    if (case.groups is None and name in _GROUP_NORM_ONLY) or (case.form == "functional" and name in _PACKAGES):
        return False
    return case.groups is None or name not in _BATCH_NORM_ONLY


def wanted(inputs, parameters):
    """What gradients are asked for: x, weight, bias, residual."""
    return (inputs.x, *parameters, *(() if inputs.residual is None else (inputs.residual,)))


def call(layer, inputs, mode):
    """(setup or None, function) that run a layer in ``mode``, graph recording included.

    ``function()`` is what is timed; it takes the result of ``setup()`` where there is a setup.
    """
    run, arguments, dy = layer.run, inputs.arguments, inputs.dy
    if mode in ("forward", "eval"):
        return None, lambda: run(*arguments)
    tensors = wanted(inputs, layer.parameters)
    # autograd.grad hands the gradients over and accumulates nowhere: no gradient has to be cleared between calls.
    if mode == "backward":
        return (lambda: run(*arguments)), lambda y: torch.autograd.grad(y, tensors, dy)
    return None, lambda: torch.autograd.grad(run(*arguments), tensors, dy)
