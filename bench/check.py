"""Before a provider is timed its numbers are compared with normfused/reference.py in float64.

An element whose pre-activation z lies within rounding of ReLU6's kinks (0 and 6) may rightly get either gradient:
such elements of dx are left out, and what they could add to a sum is allowed for there.
"""

import math

import torch

from normfused import reference

from . import cases
from .providers import EPS

# By dtype of x: absolute and relative tolerance of elements, tolerance of sums over n elements as a multiple of
# sqrt(n), half-width of the neighbourhoods of z = 0 and z = 6 (a 16-bit output is coarse at 6 but not at 0).
TOLERANCES = {
    torch.float32: (1e-4, 1e-4, 3e-4, 5e-5, 5e-4),
    torch.bfloat16: (2e-2, 2e-2, 2e-2, 5e-5, 4e-2),
}

# Beyond so many values a channel tolerances grow with their number. Native's channels_last kernel, which is to be timed
# and not refused, adds them up in float32: over 401,408 values z is off by 2e-5 near 0 and 2e-4 near 6 (measured).
_MANY = 400_000


def _tolerances(case):
    """TOLERANCES for a case: by the dtype of x and the number of values of a channel."""
    n, _, h, w = case.shape
    growth = max(1.0, n * h * w / _MANY)
    absolute, relative, summed, near_0, near_6 = TOLERANCES[cases.DTYPES[case.dtype]]
    return absolute * growth, relative * growth, summed, near_0 * growth, near_6 * growth


# Elements a float64 chunk may have: the reference makes about ten temporaries of that size.
_CHUNK = 1 << 22


def _view(t, x):
    return t.view(-1, *(1,) * (x.dim() - 2))


def _batch_norm(x, dy, weight, bias, tolerances):
    """(expected, allowed error) by name for some channels of BatchNorm + ReLU6; everything float64."""
    absolute, relative, summed, near_0, near_6 = tolerances
    mean, var = reference.batch_statistics(x)
    z = reference.batch_norm_act(x, weight, bias, None, mean, var, EPS, None)
    y = reference.FORWARD["relu6"](z)
    dx, dweight, dbias, _ = reference.batch_norm_act_backward(dy, x, weight, bias, None, mean, None, True, EPS, "relu6")
    n = x.numel() // x.shape[1]
    x_hat = (z - _view(bias, x)) / _view(weight, x)
    kink = (z.abs() < near_0) | ((z - 6).abs() < near_6)
    kink_dy = torch.where(kink, dy.abs(), 0.0)
    dims = [0, *range(2, x.dim())]
    kink_bias, kink_weight = kink_dy.sum(dims), (kink_dy * x_hat.abs()).sum(dims)
    scale = _view(weight * (var + EPS).rsqrt(), x)
    kink_dx = scale * (_view(kink_bias, x) + x_hat.abs() * _view(kink_weight, x)) / n
    allowed_dx = torch.where(kink, math.inf, absolute + relative * dx.abs() + kink_dx)
    floor = summed * math.sqrt(n)
    return {
        "y": (y, absolute + relative * y.abs()),
        "dx": (dx, allowed_dx),
        "dweight": (dweight, floor + relative * dweight.abs() + kink_weight),
        "dbias": (dbias, floor + relative * dbias.abs() + kink_bias),
    }


def _group_norm(x, dy, weight, bias, groups, tolerances):
    """(expected, allowed error) by name of GroupNorm; everything float64."""
    absolute, relative, summed, _, _ = tolerances
    y = reference.group_norm_act(x, groups, weight, bias, EPS, None)
    dx, dweight, dbias = reference.group_norm_act_backward(dy, x, weight, bias, groups, EPS, None)
    floor = summed * math.sqrt(x.numel() / x.shape[1])
    return {
        "y": (y, absolute + relative * y.abs()),
        "dx": (dx, absolute + relative * dx.abs()),
        "dweight": (dweight, floor + relative * dweight.abs()),
        "dbias": (dbias, floor + relative * dbias.abs()),
    }


def _chunks(case):
    """Ranges of channels: BatchNorm's are independent and checked few at a time, GroupNorm's all at once."""
    n, c, h, w = case.shape
    step = c if case.groups is not None else max(1, _CHUNK // (n * h * w))
    return [slice(start, min(start + step, c)) for start in range(0, c, step)]


@torch.no_grad()
def check(case, x, dy, parameters, results):
    """Compare providers' results with the reference.

    Args:
        case: what was run on ``x`` and ``dy`` with ``parameters`` (weight, bias).
        results: {provider: (y, dx, dweight, dbias)}.

    Returns:
        {provider: None or a sentence about its first wrong result}.
    """
    names = ("y", "dx", "dweight", "dbias")
    verdicts = {provider: _wrong_kind(case, x, got) for provider, got in results.items()}
    tolerances = _tolerances(case)
    for channels in _chunks(case):
        x64, dy64 = x[:, channels].double(), dy[:, channels].double()
        weight, bias = (p[channels].double() for p in parameters)
        if case.groups is None:
            expected = _batch_norm(x64, dy64, weight, bias, tolerances)
        else:
            expected = _group_norm(x64, dy64, weight, bias, case.groups, tolerances)
        for provider, got in results.items():
            for name, tensor in zip(names, got, strict=True):
                if verdicts[provider] is None:
                    part = tensor[:, channels] if tensor.dim() > 1 else tensor[channels]
                    verdicts[provider] = _wrong_values(name, part, *expected[name])
    return verdicts


def _wrong_kind(case, x, got):
    y, dx, _, _ = got
    for name, tensor in (("y", y), ("dx", dx)):
        if (tensor.shape, tensor.dtype) != (x.shape, x.dtype):
            return f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(x.shape)} {x.dtype}"
    if case.layout == "channels_last" and not y.is_contiguous(memory_format=torch.channels_last):
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
