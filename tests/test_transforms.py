"""Autocast, torch.func, forward-mode differentiation and double backward: native's numbers, or an error."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    FLOATS,
    activate,
    assert_same,
    names,
    native_batch_norm_act,
    randn,
    training_or_eval,
)
from torch import nn

from normfused import BatchNormAct1d, BatchNormAct2d, GroupNormAct
from normfused.functional import batch_norm_act, group_norm_act


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=names)
@training_or_eval
def test_autocast_on_the_cpu_keeps_the_input_dtype(backend, dtype, autocast_dtype, training):
    x = randn(4, 6, 5, 5, dtype=dtype)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    ours = BatchNormAct2d(6, dtype=parameter_dtype).train(training)
    native = nn.BatchNorm2d(6, dtype=parameter_dtype).train(training)
    groups = GroupNormAct(3, 6, dtype=parameter_dtype), nn.GroupNorm(3, 6, dtype=parameter_dtype)
    with torch.autocast("cpu", autocast_dtype):
        assert_same(ours(x), F.relu6(native(x)), "y")
        assert_same(groups[0](x), groups[1](x), "y")
    assert_same(ours.running_var, native.running_var, "running_var")


def functions(training, activation, native, statistics=None):
    """(batch_norm, group_norm) of (x, weight, bias), ours or native's."""
    mean, var = statistics or (None if training else torch.zeros(6), None if training else torch.ones(6))
    if native:
        return (
            lambda x, w, b: native_batch_norm_act(x, mean, var, w, b, training, 0.1, 1e-5, activation),
            lambda x, w, b: activate(F.group_norm(x, 3, w, b), activation),
        )
    return (
        lambda x, w, b: batch_norm_act(x, mean, var, w, b, training, activation=activation),
        lambda x, w, b: group_norm_act(x, 3, w, b, activation=activation),
    )


def test_vmap_over_training_that_tracks_raises(backend):
    x = randn(2, 4, 3, 5, 5)
    for module in (nn.BatchNorm2d(3), BatchNormAct2d(3)):
        before = module.running_mean.clone()
        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(module)(x)
        assert torch.equal(module.running_mean, before)


@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_vmap(backend, training, activation):
    arguments = randn(2, 4, 6, 5), randn(2, 6, seed=1), randn(2, 6, seed=2)
    pairs = zip(functions(training, activation, False), functions(training, activation, True), strict=True)
    for ours, native in pairs:
        assert_same(torch.vmap(ours)(*arguments), torch.vmap(native)(*arguments), "y", formats=False)


@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6", "hardswish"])
@pytest.mark.parametrize("transform", ["grad", "vmap_grad", "jacrev", "jvp", "hessian"])
def test_torch_func(backend, training, activation, transform):
    x, weight, bias = (
        randn(4, 6, 5, dtype=torch.float64),
        *(randn(6, dtype=torch.float64, seed=s) for s in (1, 2)),
    )
    mean = torch.zeros(6, dtype=torch.float64)
    statistics = None if training else (mean, mean + 1)
    statistics = (None, None) if training else statistics
    v = randn(4, 6, 5, dtype=torch.float64, seed=3)

    def apply(f):
        def loss(x, w, b):
            return (f(x, w, b) * v).sum()

        if transform == "grad":
            return torch.func.grad(loss, (0, 1, 2))(x, weight, bias)
        if transform == "vmap_grad":
            xs = torch.stack((x, x + v))
            return torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, None, None))(xs, weight, bias)
        if transform == "jacrev":
            return torch.func.jacrev(f, (1, 2))(x, weight, bias)
        if transform == "jvp":
            return torch.func.jvp(f, (x, weight, bias), (v, bias, weight))
        return torch.func.hessian(loss, (1, 2))(x, weight, bias)

    for ours, native in zip(
        functions(training, activation, False, statistics),
        functions(training, activation, True, statistics),
        strict=True,
    ):
        flat, native_flat = (torch.utils._pytree.tree_leaves(apply(f)) for f in (ours, native))
        assert len(flat) == len(native_flat) > 0
        for pair in zip(flat, native_flat, strict=True):
            assert_same(*pair, transform, formats=False)


