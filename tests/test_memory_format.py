"""Every layout of the input and of its gradient: values, the formats of y and dx, no input written into."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    activate,
    assert_memory_format,
    assert_same,
    in_layout,
    layouts,
    names,
    native_batch_norm_act,
    randn,
    training_or_eval,
)

from normfused.functional import batch_norm_act, group_norm_act

SHAPES = ((7, 8), (5, 6, 7), (3, 6, 5, 4), (2, 4, 3, 5, 4))


# (shape, layout of x, layout of dy): all pairs of layouts.
CASES = [
    pytest.param(shape, layout, dy_layout, id=f"{len(shape)}d-{layout}-{dy_layout}")
    for shape in SHAPES
    for layout in layouts(len(shape))
    for dy_layout in layouts(len(shape))
]


def laid_out(shape, layout, seed):
    return in_layout(randn(*shape, seed=seed), layout).requires_grad_()


def check(ours, native, x, dy, parameters, residual=None):
    """Values against native on contiguous copies, formats against x, the arguments bitwise as before."""
    inputs = [t for t in (x, residual) if t is not None]
    before = [t.detach().clone() for t in (*inputs, dy)]
    copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs]
    y, native_y = ours(*inputs), native(*copies)
    assert_same(y, native_y, "y", formats=False)
    assert_memory_format(y, x)
    grads = torch.autograd.grad(y, (*inputs, *parameters), dy)
    native_grads = torch.autograd.grad(native_y, (*copies, *parameters), dy.contiguous())
    for grad, native_grad in zip(grads, native_grads, strict=True):
        assert_same(grad, native_grad, "gradient", formats=False)
    assert_memory_format(grads[0], x)
    for tensor, copy in zip((*inputs, dy), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(("shape", "layout", "dy_layout"), CASES)
@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_batch_norm(backend, shape, layout, dy_layout, training, activation):
    x, dy = laid_out(shape, layout, 0), laid_out(shape, dy_layout, 1).detach()
    mean, var = randn(shape[1], seed=2), randn(shape[1], seed=3).abs() + 0.5
    weight, bias = (randn(shape[1], seed=seed).requires_grad_() for seed in (4, 5))
    state, native_state = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    check(
        lambda x: batch_norm_act(x, *state, weight, bias, training, activation=activation),
        lambda x: native_batch_norm_act(x, *native_state, weight, bias, training, 0.1, 1e-5, activation),
        x,
        dy,
        (weight, bias),
    )
    assert_same(state[0], native_state[0], "running_mean")
    assert_same(state[1], native_state[1], "running_var")


@pytest.mark.parametrize(("shape", "layout", "dy_layout"), CASES)
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_group_norm(backend, shape, layout, dy_layout, activation):
    x, dy = laid_out(shape, layout, 0), laid_out(shape, dy_layout, 1).detach()
    weight, bias = (randn(shape[1], seed=seed).requires_grad_() for seed in (4, 5))
    check(
        lambda x: group_norm_act(x, 2, weight, bias, activation=activation),
        lambda x: activate(F.group_norm(x, 2, weight, bias), activation),
        x,
        dy,
        (weight, bias),
    )


@pytest.mark.parametrize("layout", layouts(4))
@pytest.mark.parametrize("residual_layout", layouts(4))
@training_or_eval
def test_residual_of_another_layout(backend, layout, residual_layout, training):
    x, residual = laid_out((3, 6, 5, 4), layout, 0), laid_out((3, 6, 5, 4), residual_layout, 1)
    weight, bias = (randn(6, seed=seed).requires_grad_() for seed in (4, 5))
    check(
        lambda x, residual: batch_norm_act(x, torch.zeros(6), torch.ones(6), weight, bias, training, residual=residual),
        lambda x, residual: native_batch_norm_act(
            x, torch.zeros(6), torch.ones(6), weight, bias, training, 0.1, 1e-5, "relu6", residual
        ),
        x,
        randn(3, 6, 5, 4, seed=2),
        (weight, bias),
        residual,
    )


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (4, 6, 1, 1), (1, 6, 5, 4), (4, 1, 1, 1), (2, 1, 3, 1, 1)], ids=names)
@pytest.mark.parametrize("channels_last", [False, True])
@training_or_eval
def test_ambiguous_strides_have_the_same_format_as_native(backend, shape, channels_last, training):
    x = in_layout(randn(*shape), "channels_last" if channels_last else "contiguous").requires_grad_()
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y = batch_norm_act(x, mean.clone(), var.clone(), training=training)
    native_y = F.relu6(F.batch_norm(x, mean, var, training=training))
    assert_same(y, native_y, "y")
    dy = randn(*shape, seed=1)
    assert_same(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(native_y, x, dy)[0], "dx")


@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("channels_last", [False, True])
@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_sum_right_after_the_layer(backend, shape, channels_last, training, activation):
    """The gradient of a sum is one expanded number (stride 0 everywhere)."""
    layout = "channels_last" if channels_last and len(shape) >= 4 else "contiguous"
    x, native_x = laid_out(shape, layout, 0), laid_out(shape, layout, 0)
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])
    batch_norm_act(x, *statistics, training=training, activation=activation).sum().backward()
    statistics = torch.zeros(shape[1]), torch.ones(shape[1])
    native_batch_norm_act(native_x, *statistics, None, None, training, 0.1, 1e-5, activation).sum().backward()
    assert_same(x.grad, native_x.grad, "dx")
    x.grad = native_x.grad = None
    group_norm_act(x, 2, activation=activation).sum().backward()
    activate(F.group_norm(native_x, 2), activation).sum().backward()
    assert_same(x.grad, native_x.grad, "dx")


@training_or_eval
def test_parameters_of_any_stride(backend, training):
    """Weight, bias and running statistics that are slices; the statistics are updated where they lie."""
    table, native_table = (randn(4, 6).abs() + 0.5 for _ in range(2))
    x = randn(4, 4, 5, 5)
    for name, values in (("ours", table), ("native", native_table)):
        columns = [values[:, index] for index in range(4)]
        if name == "ours":
            y = batch_norm_act(x, *columns, training=training)
        else:
            native_y = F.relu6(F.batch_norm(x, *columns, training=training))
    assert_same(y, native_y, "y")
    assert_same(table, native_table, "everything in the table")
    assert torch.equal(table[:, 2:], randn(4, 6).abs()[:, 2:] + 0.5)
