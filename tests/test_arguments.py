"""Which arguments are taken, and what the others raise: sizes, dtypes, None, empty, one value, eps."""

import pytest
import torch
import torch.nn.functional as F
from helpers import activate, assert_same, names, native_batch_norm_act, randn, training_or_eval
from torch import nn

from normfused import BatchNormAct1d, BatchNormAct2d, GroupNormAct
from normfused.functional import batch_norm_act, group_norm_act

HALVES = (torch.bfloat16, torch.float16)


def assert_same_with_gradients(y, native_y, wanted, dy):
    assert_same(y, native_y, "y")
    grads, native_grads = (torch.autograd.grad(out, wanted, dy) for out in (y, native_y))
    for grad, native_grad in zip(grads, native_grads, strict=True):
        assert_same(grad, native_grad, "gradient")


@pytest.mark.parametrize("missing", [0, 1])
def test_one_of_the_running_statistics(backend, missing):
    statistics = [torch.zeros(3), torch.ones(3)]
    statistics[missing] = None
    for function in (F.batch_norm, batch_norm_act):
        with pytest.raises(RuntimeError):
            function(randn(4, 3), *statistics, training=False)
        with pytest.raises(ValueError, match="running_mean and running_var must"):
            function(randn(4, 3), *statistics, training=True)
        with pytest.raises(RuntimeError):
            function(randn(4, 3), None, None, training=False)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (4, 3, 0), (4, 3, 0, 5), (2, 3, 4, 5, 0)])
@training_or_eval
def test_empty_batch_norm(backend, shape, training):
    x, weight, bias = (
        torch.empty(shape, requires_grad=True),
        randn(3).requires_grad_(),
        randn(3).requires_grad_(),
    )
    mean, var, counter = randn(3), randn(3).abs(), torch.tensor(4)
    before = mean.clone(), var.clone()
    y = batch_norm_act(x, mean, var, weight, bias, training)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(3))
    assert torch.equal(dbias, torch.zeros(3))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    if x.dim() == 4:
        module = BatchNormAct2d(3).train(training)
        module.num_batches_tracked.copy_(counter)
        module(x)
        assert module.num_batches_tracked.item() == counter + training
        assert torch.equal(module.running_var, torch.ones(3))


@pytest.mark.parametrize("training", [True, False])
def test_no_channels_with_parameters_raises(backend, training):
    for module in (nn.BatchNorm2d(0), BatchNormAct2d(0)):
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            module.train(training)(torch.empty(2, 0, 3, 3))


@pytest.mark.parametrize(
    "shape",
    [
        (0, 4),
        (0, 4, 3),
        (0, 4, 3, 3),
        pytest.param((2, 4, 0), marks=pytest.mark.stricter_than_native("dweight is NaN")),
        pytest.param((2, 4, 3, 0), marks=pytest.mark.stricter_than_native("dweight is NaN")),
    ],
    ids=names,
)
def test_empty_group_norm(backend, shape):
    x, weight, bias = (
        torch.empty(shape, requires_grad=True),
        randn(4).requires_grad_(),
        randn(4).requires_grad_(),
    )
    y = group_norm_act(x, 2, weight, bias, activation="relu6")
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(4))
    assert torch.equal(dbias, torch.zeros(4))


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_batch_norm_with_weight_only_or_bias_only(backend, has_weight, has_bias, training, activation):
    x, dy = randn(4, 6, 5, 5).requires_grad_(), randn(4, 6, 5, 5, seed=1)
    weight = randn(6, seed=2).requires_grad_() if has_weight else None
    bias = randn(6, seed=3).requires_grad_() if has_bias else None
    statistics = torch.zeros(6), torch.ones(6)
    y = batch_norm_act(x, *statistics, weight, bias, training, activation=activation)
    native_y = native_batch_norm_act(x, *statistics, weight, bias, training, 0.1, 1e-5, activation)
    assert_same_with_gradients(y, native_y, [t for t in (x, weight, bias) if t is not None], dy)


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_group_norm_with_weight_only_or_bias_only(backend, has_weight, has_bias, activation):
    x, dy = randn(4, 6, 5, 5).requires_grad_(), randn(4, 6, 5, 5, seed=1)
    weight = randn(6, seed=2).requires_grad_() if has_weight else None
    bias = randn(6, seed=3).requires_grad_() if has_bias else None
    y = group_norm_act(x, 3, weight, bias, activation=activation)
    # Native's backward raises when there is a bias alone, hence the ones.
    native_y = activate(F.group_norm(x, 3, torch.ones(6) if weight is None else weight, bias), activation)
    assert_same_with_gradients(y, native_y, [t for t in (x, weight, bias) if t is not None], dy)


