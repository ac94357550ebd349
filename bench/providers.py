"""Who competes. A provider builds, for a case, a callable ``layer(x) -> y`` and its parameters (weight, bias)."""

import torch
import torch.nn.functional as F
from torch import nn

import normfused

EPS = 1e-5
MOMENTUM = 0.1


def _parameters(module, seed=0):
    """Give ``module`` seeded weights about 1 and biases about 0, the same for every provider; returns both."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
        module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
    return module.weight, module.bias


def eager(case):
    """PyTorch's own layers: nn.BatchNorm2d and nn.ReLU6(inplace=True), or nn.GroupNorm."""
    channels = case.shape[1]
    if case.groups is not None:
        norm = nn.GroupNorm(case.groups, channels, eps=EPS)
        return norm, _parameters(norm)
    norm = nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM)
    weight, bias = _parameters(norm)
    if case.form == "module":
        return nn.Sequential(norm, nn.ReLU6(inplace=True)), (weight, bias)

    # Looked up once: a functional call pays for no attribute of a module.
    running_mean, running_var = norm.running_mean, norm.running_var

    def functional(x):
        z = F.batch_norm(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
        return F.relu6(z, inplace=True)

    return functional, (weight, bias)


def compiled(case):
    """torch.compile of what ``eager`` runs, specialised to the case's shape."""
    layer, parameters = eager(case)
    return torch.compile(layer, dynamic=False), parameters


def fused(case):
    """normfused's modules, or its functional form."""
    channels = case.shape[1]
    if case.groups is not None:
        norm = normfused.GroupNormAct(case.groups, channels, eps=EPS, activation=None)
        return norm, _parameters(norm)
    norm = normfused.BatchNormAct2d(channels, eps=EPS, momentum=MOMENTUM, activation="relu6")
    weight, bias = _parameters(norm)
    if case.form == "module":
        return norm, (weight, bias)
    batch_norm_act = normfused.functional.batch_norm_act
    running_mean, running_var = norm.running_mean, norm.running_var

    def functional(x):
        return batch_norm_act(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS, activation="relu6")

    return functional, (weight, bias)


def triton(case):
    """What ``fused`` runs, served by normfused's Triton kernels."""
    layer, parameters = fused(case)

    def served(x):
        with normfused.use_backend("triton"):
            return layer(x)

    return served, parameters


# Triton takes part where there is a GPU: its interpreter is nothing to time. Whose ratios are reported comes last.
PROVIDERS = {
    "eager": eager,
    "compile": compiled,
    **({"triton": triton} if torch.accelerator.is_available() else {}),
    "normfused": fused,
}


def call(layer, parameters, x, dy, mode):
    """A callable without arguments that runs one training step of the layer in ``mode``, graph recording included."""
    if mode == "forward":
        return lambda: layer(x)
    wanted = (x, *parameters)
    # autograd.grad hands the gradients over and accumulates nowhere: no gradient has to be cleared between calls.
    return lambda: torch.autograd.grad(layer(x), wanted, dy)
