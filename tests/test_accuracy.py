"""Errors against float64 on the rounded inputs: never much larger than those of PyTorch's own operators.

Forward: at most twice native's largest error, and one ulp. Gradients and statistics: three times, and a floor of a few
ulps of what was summed. The first tests check the reference itself.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    activate,
    assert_same,
    away_from_kinks,
    everything,
    in_layout,
    interpreted,
    names,
    native_batch_norm_act,
    randn,
    training_or_eval,
)

from normfused import backends, native, reference
from normfused.functional import batch_norm_act, group_norm_act

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 2, 3, 5, 7, 31, 33, 64, 65, 129)[:: 1 if everything else 2]
SPATIAL = {
    1: ((), (1,), (1, 1), (1, 1, 1)),
    2: ((2,), (2, 1), (1, 2, 1)),
    3: ((3,), (1, 3), (3, 1, 1)),
    7: ((7,), (7, 1), (1, 1, 7)),
    49: ((49,), (7, 7), (7, 1, 7)),
    1023: ((1023,), (31, 33), (11, 3, 31)),
    1025: ((1025,), (25, 41), (5, 41, 5)),
}
EPS, MOMENTUM, NAN = 1e-5, 0.1, float("nan")
# Activations whose gradient changes with every bit of z, which is rounded to 16 bits where x has so many.
CURVED = ("silu", "hardswish", "sigmoid")

# The worst errors of this run, {(backend, operator, input, quantity, dtype): [ours, native's]}, in ulps of the largest
# term: what conformance.py writes into docs/accuracy.md.
WORST = {}


def _cases(backend):
    """Every C with every S; N, dimensions, layout, activation, residual and mode take turns."""
    # Triton's interpreter takes milliseconds for each program, and a program for each large plane.
    most = (8192 if everything else 2048) if interpreted(backend) else math.inf
    cases = []
    for i, channels in enumerate(CHANNELS):
        for j, shapes in enumerate(SPATIAL.values()):
            turn = i * len(SPATIAL) + j
            shape = (2 + turn % 8, channels, *shapes[(i + j) % len(shapes)])
            layout = "channels_last" if len(shape) >= 4 and turn % 3 else "contiguous"
            if math.prod(shape) <= most:
                cases.append((turn, shape, layout, ACTIVATIONS[turn % len(ACTIVATIONS)], turn % 5 == 0, turn % 4 != 3))
    return cases


def double(*tensors):
    return [None if t is None else t.detach().double() for t in tensors]


def error(actual, exact):
    """|actual - exact|: 0 where actual is exact rounded (inf and NaN too), inf where it is NaN and should not be."""
    rounded = exact.to(actual.dtype)
    right = (actual == rounded) | (actual.isnan() & rounded.isnan())
    difference = (actual.double() - exact).abs().nan_to_num(math.inf, math.inf)
    return torch.where(right & ~rounded.isfinite(), 0.0, difference)


def largest(t):
    return t.max().item() if t.numel() else 0.0


def size(t):
    """The largest absolute value among those that are finite: an inf or NaN elsewhere says nothing about the others."""
    return largest(t.abs().nan_to_num(0, 0, 0))


def record(where, what, dtype, ours, theirs, scale):
    """Keeps the worst of each kind; ``where``: (operator, input), None for what is not to be reported."""
    if where is not None and scale > 0:
        unit = torch.finfo(dtype).eps * scale
        worst = WORST.setdefault((backends._override, *where, what, dtype), [0.0, 0.0])
        worst[:] = max(worst[0], ours / unit), max(worst[1], theirs / unit)


def reference_ulps(dtype, mean, var):
    """Ulps that ``exact``, computed in float64, may be off by: in the precision of the other dtypes none."""
    return 64 * (1 + size(mean / (var + EPS).sqrt())) if dtype == torch.float64 else 1


def check_forward(actual, native, exact, terms, where=None, ulps=1):
    """``terms``: the sum of the absolute values that z is the sum of; the ulp is one of theirs.

    The mean is one of them: it is kept in float32.
    """
    # Where exact is not finite, only itself is right.
    terms = (terms + exact.abs()).nan_to_num(0, 0, 0)
    ulp = torch.finfo(actual.dtype).eps * terms * ulps + torch.finfo(actual.dtype).tiny
    ours, theirs = error(actual.detach(), exact), largest(error(native.detach(), exact))
    record(where, "y", actual.dtype, largest(ours), theirs, largest(terms))
    excess = 0 if theirs == math.inf else largest(ours - 2 * theirs - ulp)
    assert excess <= 0, f"y: {excess} too much; native is off by {theirs}"


def sum_of_terms(z, mean, weight, bias, residual):
    """|x_hat * weight| + |mean / sigma * weight| + |bias| + |residual|, given z and mean / sigma."""
    added = torch.zeros_like(z) if bias is None else reference._per_channel(bias, z).expand(z.shape)
    residual = torch.zeros_like(z) if residual is None else residual
    weight = 1 if weight is None else reference._per_channel(weight, z)
    return (z - added - residual).abs() + (mean * weight).abs() + added.abs() + residual.abs()


def smallest(dtype):
    """The smallest denormal."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def statistics_eps(dtype):
    """Unit of rounding of what statistics are kept in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def sizes(dz, x_hat, scale):
    """Of the terms of dx, and of the sums dweight and dbias as if their terms' signs were random, and of dresidual."""
    dweight, dbias = (reference._channel_sum(t.square()).sqrt() for t in (dz * x_hat, dz))
    return size(dz * scale), size(dweight), size(dbias), size(dz)