def test_eps(backend):
    x, statistics = randn(4, 6), (torch.zeros(6), torch.ones(6))
    for eps in (0.0, -1e-5):
        with pytest.raises(ValueError, match="eps must be positive"):
            batch_norm_act(x, *statistics, training=True, eps=eps)
    with pytest.raises(ValueError, match="eps must"):
        batch_norm_act(x, *statistics, eps=-1e-5)
    assert_same(batch_norm_act(x, *statistics, eps=0.0), F.relu6(F.batch_norm(x, *statistics, eps=0.0)))
    for eps in (0.0, -1e-5, -10.0):
        assert_same(group_norm_act(x, 2, eps=eps), F.group_norm(x, 2, eps=eps))


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 4, 1, 1, 1)], ids=names)
def test_one_value(backend, shape):
    x, statistics = randn(*shape), (torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        batch_norm_act(x, *statistics, training=True)
    assert torch.equal(statistics[0], torch.zeros(4))
    assert torch.equal(statistics[1], torch.ones(4))
    assert_same(batch_norm_act(x, *statistics, activation=None), F.batch_norm(x, *statistics))
    with pytest.raises(ValueError, match="more than 1 value per"):
        group_norm_act(x, 4)
    for native_allows in (x.expand(2, *shape[1:]), torch.ones(2, 4)):
        assert_same(group_norm_act(native_allows, 4), F.group_norm(native_allows, 4))
    assert_same(group_norm_act(x, 2), F.group_norm(x, 2))


# dtypes


@pytest.mark.parametrize("dtype", HALVES, ids=names)
@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_16_bit_input_with_float32_parameters(backend, dtype, training, activation):
    x, dy = randn(4, 3, 5, 5, dtype=dtype).requires_grad_(), randn(4, 3, 5, 5, dtype=dtype, seed=1)
    weight, bias = randn(3, seed=2).requires_grad_(), randn(3, seed=3).requires_grad_()
    statistics, native_statistics = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
    y = batch_norm_act(x, *statistics, weight, bias, training, activation=activation)
    native_y = native_batch_norm_act(x, *native_statistics, weight, bias, training, 0.1, 1e-5, activation)
    assert y.dtype == dtype
    assert_same_with_gradients(y, native_y, (x, weight, bias), dy)
    assert_same(statistics[0], native_statistics[0], "running_mean")
    assert_same(statistics[1], native_statistics[1], "running_var")
    y = group_norm_act(x, 3, weight, bias, activation=activation)
    native_y = activate(F.group_norm(x, 3, weight, bias), activation)
    assert_same_with_gradients(y, native_y, (x, weight, bias), dy)


@pytest.mark.parametrize("dtype", HALVES, ids=names)
def test_16_bit_modules_keep_16_bit_running_statistics(backend, dtype):
    ours, native = BatchNormAct2d(3, activation=None).to(dtype), nn.BatchNorm2d(3).to(dtype)
    for step in range(4):
        x = randn(4, 3, 5, 5, dtype=dtype, seed=step) + step
        assert_same(ours(x), native(x), "y")
    assert ours.running_mean.dtype == dtype
    assert ours.num_batches_tracked.item() == 4
    assert_same(ours.running_mean, native.running_mean, "running_mean")
    assert_same(ours.running_var, native.running_var, "running_var")
    assert_same(ours.eval()(x), native.eval()(x), "y")


# What is wrong: (dtype of x, of weight and bias, of the running statistics).
MIXES = (
    (torch.float32, torch.float16, torch.float16),
    (torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float32, torch.float16),
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.bfloat16),
)


