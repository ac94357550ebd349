"""Before a provider is timed its numbers are compared with normfused/reference.py in float64.

An element whose pre-activation z lies within rounding of a kink of the activation may rightly get either gradient: such
elements of dx are left out, and what they could add to a sum is allowed for there.
"""

import math
from dataclasses import dataclass

import torch

from normfused import reference

from . import cases
from .providers import EPS, OURS

# Where an activation's gradient jumps.
_KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}


@dataclass(frozen=True)
class Tolerances:
    """Of elements (absolute, relative), of sums over n elements as a multiple of sqrt(n), and the half-widths of the
    neighbourhoods of a kink at 0 and elsewhere: a 16-bit output is coarse at 6 but not at 0."""

    absolute: float
    relative: float
    summed: float
    near_0: float
    near_other: float


_TOLERANCES = {
    torch.float64: Tolerances(1e-10, 1e-10, 1e-10, 1e-10, 1e-10),
    torch.float32: Tolerances(1e-4, 1e-4, 3e-4, 5e-5, 5e-4),
    torch.float16: Tolerances(4e-3, 4e-3, 4e-3, 5e-5, 6e-3),
    torch.bfloat16: Tolerances(2e-2, 2e-2, 2e-2, 5e-5, 4e-2),
}

# Beyond so many values a channel tolerances grow with their number. Native's channels_last kernel, which is to be timed
# and not refused, adds them up in float32: over 401,408 values z is off by 2e-5 near 0 and 2e-4 near 6 (measured).
_MANY = 400_000
# That kernel loses more where all values are on one side of 0, as after a ReLU: up to 4 times the tolerance (measured).
_ONE_SIDED = 5


def _tolerances(case):
    """The Tolerances for a case: by the dtype of x, the number of values of a channel, and how z is rounded."""
    own = _TOLERANCES[cases.DTYPES[case.dtype]]
    growth = max(1.0, case.values_per_channel / _MANY) * (1 if case.pre_activation is None else _ONE_SIDED)
    # PyTorch's own layers round the normalised value before the residual is added: z near 0 is a difference.
    absolute, near_0 = (2 * own.absolute, own.near_other) if case.residual else (own.absolute, own.near_0)
    return Tolerances(absolute * growth, own.relative * growth, own.summed, near_0 * growth, own.near_other * growth)


# Elements a float64 chunk may have: the reference makes about ten temporaries of that size.
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 25}


def _view(t, x):
    return t.view(-1, *(1,) * (x.dim() - 2))