def z_rounding(z, dy, dtype, activation):
    """By how much dz may change where z is rounded to the 16 bits of ``dtype``: its relative error is that of z times
    z, and the tails of the curved activations' gradients are exponentials."""
    dz, ulp = reference.BACKWARD[activation](z, dy), torch.finfo(dtype).eps * z.abs()
    if activation not in CURVED or dtype.itemsize > 2:
        return torch.zeros_like(dz)
    return torch.maximum(*((reference.BACKWARD[activation](z + off, dy) - dz).abs() for off in (ulp, -ulp)))


def mean_rounding(dy, x_hat, weight, bias, residual, ulp, invstd, average, add_up, activation):
    """How the mean's rounding may change the gradients (dx, dweight, dbias, dresidual), in training.

    It is kept in float32, and its error moves every x_hat of the batch or group the same way: float64 arithmetic with
    that mean is as far off. Few values make it matter: dz and x_hat then all but cancel in dx, and native may be lucky.

    ``ulp``: the mean's, in sigmas; ``average``: over the batch or group; ``add_up``: over a channel's elements with the
    same mean.
    """

    def gradients(x_hat):
        z = reference._affine(x_hat, weight, bias)
        dz = reference.BACKWARD[activation](z if residual is None else z + residual, dy)
        g = dz if weight is None else dz * reference._per_channel(weight, dz)
        dx = invstd * (g - average(g) - x_hat * average(g * x_hat))
        return dx, add_up(dz * x_hat), add_up(dz), dz

    exact = gradients(x_hat)
    changes = [
        [(moved - t).abs() for moved, t in zip(gradients(x_hat + off), exact, strict=True)] for off in (ulp, -ulp)
    ]
    dx, dweight, dbias, dresidual = (torch.maximum(*pair) for pair in zip(*changes, strict=True))
    channels = x_hat.shape[1]
    return size(dx), *(size(t.view(-1, channels).sum(0)) for t in (dweight, dbias)), size(dresidual)


def check_sums(actual, native, exact, scale, what, where=None, ulps=1, more=0.0, terms=1):
    """``scale``: the size of what was added up to get ``exact``, whose rounding no algorithm escapes.

    ``more``: what the rounding of z to 16 bits and that of the mean may change; ``terms``: how many were added up.
    """
    if what.startswith("running"):
        # The statistics of an infinity: inf or NaN, there is nothing to choose.
        actual, exact = (t.masked_fill(~exact.isfinite() & ~t.isfinite(), math.inf) for t in (actual, exact))
    ours, theirs = largest(error(actual.detach(), exact)), largest(error(native.detach(), exact))
    scale = max(size(exact), scale)
    record(where, what, actual.dtype, ours, theirs, scale)
    floor = 8 * torch.finfo(actual.dtype).eps * ulps * scale + more
    # Below the smallest normal number every product is rounded to a denormal, and then multiplied by 1 / sigma.
    floor += smallest(torch.promote_types(actual.dtype, torch.float32)) * terms / math.sqrt(EPS) + smallest(
        actual.dtype
    )
    assert ours <= 3 * theirs + floor, f"{what}: {ours}, native {theirs}, floor {floor}"