@pytest.mark.parametrize("dtypes", MIXES, ids=names)
@training_or_eval
def test_mixed_dtypes_that_raise(backend, dtypes, training):
    x, parameter, statistic = (torch.ones(4, 3, dtype=dtype) for dtype in dtypes)
    for function in (F.batch_norm, batch_norm_act):
        with pytest.raises(RuntimeError):
            function(x, statistic[0], statistic[0], parameter[0], parameter[0], training=training)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float64, torch.float32)], ids=names)
def test_mixed_dtypes_of_group_norm_that_raise(backend, dtypes):
    x, parameter = (torch.ones(4, 6, 3, dtype=dtype) for dtype in dtypes)
    for function in (F.group_norm, group_norm_act):
        with pytest.raises(RuntimeError):
            function(x, 3, parameter[0, :, 0], parameter[0, :, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=names)
@training_or_eval
def test_unsupported_dtypes(backend, dtype, training):
    x = torch.ones(4, 6, 3, dtype=dtype)
    for function in (F.batch_norm, batch_norm_act):
        with pytest.raises(NotImplementedError):
            function(x, torch.zeros(6), torch.ones(6), training=training)
    for function in (F.group_norm, group_norm_act):
        with pytest.raises(NotImplementedError):
            function(x, 3)


# Sizes that do not fit


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("size", [1, 2, 4])
@training_or_eval
def test_wrong_sizes_of_parameters(backend, wrong, size, training):
    arguments = [torch.ones(size if index == wrong else 3) for index in range(4)]
    for function in (F.batch_norm, batch_norm_act):
        with pytest.raises(RuntimeError):
            function(torch.ones(4, 3, 5), *arguments, training=training)


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("shape", [(1,), (5,), (7,), (2, 3)], ids=names)
def test_wrong_sizes_of_group_norm_parameters(backend, wrong, shape):
    arguments = [torch.ones(shape if index == wrong else 6) for index in range(2)]
    for function in (F.group_norm, group_norm_act):
        with pytest.raises(RuntimeError):
            function(torch.ones(4, 6, 5), 3, *arguments)


@pytest.mark.parametrize("num_groups", [4, 7, 12, -1])
def test_num_groups_that_do_not_divide(backend, num_groups):
    for function in (F.group_norm, group_norm_act):
        with pytest.raises(RuntimeError):
            function(torch.ones(4, 6, 5), num_groups)


@pytest.mark.parametrize("shape", [(), (4,)], ids=names)
def test_too_few_dimensions(backend, shape):
    for function in (F.batch_norm, batch_norm_act):
        with pytest.raises(RuntimeError):
            function(torch.ones(shape), torch.ones(4), torch.ones(4))
    for function in (F.group_norm, group_norm_act):
        with pytest.raises(RuntimeError):
            function(torch.ones(shape), 2)


@pytest.mark.parametrize("shape", [(4, 3, 5, 4), (1, 3, 5, 5), (4, 3, 5), (4, 3, 25)], ids=names)
def test_residual_of_another_shape_raises(backend, shape):
    with pytest.raises(ValueError, match="residual"):
        batch_norm_act(torch.ones(4, 3, 5, 5), None, None, training=True, residual=torch.ones(shape))


@pytest.mark.parametrize("keyword", ["activation", "pre_activation"])
def test_unknown_activation_is_named(backend, keyword):
    for call in (
        lambda: batch_norm_act(torch.ones(4, 3), None, None, training=True, **{keyword: "relu7"}),
        lambda: BatchNormAct1d(3, **{keyword: "relu7"}),
    ):
        with pytest.raises(ValueError, match=f"{keyword}.*'relu7'"):
            call()
    if keyword == "activation":
        with pytest.raises(ValueError, match=r"activation.*'relu7'"):
            group_norm_act(torch.ones(4, 6), 3, activation="relu7")
        with pytest.raises(ValueError, match=r"activation.*'relu7'"):
            GroupNormAct(3, 6, activation="relu7")
