"""What a drop-in replacement must do exactly: kinks, NaN, order of updates, what is saved, modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, KINKS, activate, assert_same, native_batch_norm_act, randn, training_or_eval
from torch import nn

from normfused import BatchNormAct1d, BatchNormAct2d, reference
from normfused.functional import batch_norm_act, group_norm_act

INF, NAN = float("inf"), float("nan")


def plain(x, activation, weight=None, bias=None):
    """An evaluation with mean 0, variance 1 and eps 0: z is exactly ``x * weight + bias``."""
    mean = torch.zeros(x.shape[1], dtype=x.dtype if weight is None else weight.dtype)
    return batch_norm_act(x, mean, mean + 1, weight, bias, eps=0.0, activation=activation)


def module_state(module):
    return [copy.deepcopy(buffer) for buffer in module.buffers()]


def assert_modules_agree(ours, native, x):
    """Feeds both modules and compares their outputs and all their buffers."""
    assert_same(ours(x.clone()), activate(native(x.clone()), ours.activation), "y")
    for buffer, native_buffer in zip(module_state(ours), module_state(native), strict=True):
        assert_same(buffer, native_buffer, "buffer")


# Kinks, NaN and infinities


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name is not None])
@pytest.mark.parametrize("count", [1, 7, 64, 67])
def test_gradient_at_the_kinks(backend, activation, count):
    for kink in (0.0, *KINKS[activation]):
        x = torch.full((count, 1), kink).requires_grad_()
        (dx,) = torch.autograd.grad(plain(x, activation).sum(), x)
        (native_dx,) = torch.autograd.grad(activate(x, activation).sum(), x)
        torch.testing.assert_close(dx, native_dx, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_gradient_at_the_kinks_under_create_graph(backend, activation):
    for kink in KINKS[activation]:
        x = torch.full((5, 1), kink).requires_grad_()
        (dx,) = torch.autograd.grad(plain(x, activation).sum(), x, create_graph=True)
        (native_dx,) = torch.autograd.grad(activate(x, activation).sum(), x)
        torch.testing.assert_close(dx.detach(), native_dx, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "z", "rounded"),
    [(torch.bfloat16, 5.99, 6.0), (torch.float16, 5.9995, 6.0), (torch.float16, 1e-9, 0.0)],
)
@pytest.mark.parametrize("count", [1, 67])
@pytest.mark.parametrize("create_graph", [False, True])
def test_mask_comes_from_z_rounded_to_the_output_dtype(backend, dtype, z, rounded, count, create_graph):
    x = torch.ones(count, 1, dtype=dtype, requires_grad=True)
    y = plain(x, "relu6", torch.tensor([z]), torch.zeros(1))
    assert torch.equal(y, torch.full_like(y, rounded))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("create_graph", [False, True])
def test_mask_of_group_norm_comes_from_z_rounded_to_the_output_dtype(backend, create_graph):
    x = randn(2, 4, 9, dtype=torch.bfloat16).requires_grad_()
    weight, bias = torch.full((4,), 1e-3, requires_grad=True), torch.full((4,), 5.99, requires_grad=True)
    y = group_norm_act(x, 2, weight, bias, activation="relu6")
    assert torch.equal(y, torch.full_like(y, 6.0))
    grads = torch.autograd.grad(y, (x, weight, bias), randn(2, 4, 9).bfloat16(), create_graph=create_graph)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("poison", [INF, -INF, NAN])
@training_or_eval
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_gradient_is_selected_not_multiplied(backend, activation, poison, training, kind):
    x, weight, bias = randn(4, 6, 5, 7).requires_grad_(), randn(6).requires_grad_(), randn(6).requires_grad_()
    dy = randn(4, 6, 5, 7, seed=1)
    if kind == "batch_norm":
        y = batch_norm_act(x, torch.zeros(6), torch.ones(6), weight, bias, training, activation=activation)
    else:
        y = group_norm_act(x, 3, weight, bias, activation=activation)
    dead = (y == 0) | (y == 6) if activation == "relu6" else y == 0
    clean = torch.autograd.grad(y, (x, weight, bias), dy.masked_fill(dead, 0), retain_graph=True)
    poisoned = torch.autograd.grad(y, (x, weight, bias), dy.masked_fill(dead, poison))
    assert dead.any()
    assert all(torch.equal(*pair) for pair in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_nan_out_in_eval(backend, activation):
    x = randn(67, 3)
    x[1::2] = NAN
    y = plain(x, activation)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_nan_or_inf_makes_its_channel_nan_in_training(backend, activation, bad):
    x = randn(5, 4, 9)
    x[2, 1, 3] = bad
    y = batch_norm_act(x, None, None, training=True, activation=activation)
    native_y = native_batch_norm_act(x, None, None, None, None, True, 0.1, 1e-5, activation)
    assert y[:, 1].isnan().all()
    assert_same(y, native_y)


@pytest.mark.stricter_than_native("relu6's gradient at NaN is 0 in CPU vector blocks and 1 in scalar tails")
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("count", [1, 8, 16, 64, 67])
def test_a_nan_z_passes_dy(backend, activation, count):
    x, bias = torch.full((count, 1), NAN, requires_grad=True), torch.zeros(1, requires_grad=True)
    dy = randn(count, 1)
    y = plain(x, activation, torch.ones(1), bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert torch.equal(dx, dy)
    torch.testing.assert_close(dbias, dy.sum(0))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "silu", "leaky_relu", None])
def test_negative_zero_stays(backend, activation):
    x = torch.tensor([[-0.0], [0.0]]).repeat(33, 1)
    y = plain(x, activation, torch.ones(1), torch.tensor([-0.0]))
    assert torch.equal(y.signbit(), x.signbit())
    assert not y.any()


@pytest.mark.parametrize("count", [1, 67])
def test_infinities_in_eval(backend, count):
    x = torch.tensor([[INF, -INF]]).repeat(count, 1)
    assert torch.equal(plain(x, "relu6"), torch.tensor([[6.0, 0.0]]).repeat(count, 1))
    assert torch.equal(plain(x, "relu"), torch.tensor([[INF, 0.0]]).repeat(count, 1))


# Order of updates


@pytest.mark.parametrize(("shape", "eps"), [((1, 3), 1e-5), ((1, 3, 1), 1e-5), ((4, 3), 0.0), ((4, 3), -1.0)])
def test_counter_is_incremented_before_the_error(backend, shape, eps):
    ours, native = BatchNormAct1d(3, eps=eps), nn.BatchNorm1d(3, eps=eps)
    for module in (native, ours):
        with pytest.raises(ValueError, match="training"):
            module(torch.ones(shape))
        mean, var, counter = module.buffers()
        assert counter.item() == 1
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.ones(3))


def test_a_wrong_number_of_channels_leaves_the_state_as_native(backend):
    ours, native = BatchNormAct1d(3), nn.BatchNorm1d(3)
    for module in (native, ours):
        with pytest.raises(RuntimeError):
            module(randn(4, 5))
    assert [b.tolist() for b in ours.buffers()] == [b.tolist() for b in native.buffers()]


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.5])
def test_running_statistics_formula(backend, momentum):
    x, mean, var = randn(6, 3, 5) * 2 + 1, randn(3), randn(3).abs()
    expected = reference.running_statistics(x.double(), mean.double(), var.double(), momentum)
    y = batch_norm_act(x, mean, var, training=True, momentum=momentum, activation=None)
    torch.testing.assert_close(mean, expected[0].float())
    torch.testing.assert_close(var, expected[1].float())
    torch.testing.assert_close(y.var([0, 2], unbiased=False), torch.ones(3), rtol=1e-4, atol=0)


def test_momentum_none_averages_cumulatively(backend):
    ours, native = BatchNormAct2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for step in range(5):
        assert_modules_agree(ours, native, randn(4, 3, 5, 5, seed=step) * (step + 1))
    assert ours.num_batches_tracked.item() == 5
    assert_modules_agree(ours.eval(), native.eval(), randn(4, 3, 5, 5))


def test_momentum_none_without_a_counter_has_factor_0(backend):
    ours, native = BatchNormAct2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    ours.num_batches_tracked = native.num_batches_tracked = None
    assert_modules_agree(ours, native, randn(4, 3, 5, 5))
    assert torch.equal(ours.running_mean, torch.zeros(3))


def test_functional_momentum_none_raises_as_native(backend):
    for function in (F.batch_norm, batch_norm_act):
        with pytest.raises(TypeError):
            function(randn(4, 3), torch.zeros(3), torch.ones(3), training=True, momentum=None)


# What is saved for the backward


@training_or_eval
@pytest.mark.parametrize(
    "activation",
    [
        *(None, "relu6", "silu", "hardswish", "leaky_relu"),
        *(
            pytest.param(name, marks=pytest.mark.stricter_than_native(f"{name} saves its output"))
            for name in ("relu", "sigmoid")
        ),
    ],
)
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_output_may_be_edited_before_backward(backend, training, activation, kind):
    x, weight = randn(4, 3, 5, 5).requires_grad_(), randn(3, seed=1).requires_grad_()
    dy = randn(4, 3, 5, 5, seed=2)
    grads = []
    for edit in (0, 1):
        if kind == "batch_norm":
            mean, var = torch.zeros(3), torch.ones(3)
            y = batch_norm_act(x, mean, var, weight, None, training, activation=activation)
        else:
            y = group_norm_act(x, 3, weight, activation=activation)
        y += edit
        grads.append(torch.autograd.grad(y, (x, weight), dy))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@training_or_eval
@pytest.mark.parametrize("edited", ["x", "weight"])
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_editing_what_is_saved_raises(backend, training, edited, kind):
    saved = {"x": randn(4, 3, 5).requires_grad_(), "weight": randn(3).requires_grad_()}
    if kind == "batch_norm":
        y = batch_norm_act(saved["x"], torch.zeros(3), torch.ones(3), saved["weight"], training=training)
    else:
        y = group_norm_act(saved["x"], 3, saved["weight"], activation="relu6")
    with torch.no_grad():
        saved[edited].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), saved["x"])


@pytest.mark.stricter_than_native("batch_norm saves the running buffers themselves (#175024)")
@training_or_eval
def test_running_buffers_may_be_edited_before_backward(backend, training):
    x, dy = randn(4, 3, 5).requires_grad_(), randn(4, 3, 5, seed=1)
    grads = []
    for edit in (0, 1):
        mean, var = randn(3, seed=2), randn(3, seed=3).abs() + 0.1
        y = batch_norm_act(x, mean, var, training=training)
        mean += edit
        var += edit
        grads.append(torch.autograd.grad(y, x, dy)[0])
    assert torch.equal(*grads)


def test_two_forwards_then_one_backward(backend):
    ours, native = BatchNormAct1d(3, activation="relu6"), nn.BatchNorm1d(3)
    x = randn(4, 3), randn(4, 3, seed=1)
    (ours(x[0]) * ours(x[1])).sum().backward()
    (F.relu6(native(x[0])) * F.relu6(native(x[1]))).sum().backward()
    assert_same(ours.weight.grad, native.weight.grad, "dweight")
    assert_same(ours.running_var, native.running_var, "running_var")


# Modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_updates_statistics(backend, mode):
    ours, native = BatchNormAct2d(3), nn.BatchNorm2d(3)
    with mode():
        assert_modules_agree(ours, native, randn(4, 3, 5, 5))
    assert ours.num_batches_tracked.item() == 1
    assert ours.running_mean.any()


def test_eval_without_tracking_uses_batch_statistics(backend):
    ours = BatchNormAct2d(3, track_running_stats=False).eval()
    native = nn.BatchNorm2d(3, track_running_stats=False).eval()
    assert_modules_agree(ours, native, randn(4, 3, 5, 5) + 5)
    assert_modules_agree(ours.train(), native.train(), randn(4, 3, 5, 5) + 5)
    for module in (native.eval(), ours.eval()):
        with pytest.raises(ValueError, match="when training"):
            module(randn(1, 3, 1, 1))


def test_tracking_toggled_off_after_construction(backend):
    ours, native = BatchNormAct2d(3), nn.BatchNorm2d(3)
    assert_modules_agree(ours, native, randn(4, 3, 5, 5) + 5)
    ours.track_running_stats = native.track_running_stats = False
    before = module_state(ours)
    assert_modules_agree(ours, native, randn(4, 3, 5, 5) - 5)
    assert all(torch.equal(*pair) for pair in zip(before, module_state(ours), strict=True))
    assert_modules_agree(ours.eval(), native.eval(), randn(4, 3, 5, 5))


def test_tracking_toggled_on_after_construction(backend):
    ours, native = BatchNormAct2d(3, track_running_stats=False), nn.BatchNorm2d(3, track_running_stats=False)
    ours.track_running_stats = native.track_running_stats = True
    assert_modules_agree(ours, native, randn(4, 3, 5, 5))
    assert ours.running_mean is None
    assert ours.num_batches_tracked is None