def _chunks(case, device_type):
    """Ranges of channels that share no statistics with others."""
    channels = case.shape[1]
    unit = 1 if case.groups is None else channels // case.groups
    step = max(1, _CHUNK.get(device_type, 1 << 22) // (case.values_per_channel * unit)) * unit
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def _means(t, groups):
    """Means over what shares statistics, to broadcast over ``t``: channels, or ``groups`` groups of each sample."""
    if groups is None:
        return t.mean([0, *range(2, t.dim())], keepdim=True)
    means = t.reshape(t.shape[0], groups, -1).mean(2).repeat_interleave(t.shape[1] // groups, 1)
    return means.view(*t.shape[:2], *(1,) * (t.dim() - 2))


def _training(case, x, dy, residual, weight, bias, tolerances):
    """(expected, allowed error) by name for some channels, all arguments in float64."""
    activation = case.activation
    groups = None if case.groups is None else case.groups * x.shape[1] // case.shape[1]
    if groups is None:
        stored, x = x, reference.FORWARD[case.pre_activation](x)
        mean, var = reference.batch_statistics(x)
        z = reference.batch_norm_act(x, weight, bias, residual, mean, var, EPS, None)
        dx, dweight, dbias, dz = reference.batch_norm_act_backward(
            dy, stored, weight, bias, residual, mean, None, True, EPS, activation, case.pre_activation
        )
    else:
        z = reference.group_norm_act(x, groups, weight, bias, EPS, None)
        dx, dweight, dbias = reference.group_norm_act_backward(dy, x, weight, bias, groups, EPS, activation)
        dz = None
    y = reference.FORWARD[activation](z)

    kink = torch.zeros_like(z, dtype=torch.bool)
    for where in _KINKS.get(activation, ()):
        kink |= (z - where).abs() < (tolerances.near_0 if where == 0 else tolerances.near_other)
    center = x - _means(x, groups)
    invstd = (_means(center.square(), groups) + EPS).rsqrt()
    x_hat = (center * invstd).abs()
    kink_dy = torch.where(kink, dy.abs(), 0.0)
    scaled = kink_dy * _view(weight.abs(), x)
    kink_dx = invstd * (_means(scaled, groups) + x_hat * _means(scaled * x_hat, groups))
    dims = [0, *range(2, x.dim())]
    floor = tolerances.summed * math.sqrt(case.values_per_channel)

    def allowed(t, more=0.0):
        return tolerances.absolute + tolerances.relative * t.abs() + more

    expected = {
        "y": (y, allowed(y)),
        "dx": (dx, torch.where(kink, math.inf, allowed(dx, kink_dx))),
        "dweight": (dweight, floor + tolerances.relative * dweight.abs() + (kink_dy * x_hat).sum(dims)),
        "dbias": (dbias, floor + tolerances.relative * dbias.abs() + kink_dy.sum(dims)),
    }
    if residual is not None:
        expected["dresidual"] = (dz, torch.where(kink, math.inf, allowed(dz)))
    return expected


def _evaluation(case, x, residual, weight, bias, statistics, tolerances):
    """The same for y in evaluation; ``statistics`` are (mean, var), not used by GroupNorm."""
    if case.groups is None:
        x = reference.FORWARD[case.pre_activation](x)
        y = reference.batch_norm_act(x, weight, bias, residual, *statistics, EPS, case.activation)
    else:
        groups = case.groups * x.shape[1] // case.shape[1]
        y = reference.group_norm_act(x, groups, weight, bias, EPS, case.activation)
    return {"y": (y, tolerances.absolute + tolerances.relative * y.abs())}


@torch.no_grad()
def check(case, inputs, parameters, results, statistics=None):
    """Compare providers' results with the reference.

    Args:
        case: what was run on ``inputs`` (cases.Inputs) with ``parameters`` (weight, bias).
        results: {provider: (y, dx, dweight, dbias)}, with dresidual at the end where the case has a residual; (y,) in
            evaluation.
        statistics: (running_mean, running_var) of evaluation; None: training.

    Returns:
        {provider: None or a sentence about its first wrong result}.
    """
    verdicts = {provider: _wrong_kind(case, inputs.x, got, provider in OURS) for provider, got in results.items()}
    tolerances = _tolerances(case)
    for channels in _chunks(case, inputs.x.device.type):
        x, dy, residual = (
            None if t is None else t[:, channels].double() for t in (inputs.x, inputs.dy, inputs.residual)
        )
        weight, bias = (p[channels].double() for p in parameters)
        if statistics is None:
            expected = _training(case, x, dy, residual, weight, bias, tolerances)
        else:
            chunk = [t[channels].double() for t in statistics]
            expected = _evaluation(case, x, residual, weight, bias, chunk, tolerances)
        for provider, got in results.items():
            for (name, (values, allowed)), tensor in zip(expected.items(), got, strict=True):
                if verdicts[provider] is None:
                    part = tensor[:, channels] if tensor.dim() > 1 else tensor[channels]
                    verdicts[provider] = _wrong_values(name, part, values, allowed)
    return verdicts


def _wrong_kind(case, x, got, keeps_format):
    full = [pair for pair in zip(("y", "dx", "dweight", "dbias", "dresidual"), got, strict=False) if pair[1].dim() > 1]
    for name, tensor in full:
        if (tensor.shape, tensor.dtype) != (x.shape, x.dtype):
            return f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(x.shape)} {x.dtype}"
    # PyTorch's own GroupNorm does not keep it on a GPU.
    if (
        keeps_format
        and case.layout == "channels_last"
        and not got[0].is_contiguous(memory_format=cases.memory_format(case))
    ):
        return "y is not channels_last as x is"
    return None


def _wrong_values(name, got, expected, allowed):
    excess = (got.double() - expected).abs() / allowed
    # Not "excess > 1": a NaN must be found too.
    wrong = ~(excess <= 1)
    count = int(wrong.sum())
    if count == 0:
        return None
    worst = float(torch.where(wrong, excess, 0.0).max())
    return f"{name}: {count} of {wrong.numel()} elements wrong, by up to {worst:.3g} times the tolerance"
