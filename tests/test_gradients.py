"""gradcheck and gradgradcheck in float64: the derivatives are those of what the forward computes."""

import zlib

import pytest
import torch
from helpers import ACTIVATIONS, KINKS, away_from_kinks, in_layout, names, pre_activation, randn
from torch.autograd import gradcheck, gradgradcheck

from normfused import info, reference, use_backend
from normfused.functional import batch_norm_act, group_norm_act

EPS = 0.1

# (shape, layout, training, has weight, has bias, has residual); the activations take turns.
BATCH_NORM = (
    ((2, 1), "contiguous", True, True, True, False),
    ((7, 3), "contiguous", True, True, True, True),
    ((7, 3), "permuted", True, False, True, False),
    ((5, 2), "sliced", False, True, False, True),
    ((3, 3), "reversed", False, False, False, False),
    ((2, 2, 3), "contiguous", True, True, True, True),
    ((3, 2, 5), "permuted", True, True, False, False),
    ((3, 3, 2), "offset", True, False, False, True),
    ((1, 2, 7), "contiguous", True, True, True, False),
    ((2, 3, 3), "reversed", False, True, True, True),
    ((2, 2, 2, 3), "contiguous", True, True, True, False),
    ((2, 2, 2, 3), "channels_last", True, True, True, True),
    ((3, 1, 2, 2), "channels_last", True, True, True, False),
    ((2, 3, 1, 2), "channels_last", True, False, True, True),
    ((1, 3, 2, 2), "channels_last", True, True, False, False),
    ((2, 2, 3, 2), "channels_last_offset", False, True, True, False),
    ((2, 2, 3, 2), "channel_slice", True, True, True, True),
    ((2, 2, 3, 2), "sliced", False, False, False, False),
    ((1, 2, 2, 2, 2), "contiguous", True, True, True, False),
    ((2, 2, 1, 2, 2), "channels_last", True, True, True, True),
    ((2, 1, 2, 2, 2), "permuted", False, True, True, False),
    ((0, 2, 3), "contiguous", True, True, True, False),
)
# (shape, layout, groups, has weight, has bias).
GROUP_NORM = (
    ((2, 4), "contiguous", 2, True, True),
    ((3, 6), "permuted", 1, True, True),
    ((2, 4, 3), "contiguous", 2, True, True),
    ((1, 6, 2), "sliced", 3, True, False),
    ((2, 3, 4), "reversed", 3, False, False),
    ((2, 3, 5), "offset", 1, True, True),
    ((2, 4, 2, 2), "contiguous", 4, True, True),
    ((2, 4, 2, 2), "channels_last", 2, True, True),
    ((1, 4, 3, 2), "channels_last", 1, False, False),
    ((2, 2, 2, 3), "channels_last_offset", 2, True, True),
    ((2, 4, 1, 2, 2), "contiguous", 2, True, False),
    ((1, 4, 2, 2, 2), "channels_last", 2, True, True),
)


def turns(cases):
    """Each case with two of the activations, so that every activation meets every kind of case."""
    pairs = []
    for index, case in enumerate(cases):
        for shift in (0, 3):
            marks = pytest.mark.thorough(interpreted=True) if index % 4 or shift else ()
            pairs.append(pytest.param(*case, ACTIVATIONS[(index + shift) % len(ACTIVATIONS)], marks=marks))
    return pairs


def drawn_until_smooth(draw, z_of, activation):
    """The first draw whose z is nowhere within 1e-3 of a kink."""
    for seed in range(100):
        values = draw(seed)
        if away_from_kinks(z_of(values), activation, 1e-3).all():
            return [t if t is None else t.requires_grad_() for t in values]
    raise AssertionError("no draw keeps away from the kinks")


def check(function, values, backend):
    present = [t for t in values if t is not None]

    def of_present(*arguments):
        remaining = iter(arguments)
        return function(*(None if t is None else next(remaining) for t in values))

    # Where a call takes long, along random directions instead of element by element.
    fast = backend == "triton"
    assert gradcheck(of_present, present, fast_mode=fast)
    assert gradgradcheck(of_present, present, atol=1e-4, fast_mode=fast)