def upstream(exact_z, native_z, activation, layout):
    """A gradient for y, 0 where the error of z may decide on which side of a kink it is; laid out as named."""
    distance = 12 * torch.finfo(native_z.dtype).eps + 3 * largest(error(native_z.detach(), exact_z))
    keep = away_from_kinks(exact_z, activation, distance)
    dy = randn(*exact_z.shape, dtype=native_z.dtype, seed=9)
    # What is expanded cannot be masked.
    dy = dy if layout.startswith("expanded") and keep.all() else dy.masked_fill(~keep, 0)
    return in_layout(dy, "contiguous" if layout.startswith("expanded") and not keep.all() else layout), keep


def check_batch_norm(x, weight, bias, residual, activation, training, dy_layout="contiguous", tracks=True, label=None):
    """Compares ours and native's errors; ``label`` is the input's name in docs/accuracy.md."""
    where = None if label is None else ("batch_norm", label)
    channels = x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = next((t.dtype for t in (weight, bias) if t is not None), dtype)
    start = SimpleNamespace(
        mean=randn(channels, dtype=dtype, seed=7), var=randn(channels, dtype=dtype, seed=8).abs() + 0.5
    )
    ours = SimpleNamespace(mean=start.mean.clone(), var=start.var.clone())
    theirs = SimpleNamespace(mean=start.mean.clone(), var=start.var.clone())
    wanted = [t for t in (x, weight, bias, residual) if t is not None]

    statistics = (ours.mean, ours.var) if tracks else (None, None)
    y = batch_norm_act(
        x,
        *statistics,
        weight,
        bias,
        training,
        MOMENTUM,
        EPS,
        activation=activation,
        residual=residual,
    )
    native_z = native_batch_norm_act(x, theirs.mean, theirs.var, weight, bias, training, MOMENTUM, EPS, None, residual)
    native_y = activate(native_z, activation)

    x64, weight64, bias64, residual64, mean, var = double(x, weight, bias, residual, start.mean, start.var)
    running = reference.running_statistics(x64, mean, var, MOMENTUM) if training else (mean, var)
    if training:
        mean, var = reference.batch_statistics(x64)
    z64 = reference.batch_norm_act(x64, weight64, bias64, residual64, mean, var, EPS, None)
    terms = sum_of_terms(z64, reference._per_channel(mean / (var + EPS).sqrt(), z64), weight64, bias64, residual64)
    ulps = reference_ulps(x.dtype, mean, var)
    check_forward(y, native_y, reference.FORWARD[activation](z64), terms, where, ulps)
    if tracks:
        scale = size(x64) if training else 0
        check_sums(ours.mean, theirs.mean, running[0], scale, "running_mean", where, ulps)
        check_sums(ours.var, theirs.var, running[1], 0, "running_var", where, ulps)

    dy, keep = upstream(z64, native_z, activation, dy_layout)
    arguments = dy.double(), x64, weight64, bias64, residual64, mean, (var + EPS).rsqrt()
    exact = reference.batch_norm_act_backward(*arguments, training, EPS, activation)
    *_, dz = reference.batch_norm_act_backward(*arguments, False, EPS, activation)
    x_hat = reference.batch_norm_act(x64, None, None, None, mean, var, EPS, None)
    scale = reference._affine(reference._per_channel((var + EPS).rsqrt(), x64).unsqueeze(0), weight64, None)
    scales = sizes(dz, x_hat, scale)
    rounding = sizes(z_rounding(z64, dy.double(), x.dtype, activation), x_hat, scale)
    through_mean = (0.0,) * 4
    if training:
        mean, invstd = (reference._per_channel(t, x64) for t in (mean, (var + EPS).rsqrt()))

        def average(t):
            return t.mean([0, *range(2, t.dim())], keepdim=True)

        ulp = statistics_eps(x.dtype) * mean * invstd
        add_up = reference._channel_sum
        through_mean = mean_rounding(
            dy.double(), x_hat, weight64, bias64, residual64, ulp, invstd, average, add_up, activation
        )
    compare_gradients(
        y, native_y, wanted, dy, (x, weight, bias, residual), exact, scales, rounding, through_mean, where, ulps
    )
    return keep


