"""The autograd functions in C++ (csrc/autograd.cpp) do to the bit what those in Python do, and leave to Python what is
more than plain tensors."""

import contextlib
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from helpers import ACTIVATIONS, names, randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normfused
from normfused import ops, recompute_activations
from normfused.functional import batch_norm_act, group_norm_act

pytestmark = pytest.mark.skipif(ops.AUTOGRAD is None, reason=str(ops.AUTOGRAD_WHY_NOT))


def in_python():
    return mock.patch.object(ops, "AUTOGRAD", None)


def tensors(wanted, shape=(4, 6, 5, 5)):
    """(x, weight, bias, residual, dy), of which those named in ``wanted`` require a gradient."""
    x, residual, dy = (randn(*shape, seed=seed) for seed in (1, 2, 3))
    weight, bias = (randn(shape[1], seed=seed) for seed in (4, 5))
    made = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    return {name: t.requires_grad_(name in wanted) for name, t in made.items()}, dy


def batch_norm(made, statistics, training, activation, affine, has_residual):
    return batch_norm_act(
        made["x"],
        *statistics,
        made["weight"] if affine else None,
        made["bias"] if affine else None,
        training,
        activation=activation,
        residual=made["residual"] if has_residual else None,
    )


def gradients(y, dy, made, create_graph=False):
    leaves = [t for t in made.values() if t.requires_grad]
    return torch.autograd.grad(y, leaves, dy, create_graph=create_graph, allow_unused=True)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


WANTED = (
    ("x", "weight", "bias", "residual"),
    ("x",),
    ("weight",),
    ("bias",),
    ("residual",),
    ("x", "bias"),
    ("weight", "residual"),
)


@pytest.mark.parametrize("wanted", WANTED, ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=names)
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
def test_batch_norm_is_that_of_python(training, activation, wanted):
    for affine in (True, False):
        for has_residual in (True, False):
            made, dy = tensors(wanted)
            used = {"x"} | ({"weight", "bias"} if affine else set()) | ({"residual"} if has_residual else set())
            results = []
            for path in (contextlib.nullcontext(), in_python()):
                statistics = torch.zeros(6), torch.ones(6)
                with path:
                    y = batch_norm(made, statistics, training, activation, affine, has_residual)
                assert y.requires_grad == bool(used & set(wanted))
                found = gradients(y, dy, made) if y.requires_grad else ()
                results.append((y, *statistics, *found))
            assert_same(*results)


@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",), ("bias",)], ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=names)
def test_group_norm_is_that_of_python(activation, wanted):
    for affine in (True, False):
        made, dy = tensors(wanted)
        results = []
        for path in (contextlib.nullcontext(), in_python()):
            with path:
                y = group_norm_act(
                    made["x"],
                    3,
                    made["weight"] if affine else None,
                    made["bias"] if affine else None,
                    activation=activation,
                )
            results.append((y, *(gradients(y, dy, made) if y.requires_grad else ())))
        assert_same(*results)


@pytest.mark.parametrize("activation", [None, "silu"], ids=names)
def test_second_derivatives_are_those_of_python(activation):
    results = []
    for path in (contextlib.nullcontext(), in_python()):
        made, dy = tensors(WANTED[0], (3, 6, 2, 2))
        dy.requires_grad_()
        with path:
            ys = (
                batch_norm(made, (None, None), True, activation, True, True),
                group_norm_act(made["x"], 2, made["weight"], made["bias"], activation=activation),
            )
            found = []
            for y in ys:
                first = gradients(y, dy, made, create_graph=True)
                assert first[0].requires_grad
                second = torch.autograd.grad(sum(t.pow(2).sum() for t in first if t is not None), [made["x"], dy])
                found += [*first, *second]
        results.append(found)
    assert_same(*results)