@pytest.mark.parametrize(
    ("shape", "layout", "training", "has_weight", "has_bias", "has_residual", "activation"),
    turns(BATCH_NORM),
    ids=names,
)
def test_batch_norm(backend, shape, layout, training, has_weight, has_bias, has_residual, activation):
    channels = shape[1]
    mean = randn(channels, dtype=torch.float64, seed=7)
    var = randn(channels, dtype=torch.float64, seed=8).abs() + 0.5

    def draw(seed):
        seed = 10 * seed + zlib.crc32(repr(shape).encode()) % 1000
        x = in_layout(2 * randn(*shape, dtype=torch.float64, seed=seed), layout)
        weight = 2 * randn(channels, dtype=torch.float64, seed=seed + 1) if has_weight else None
        bias = 2 * randn(channels, dtype=torch.float64, seed=seed + 2) if has_bias else None
        residual = 2 * randn(*shape, dtype=torch.float64, seed=seed + 3) if has_residual else None
        return x, weight, bias, residual

    def z_of(values):
        statistics = (None, None) if training else (mean, var)
        return pre_activation(*values, EPS, *statistics)

    def function(x, weight, bias, residual):
        statistics = mean.clone(), var.clone()
        return batch_norm_act(x, *statistics, weight, bias, training, eps=EPS, activation=activation, residual=residual)

    check(function, drawn_until_smooth(draw, z_of, activation), backend)


@pytest.mark.parametrize(
    ("shape", "layout", "groups", "has_weight", "has_bias", "activation"), turns(GROUP_NORM), ids=names
)
def test_group_norm(backend, shape, layout, groups, has_weight, has_bias, activation):
    def draw(seed):
        seed = 10 * seed + zlib.crc32(repr(shape).encode()) % 1000
        x = in_layout(2 * randn(*shape, dtype=torch.float64, seed=seed), layout)
        weight = 2 * randn(shape[1], dtype=torch.float64, seed=seed + 1) if has_weight else None
        bias = 2 * randn(shape[1], dtype=torch.float64, seed=seed + 2) if has_bias else None
        return x, weight, bias

    def z_of(values):
        return reference.group_norm_act(values[0], groups, *values[1:], EPS, None)

    def function(x, weight, bias):
        return group_norm_act(x, groups, weight, bias, EPS, activation=activation)

    check(function, drawn_until_smooth(draw, z_of, activation), backend)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("pre_activation_name", [name for name in ACTIVATIONS if name is not None])
def test_activation_before_the_norm(backend, activation, pre_activation_name):
    def draw(seed):
        return (randn(3, 2, 5, dtype=torch.float64, seed=seed) * 3,)

    def function(x):
        return batch_norm_act(
            x, None, None, training=True, eps=EPS, activation=activation, pre_activation=pre_activation_name
        )

    check(function, drawn_until_smooth(draw, lambda values: values[0], pre_activation_name), backend)


@pytest.mark.parametrize("wanted", range(1, 15))
def test_only_the_wanted_gradients(backend, wanted):
    """Every subset of x, weight, bias and residual gets the same gradients as when all want one."""
    values = [randn(3, 4, 5), randn(4, seed=1), randn(4, seed=2), randn(3, 4, 5, seed=3)]

    def grads_of(mask):
        arguments = [t.clone().requires_grad_(bool(mask >> index & 1)) for index, t in enumerate(values)]
        x, weight, bias, residual = arguments
        y = batch_norm_act(x, None, None, weight, bias, True, residual=residual)
        y.backward(randn(3, 4, 5, seed=4))
        return [t.grad for t in arguments]

    everything = grads_of(0b1111)
    for index, grad in enumerate(grads_of(wanted)):
        if wanted >> index & 1:
            torch.testing.assert_close(grad, everything[index])
        else:
            assert grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=names)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(60, 128), (9, 48, 2, 2), (300, 32, 1)], ids=str)
def test_a_gradient_that_is_kept_is_the_same(shape, activation, dtype):
    """The CPU kernels keep dz where a panel's columns fill whole vectors: not so without the last channel."""
    if not info()["extension"]["built"]:
        pytest.skip("no C++ core")
    x, dy = (randn(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = (randn(shape[1], dtype=dtype, seed=seed) for seed in (3, 4))

    def gradients(channels):
        leaves = [t.detach().clone().requires_grad_() for t in (x[:, :channels], weight[:channels], bias[:channels])]
        with use_backend("extension"):
            y = batch_norm_act(leaves[0], None, None, *leaves[1:], True, activation=activation)
            return torch.autograd.grad(y, leaves, dy[:, :channels])

    channels = shape[1] - 1
    for whole, part in zip(gradients(shape[1]), gradients(channels), strict=True):
        torch.testing.assert_close(whole[:, :channels] if whole.dim() > 1 else whole[:channels], part)


def test_the_kinks_are_where_the_activations_bend():
    """Guards the resampling: one-sided slopes differ at each listed kink."""
    for activation, kinks in KINKS.items():
        for kink in kinks:
            z = torch.tensor([kink - 1e-6, kink, kink + 1e-6], dtype=torch.float64)
            left, right = reference.FORWARD[activation](z).diff() / 1e-6
            assert abs(left - right) > 0.1 or abs(reference.BACKWARD[activation](z, z * 0 + 1).diff()).max() > 0.1