def check_group_norm(x, groups, weight, bias, activation, dy_layout="contiguous", label=None):
    where = None if label is None else ("group_norm", label)
    wanted = [t for t in (x, weight, bias) if t is not None]
    y = group_norm_act(x, groups, weight, bias, EPS, activation=activation)
    native_z = native.group_norm_act(x, groups, weight, bias, EPS, None)
    native_y = activate(native_z, activation)
    x64, weight64, bias64 = double(x, weight, bias)
    z64 = reference.group_norm_act(x64, groups, weight64, bias64, EPS, None)
    mean, var = reference.group_statistics(x64, groups)
    rstd = (var + EPS).rsqrt()
    terms = sum_of_terms(z64, reference._per_group(mean * rstd, x64), weight64, bias64, None)
    ulps = reference_ulps(x.dtype, mean, var)
    check_forward(y, native_y, reference.FORWARD[activation](z64), terms, where, ulps)

    dy, keep = upstream(z64, native_z, activation, dy_layout)
    exact = reference.group_norm_act_backward(dy.double(), x64, weight64, bias64, groups, EPS, activation)
    dz = reference.BACKWARD[activation](z64, dy.double())
    x_hat = reference.group_norm_act(x64, groups, None, None, EPS, None)
    scale = reference._affine(reference._per_group(rstd, x64), weight64, None)
    scales = sizes(dz, x_hat, scale)
    rounding = sizes(z_rounding(z64, dy.double(), x.dtype, activation), x_hat, scale)

    def average(t):
        return reference._per_group(t.reshape(t.shape[0], groups, -1).mean(2), t)

    def add_up(t):
        return t.reshape(*t.shape[:2], -1).sum(2)

    mean, rstd = (reference._per_group(t, x64) for t in (mean, rstd))
    ulp = statistics_eps(x.dtype) * mean * rstd
    through_mean = mean_rounding(dy.double(), x_hat, weight64, bias64, None, ulp, rstd, average, add_up, activation)
    compare_gradients(y, native_y, wanted, dy, (x, weight, bias), exact, scales, rounding, through_mean, where, ulps)
    return keep


def compare_gradients(y, native_y, wanted, dy, arguments, exact, scales, rounding, through_mean, where, ulps):
    grads = iter(torch.autograd.grad(y, wanted, dy))
    native_grads = iter(torch.autograd.grad(native_y, wanted, dy))
    allowed = (sum(two) for two in zip(rounding, through_mean, strict=True))
    for what, t, exact_grad, scale, more in zip(
        ("dx", "dweight", "dbias", "dresidual"), arguments, exact, scales, allowed, strict=False
    ):
        if t is not None:
            terms = y.numel() // t.numel()
            check_sums(next(grads), next(native_grads), exact_grad, scale, what, where, ulps, more, terms)


def operands(shape, layout, dtype, turn, x=None):
    """x in its layout, and weight and bias in float32 or in the dtype of x, by turns; some are missing."""
    parameter_dtype = torch.float32 if turn % 2 else dtype
    x = randn(*shape, seed=turn) if x is None else x
    weight = None if turn % 7 == 5 else randn(shape[1], dtype=parameter_dtype, seed=turn + 1).requires_grad_()
    bias = None if turn % 7 == 5 else randn(shape[1], dtype=parameter_dtype, seed=turn + 2).requires_grad_()
    return in_layout(x.to(dtype), layout).requires_grad_(), weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("channels", CHANNELS)