class _Drops(torch.autograd.Function):
    """The identity, whose backward pass gives no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_no_gradient_of_the_output_counts_as_zeros():
    found = []
    for serves in (contextlib.nullcontext(), in_python()):
        made, _ = tensors(("x", "weight", "bias", "residual"))
        with serves:
            y = batch_norm(made, (None, None), True, "relu6", True, True)
            z = group_norm_act(made["x"], 2, made["weight"], made["bias"], activation="silu")
            (_Drops.apply(y) + _Drops.apply(z)).sum().backward()
        found.append([t.grad for t in made.values()])
        assert all(gradient is not None and gradient.eq(0).all() for gradient in found[-1])
    assert_same(*found)


def test_it_is_what_serves_an_eager_call():
    made, dy = tensors(("x", "weight", "bias"))
    for y in (batch_norm_act(made["x"], None, None, training=True), group_norm_act(made["x"], 2)):
        assert "CppNode" in y.grad_fn.name()
        gradients(y, dy, {"x": made["x"]})
        with pytest.raises(RuntimeError, match="second time"):
            gradients(y, dy, {"x": made["x"]})
    assert normfused.info()["extension"]["autograd"] == "in C++"


def test_what_was_saved_and_then_changed_is_refused():
    made, dy = tensors(("x", "weight", "bias"))
    for y in (
        batch_norm_act(made["x"], None, None, made["weight"], made["bias"], True),
        group_norm_act(made["x"], 2, made["weight"], made["bias"], activation="silu"),
    ):
        with torch.no_grad():
            made["weight"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, dy, made)


def test_running_statistics_count_as_changed():
    statistics = torch.zeros(6), torch.ones(6)
    count = torch.tensor(0)
    layer = normfused.BatchNormAct2d(6)
    layer.running_mean, layer.running_var, layer.num_batches_tracked = *statistics, count
    before = [t._version for t in (*statistics, count)]
    layer(randn(2, 6, 3, 3))
    assert [t._version - v for t, v in zip((*statistics, count), before, strict=True)] == [1, 1, 1]
    layer.eval()(randn(2, 6, 3, 3))
    assert [t._version - v for t, v in zip((*statistics, count), before, strict=True)] == [1, 1, 1]


class Wrapped(torch.Tensor):
    called = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "normfused" in str(function):
            cls.called += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_python_sees_calls_with_a_subclass():
    x = randn(2, 6, 3, 3).as_subclass(Wrapped)
    before = Wrapped.called
    assert isinstance(batch_norm_act(x, None, None, training=True), Wrapped)
    assert isinstance(group_norm_act(x, 2), Wrapped)
    assert Wrapped.called == before + 2


def test_modes_see_the_operators():
    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    made, dy = tensors(("x", "weight", "bias"))
    for mode, names_of in (
        (Functions, ("batch_norm_act",)),
        (Dispatched, ("batch_norm_act", "batch_norm_act_backward")),
    ):
        seen = []
        with mode():
            y = batch_norm_act(made["x"], None, None, made["weight"], made["bias"], True)
            gradients(y, dy, made)
        for name in names_of:
            assert any(name in s for s in seen), (mode, name, seen)


def test_arguments_of_other_types_are_left_to_python():
    x, count = randn(2, 6), torch.tensor(0)
    arguments = [x, None, None, None, None, None, count, True, 0.1, 1e-5, "relu", None]
    for index, other in ((0, x.as_subclass(Wrapped)), (1, nn.Module()), (7, 1), (8, 1), (9, 1), (10, 3)):
        changed = [*arguments]
        changed[index] = other
        assert ops.AUTOGRAD.batch_norm_act(*changed) is NotImplemented
    assert count == 0
    for index, other in ((0, None), (2, 1.0), (3, 2.0), (4, 1), (5, b"relu")):
        changed = [x, None, None, 2, 1e-5, "relu"]
        changed[index] = other
        assert ops.AUTOGRAD.group_norm_act(*changed) is NotImplemented
    for function in (ops.AUTOGRAD.batch_norm_act, ops.AUTOGRAD.group_norm_act, ops.AUTOGRAD.set_formulas):
        with pytest.raises(TypeError, match=f"{function.__name__}: .* got 1"):
            function(x)


def test_an_error_of_the_formula_is_raised_in_backward():
    made, dy = tensors(("x",))
    y = batch_norm_act(made["x"], None, None, training=True)
    from normfused import reference

    def fail(*_):
        raise KeyError("of the formula")

    ops.AUTOGRAD.set_formulas(fail, fail)
    try:
        with pytest.raises(KeyError, match="of the formula"):
            gradients(y, dy, made, create_graph=True)
    finally:
        ops.AUTOGRAD.set_formulas(reference.batch_norm_act_backward, reference.group_norm_act_backward)


def test_compiled_autograd_traces_it():
    from torch._dynamo import compiled_autograd

    model = nn.Sequential(normfused.BatchNormAct2d(6, activation="silu"), normfused.GroupNormAct(2, 6))
    eager, traced, graphs = [], [], []

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend="eager")

    for seed in range(3):
        for found, compiled in ((eager, False), (traced, True)):
            x = randn(4, 6, 3, 3, seed=seed).requires_grad_()
            model.zero_grad()
            loss = model(x).pow(2).sum()
            if compiled:
                with compiled_autograd._enable(compiler):
                    loss.backward()
            else:
                loss.backward()
            found += [x.grad, *(p.grad for p in model.parameters())]
    assert len(graphs) == 1
    assert_same(eager, traced)


def test_recomputing_takes_the_functions_in_python():
    x = randn(2, 6, 3, 3).requires_grad_()
    with recompute_activations(min_bytes=0):
        y = batch_norm_act(x, None, None, training=True)
    assert "CppNode" not in y.grad_fn.name()


def test_under_another_torch_python_serves():
    code = (
        "import json, torch\n"
        "torch.__version__ = '9.9.9+cpu'\n"
        "import normfused\n"
        "x = torch.randn(4, 3, requires_grad=True)\n"
        "y = normfused.functional.batch_norm_act(x, None, None, training=True)\n"
        "y.sum().backward()\n"
        "print(json.dumps([normfused.info()['extension']['autograd'], y.grad_fn.name()]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    autograd, node = json.loads(found)
    assert autograd.startswith("in Python: autograd in C++ was built for torch ")
    assert "9.9.9" in autograd
    assert "CppNode" not in node