@training_or_eval
def test_functional_call(backend, training):
    ours, native = BatchNormAct1d(6).train(training), nn.BatchNorm1d(6).train(training)
    x = randn(4, 6, 5)
    state = {name: randn(6, seed=7).abs() + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    state["num_batches_tracked"] = torch.tensor(3)

    def loss(parameters, module, buffers):
        y = torch.func.functional_call(module, (parameters, buffers), (x,))
        return (y if module is ours else F.relu6(y)).square().sum()

    results = []
    for module in (ours, native):
        buffers = {name: value.clone() for name, value in state.items()}
        parameters = {name: buffers.pop(name) for name in ("weight", "bias")}
        results.append((torch.func.grad(loss)(parameters, module, buffers), buffers))
    for mine, other in zip(*results, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert_same(mine[name], other[name], name)


@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
@pytest.mark.parametrize("dual", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_forward_mode(backend, training, activation, dual, requires_grad, kind):
    values = {
        "x": randn(4, 6, 5),
        "weight": randn(6, seed=1),
        "bias": randn(6, seed=2),
        "residual": randn(4, 6, 5),
    }
    tangent = randn(*values[dual].shape, seed=3)
    values[dual].requires_grad_(requires_grad)

    def run(ours):
        with forward_ad.dual_level():
            made = values | {dual: forward_ad.make_dual(values[dual], tangent)}
            x, weight, bias, residual = made.values()
            statistics = torch.zeros(6), torch.ones(6)
            if kind == "batch_norm" and ours:
                y = batch_norm_act(x, *statistics, weight, bias, training, activation=activation, residual=residual)
            elif kind == "batch_norm":
                y = native_batch_norm_act(x, *statistics, weight, bias, training, 0.1, 1e-5, activation, residual)
            elif ours:
                y = group_norm_act(x + residual, 3, weight, bias, activation=activation)
            else:
                y = activate(F.group_norm(x + residual, 3, weight, bias), activation)
            return forward_ad.unpack_dual(y)

    native, actual = run(ours=False), run(ours=True)
    assert actual.tangent is not None, "the tangent was dropped"
    assert_same(actual.primal, native.primal, "y")
    assert_same(actual.tangent, native.tangent, "tangent")


@training_or_eval
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_double_backward(backend, training, activation, kind):
    values = randn(4, 6, 5), randn(6, seed=1), randn(6, seed=2)
    statistics = (None, None) if training else (torch.zeros(6), torch.ones(6))
    dy = randn(4, 6, 5, seed=3)
    results = []
    for native in (False, True):
        wanted = [t.double().requires_grad_() for t in values]
        statistics64 = tuple(t if t is None else t.double() for t in statistics)
        f = functions(training, activation, native, statistics64)[kind == "group_norm"]
        grads = torch.autograd.grad(f(*wanted), wanted, dy.double().requires_grad_(), create_graph=True)
        second = torch.autograd.grad(sum(grad.pow(3).sum() for grad in grads), wanted, allow_unused=True)
        results.append(
            (*grads, *(torch.zeros_like(t) if g is None else g for g, t in zip(second, wanted, strict=True)))
        )
    for pair in zip(*results, strict=True):
        assert_same(*pair, "second order", formats=False)


def test_gradient_penalty_through_a_module(backend):
    """create_graph=True and a second backward through x: the statistics are updated once."""
    ours, native = BatchNormAct2d(3, activation="silu"), nn.BatchNorm2d(3)
    grads = []
    for module in (ours, native):
        x = randn(4, 3, 5, 5).requires_grad_()
        y = module(x) if module is ours else F.silu(module(x))
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        grads.append((x.grad, module.weight.grad, module.bias.grad))
    for pair in zip(*grads, strict=True):
        assert_same(*pair, "second order")
    assert_same(ours.running_var, native.running_var, "running_var")
    assert ours.num_batches_tracked.item() == 1