def test_batch_norm(backend, dtype, channels):
    for turn, shape, layout, activation, has_residual, training in _cases(backend):
        if shape[1] == channels:
            x, weight, bias = operands(shape, layout, dtype, turn)
            residual = randn(*shape, dtype=dtype, seed=turn + 3) if has_residual else None
            residual = residual if residual is None else in_layout(residual, layout).requires_grad_()
            keep = check_batch_norm(x, weight, bias, residual, activation, training, label="normal numbers")
            assert keep.double().mean() > 0.5, "too much is left out for a comparison"


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("channels", CHANNELS)
def test_group_norm(backend, dtype, channels):
    for turn, shape, layout, activation, *_ in _cases(backend):
        if shape[1] == channels:
            divisors = [g for g in range(1, channels + 1) if channels % g == 0]
            if interpreted(backend):
                divisors = [g for g in divisors if shape[0] * g <= 64]
            groups = divisors[turn % len(divisors)]
            x, weight, bias = operands(shape, layout, dtype, turn)
            keep = check_group_norm(x, groups, weight, bias, activation, label="normal numbers")
            assert keep.double().mean() > 0.5, "too much is left out for a comparison"


def hard_input(kind, shape):
    """Inputs on which a careless variance fails."""
    x = randn(*shape, seed=3)
    if kind == "outlier":
        x[0, 0].view(-1)[0] = 1e4
        return x
    if kind.startswith("constant"):
        return torch.full(shape, float(kind.split()[1]))
    if kind.startswith("mean/sigma"):
        return x + float(kind.split()[1])
    if kind == "small sigma":
        return 100 + 0.01 * x
    return x * float(kind.split()[1])


HARD = (
    *("constant 0", "constant 1", "constant 3.14", "constant 100.1", "constant 30000"),
    *("mean/sigma 1e2", "mean/sigma 1e4", "mean/sigma 1e6", "small sigma"),
    *("scale 1e30", "scale 1e18", "scale 1e-6", "scale 1e-20", "outlier"),
)


HARD_CASES = [(kind, dtype) for kind in HARD for dtype in DTYPES if hard_input(kind, (2, 2)).to(dtype).isfinite().all()]


@pytest.mark.parametrize(("kind", "dtype"), HARD_CASES, ids=names)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (3, 34, 33, 31), (2, 300, 1, 1)], ids=names)
def test_hard_inputs(backend, kind, dtype, layout, shape):
    if interpreted(backend) and shape == (3, 34, 33, 31) and not everything:
        pytest.skip("seconds, interpreted: pytest --all")
    x = hard_input(kind, shape)
    activations = list(enumerate((None, "relu6", "silu")))
    if interpreted(backend):
        activations = [activations[(len(kind) + len(layout)) % 3]]
    for turn, activation in activations:
        operand = operands(shape, layout, dtype, turn, x)
        check_batch_norm(*operand, None, activation, True, label=kind)
        check_group_norm(operand[0], 2, *operand[1:], activation, label=kind)


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names)
def test_sums_of_squares_do_not_overflow(backend, dtype):
    """#126525: in float16 the sum of a large plane's squares is inf."""
    x = randn(4, 8, 100, 100, dtype=dtype) * 200
    check_batch_norm(x.requires_grad_(), None, None, None, "relu6", True)
    check_group_norm(x, 2, None, None, "relu6")


# The rule itself


def test_a_nan_leaves_the_other_values_their_rule():
    exact = torch.tensor([NAN, 1.0], dtype=torch.float64)
    rounded, wrong = exact.float(), torch.tensor([NAN, 1 + 1e-4])
    terms = torch.tensor([NAN, 3.0])
    check_sums(rounded + torch.finfo(torch.float32).eps, rounded, exact, size(terms), "dx")
    with pytest.raises(AssertionError, match="dx"):
        check_sums(wrong, rounded, exact, size(terms), "dx")
    with pytest.raises(AssertionError, match="dx: inf"):
        check_sums(rounded, torch.ones(2), torch.ones(2, dtype=torch.float64), size(terms), "dx")


@pytest.mark.parametrize("activation", [None, "hardswish"])
def test_what_the_rounding_of_the_mean_may_change(activation):
    """As much as float64 arithmetic with a mean half an ulp off is off, and little more."""
    x = torch.tensor([[[10000.5048828125, 10001.908203125]]], dtype=torch.float64)
    mean, var = reference.batch_statistics(x)
    assert mean.float() - mean == 2.0**-11
    dy, invstd = randn(1, 1, 2, dtype=torch.float64, seed=9), (var + EPS).rsqrt()

    def average(t):
        return t.mean().view(1, 1, 1)

    ulp = torch.finfo(torch.float32).eps * mean * invstd
    x_hat = (x - mean) * invstd
    allowed = mean_rounding(dy, x_hat, None, None, None, ulp, invstd, average, reference._channel_sum, activation)
    exact = reference.batch_norm_act_backward(dy, x, None, None, None, mean, invstd, True, EPS, activation)
    off = (x - mean.float().double()) * invstd
    dz = reference.BACKWARD[activation](off, dy)
    with_rounded_mean = (invstd * (dz - average(dz) - off * average(dz * off)), (dz * off).sum(), dz.sum(), dz)
    quantities = ("dx", "dweight", "dbias", "dresidual")
    for what, most, t, right in zip(quantities, allowed, with_rounded_mean, exact, strict=True):
        assert largest((t - right).abs()) <= most <= 4 * largest((t - right).abs()), what


# The reference itself, against PyTorch's operators in float64


@training_or_eval
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [False, True])
def test_the_batch_norm_reference(training, activation, affine):
    values = [randn(4, 6, 5, 3, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1)]
    weight, bias = (randn(6, dtype=torch.float64, seed=s).requires_grad_() if affine else None for s in (2, 3))
    mean, var = randn(6, dtype=torch.float64, seed=4), randn(6, dtype=torch.float64, seed=5).abs() + 0.5
    state = mean.clone(), var.clone()
    y = native_batch_norm_act(values[0], *state, weight, bias, training, MOMENTUM, EPS, activation, values[1])
    if training:
        for actual, native in zip(reference.running_statistics(values[0], mean, var, MOMENTUM), state, strict=True):
            assert_same(actual.detach(), native, "running statistics")
        mean, var = reference.batch_statistics(values[0])
    actual = reference.batch_norm_act(values[0], weight, bias, values[1], mean, var, EPS, activation)
    assert_same(actual, y, "y")
    dy = randn(4, 6, 5, 3, dtype=torch.float64, seed=6)
    wanted = [t for t in (values[0], weight, bias, values[1]) if t is not None]
    native_grads = torch.autograd.grad(y, wanted, dy)
    assert_same_list(torch.autograd.grad(actual, wanted, dy), native_grads)
    grads = reference.batch_norm_act_backward(
        dy, values[0], weight, bias, values[1], mean, (var + EPS).rsqrt(), training, EPS, activation
    )
    assert_same_list([g for g, t in zip(grads, (1, weight, bias, 1), strict=True) if t is not None], native_grads)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_group_norm_reference(activation, groups):
    x, weight, bias = (
        randn(*shape, dtype=torch.float64, seed=seed).requires_grad_()
        for seed, shape in enumerate(((4, 6, 5, 3), (6,), (6,)))
    )
    dy = randn(4, 6, 5, 3, dtype=torch.float64, seed=6)
    y = activate(F.group_norm(x, groups, weight, bias, EPS), activation)
    actual = reference.group_norm_act(x, groups, weight, bias, EPS, activation)
    assert_same(actual, y, "y")
    native_grads = torch.autograd.grad(y, (x, weight, bias), dy)
    assert_same_list(torch.autograd.grad(actual, (x, weight, bias), dy), native_grads)
    grads = reference.group_norm_act_backward(dy, x, weight, bias, groups, EPS, activation)
    assert_same_list(grads, native_grads)


def assert_same_list(actual, native):
    for pair in zip(actual, native, strict=True):
        assert_same(*pair, "gradient", formats=False)
