"""InstanceNormAct1d, 2d, 3d and LayerNormAct: torch.nn's numbers, statistics, errors and state, and our activations."""

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers import (
    ACTIVATIONS,
    CHANNELS_LAST,
    FLOATS,
    activate,
    assert_same,
    away_from_kinks,
    interpreted,
    names,
    randn,
)
from torch import nn

import normfused
from normfused import backends, ops
from normfused.functional import instance_norm_act, layer_norm_act

SHAPES = {1: (3, 4, 10), 2: (3, 4, 5, 6), 3: (2, 4, 3, 4, 5)}
NATIVE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
OURS = {1: normfused.InstanceNormAct1d, 2: normfused.InstanceNormAct2d, 3: normfused.InstanceNormAct3d}

dims = pytest.mark.parametrize("dim", [1, 2, 3])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=names)
LAYERS = (
    (nn.InstanceNorm1d, normfused.InstanceNormAct1d, (4,), {"affine": True, "track_running_stats": True}, (3, 4, 10)),
    (nn.InstanceNorm2d, normfused.InstanceNormAct2d, (4,), {"affine": True, "track_running_stats": True}, (3, 4, 5, 6)),
    (nn.InstanceNorm3d, normfused.InstanceNormAct3d, (4,), {"momentum": None}, (2, 4, 3, 4, 5)),
    (nn.LayerNorm, normfused.LayerNormAct, ((5, 6),), {}, (3, 4, 5, 6)),
    (nn.LayerNorm, normfused.LayerNormAct, (6,), {"bias": False, "eps": 1e-3}, (3, 4, 6)),
    (nn.LayerNorm, normfused.LayerNormAct, (6,), {"elementwise_affine": False}, (3, 6)),
)
layers = pytest.mark.parametrize(("native_cls", "cls", "args", "kwargs", "shape"), LAYERS)


def pair(native_cls, cls, args, kwargs, dtype, activation):
    """(native, ours) with the same random parameters and running statistics."""
    native, ours = native_cls(*args, **kwargs, dtype=dtype), cls(*args, **kwargs, dtype=dtype, activation=activation)
    for index, (name, tensor) in enumerate(native.state_dict().items()):
        if tensor.is_floating_point():
            values = randn(*tensor.shape, dtype=dtype, seed=index + 1)
            tensor.copy_(values.abs() + 0.5 if name == "running_var" else values)
    assert ours.load_state_dict(native.state_dict(), strict=True) is not None
    return native, ours


def assert_like_native(native, ours, x, activation):
    """One forward and backward of each: outputs, all gradients and all buffers are equal."""
    ours_x, native_x = (x.detach().clone().requires_grad_() for _ in range(2))
    native_z = native(native_x)
    native_y, y = activate(native_z, activation), ours(ours_x)
    assert_same(y, native_y, "y", formats=False)
    largest = max(1.0, native_z.detach().double().abs().max().item())
    # At a kink the last bit of z decides.
    keep = away_from_kinks(native_z.detach().double(), activation, 4 * torch.finfo(x.dtype).eps * largest)
    dy = randn(*y.shape, dtype=y.dtype, seed=7).masked_fill(~keep, 0)
    native_y.backward(dy)
    y.backward(dy)
    assert_same(ours_x.grad, native_x.grad, "dx", formats=False, scale=largest)
    for (name, p), q in zip(ours.named_parameters(), native.parameters(), strict=True):
        assert_same(p.grad, q.grad, name, scale=largest)
    for (name, b), c in zip(ours.named_buffers(), native.named_buffers(), strict=True):
        assert_same(b, c[1], name)


@layers
@activations
@dtypes
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
def test_values_gradients_and_statistics(backend, native_cls, cls, args, kwargs, shape, activation, dtype, training):
    native, ours = pair(native_cls, cls, args, kwargs, dtype, activation)
    native.train(training), ours.train(training)
    for seed in range(2):  # the running statistics of the first are read by the second
        native.zero_grad(), ours.zero_grad()
        assert_like_native(native, ours, 2 * randn(*shape, dtype=dtype, seed=seed) + 1, activation)


@dims
@pytest.mark.parametrize("tracked", [True, False])
def test_unbatched_input(backend, dim, tracked):
    native, ours = pair(NATIVE[dim], OURS[dim], (4,), {"affine": True, "track_running_stats": tracked}, None, "silu")
    assert_like_native(native, ours, randn(*SHAPES[dim][1:]), "silu")


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
@pytest.mark.parametrize("tracked", [True, False])
def test_channels_last(backend, dim, training, tracked):
    native, ours = pair(NATIVE[dim], OURS[dim], (4,), {"affine": True, "track_running_stats": tracked}, None, "relu6")
    x = randn(*SHAPES[dim]).contiguous(memory_format=CHANNELS_LAST[dim + 2])
    assert_like_native(native.train(training), ours.train(training), x, "relu6")


def test_layer_norm_of_a_transposed_and_of_a_channels_last_input(backend):
    native, ours = pair(nn.LayerNorm, normfused.LayerNormAct, (6,), {}, None, "silu")
    assert_like_native(native, ours, randn(6, 3).t(), "silu")
    assert_like_native(native, ours, randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last), "silu")


def test_running_statistics_are_the_means_of_each_instances(backend):
    layer = normfused.InstanceNormAct2d(4, momentum=0.25, track_running_stats=True, dtype=torch.float64)
    x = randn(3, 4, 5, 6, dtype=torch.float64)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.25 * x.mean((2, 3)).mean(0))
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * x.var((2, 3), unbiased=True).mean(0))


def test_the_operators_compute_it(backend):
    """What no backend but "torch" may leave to PyTorch."""
    if backend == "torch":
        pytest.skip("PyTorch's operators are this backend")
    no = mock.Mock(side_effect=AssertionError("native was called"))
    with (
        mock.patch.object(F, "instance_norm", no),
        mock.patch.object(F, "layer_norm", no),
        # Which would call the operators past the mock.
        mock.patch.object(ops, "AUTOGRAD", None),
        mock.patch.object(
            backends.OPERATORS[backend], "group_norm_act", wraps=backends.OPERATORS[backend].group_norm_act
        ) as operator,
    ):
        instance_norm_act(randn(3, 4, 5, 6), activation="silu")
        layer_norm_act(randn(3, 4, 6), (6,), activation="silu")
    assert operator.call_count == 2


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6)])
@pytest.mark.parametrize("tracked", [True, False])
def test_empty_instance_norm(backend, shape, tracked):
    def run(layer):
        x = randn(*shape).requires_grad_()
        y = layer(x)
        y.sum().backward()
        return y, x.grad

    def result(layer):
        try:
            return run(layer)
        except Exception as error:
            return type(error)

    arguments = {"affine": True, "track_running_stats": tracked}
    native, ours = pair(nn.InstanceNorm2d, normfused.InstanceNormAct2d, (shape[1],), arguments, None, "relu")
    expected = result(nn.Sequential(native, nn.ReLU()))
    actual = result(ours)
    if isinstance(expected, type):
        assert actual is expected
    else:
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 3, 6)])
def test_empty_layer_norm(backend, shape):
    native, ours = pair(nn.LayerNorm, normfused.LayerNormAct, (shape[-1],), {}, None, "relu")
    x, native_x = (randn(*shape).requires_grad_() for _ in range(2))
    y, native_y = ours(x), native(native_x).relu()
    assert_same(y, native_y)
    y.sum().backward()
    native_y.sum().backward()
    assert_same(x.grad, native_x.grad)
    assert_same(ours.weight.grad, native.weight.grad)


@pytest.mark.thorough(interpreted=True)
@activations
@pytest.mark.parametrize("norm", ["instance", "instance_tracked", "layer"])
def test_gradgrad(backend, norm, activation):
    if interpreted(backend) and (activation != "silu" or norm == "instance_tracked"):
        pytest.skip("interpreted: too slow for all of them")
    shape = (2, 2, 5)
    x = randn(*shape, dtype=torch.float64, seed=11).requires_grad_()
    weight, bias = (randn(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in ((2, (2,)), (3, (2,))))
    if norm == "layer":
        weight, bias = (randn(5, dtype=torch.float64, seed=i).requires_grad_() for i in (2, 3))

        def function(x, weight, bias):
            return layer_norm_act(x, (5,), weight, bias, activation=activation)
    else:

        def function(x, weight, bias):
            running = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
            running = running if norm == "instance_tracked" else (None, None)
            return instance_norm_act(x, *running, weight, bias, activation=activation)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@layers
def test_state_copies_and_repr(native_cls, cls, args, kwargs, shape):
    native, ours = pair(native_cls, cls, args, kwargs, None, "silu")
    assert isinstance(ours, native_cls)
    assert list(ours.state_dict()) == list(native.state_dict())
    assert native.load_state_dict(ours.state_dict(), strict=True) is not None
    inside = repr(native).partition("(")[2][:-1]
    assert repr(ours) == f"{cls.__name__}({inside}, activation='silu')"
    y = copy.deepcopy(ours)(randn(*shape))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.activation == "silu"
        assert torch.equal(twin(randn(*shape)), y)


@pytest.mark.thorough
@layers
def test_compile_fullgraph(native_cls, cls, args, kwargs, shape):
    native, ours = pair(native_cls, cls, args, kwargs, None, "silu")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_like_native(native, compiled, randn(*shape), "silu")


def raised(function, *args, **kwargs):
    with pytest.raises(Exception) as info:  # noqa: PT011 - the type is what is compared
        function(*args, **kwargs)
    return type(info.value)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 1, 1), (4, 5, 6, 7, 8)])
def test_instance_norm_errors_are_natives(backend, shape, tracked):
    kwargs = {"track_running_stats": tracked}
    x = randn(*shape)
    native, ours = nn.InstanceNorm2d(4, **kwargs), normfused.InstanceNormAct2d(4, **kwargs)
    if shape == (3, 4, 5) and not tracked:  # unbatched, of 3 channels instead of 4: torch.nn only warns
        with warnings.catch_warnings(record=True):
            assert_same(ours(x), native(x))
        return
    assert raised(ours, x) is raised(native, x)


def test_functional_errors_are_natives(backend):
    x = randn(3, 4, 5)
    mean, var = torch.zeros(4), torch.ones(4)
    for args in (
        (x, None, None, None, None, False),
        (x, mean, None, None, None, False),
        (x, torch.zeros(3), torch.ones(3)),
        (x, mean, var, torch.ones(3)),
        (x, None, None, torch.ones(3)),
        (x.long(),),
        (x.long(), mean, var),
    ):
        assert raised(instance_norm_act, *args) is raised(F.instance_norm, *args), args
    for args in (
        (x, (4,)),
        (x, ()),
        (x, (5,), torch.ones(4)),
        (x, (5,), None, torch.ones(4)),
        (x, (2, 3, 4, 5)),
        (x.long(), (5,)),
        (x, 5),
        ([1.0], (1,)),
    ):
        assert raised(layer_norm_act, *args) is raised(F.layer_norm, *args), args
    with pytest.raises(TypeError):  # native: AttributeError
        instance_norm_act([1.0])
    for call in (lambda: instance_norm_act(x, activation="gelu"), lambda: layer_norm_act(x, (5,), activation="gelu")):
        with pytest.raises(ValueError, match="'gelu'"):
            call()


def test_checkpointed_layers_update_their_statistics_once(backend):
    layer = normfused.InstanceNormAct2d(4, track_running_stats=True, affine=True, activation="relu")
    once = copy.deepcopy(layer)
    x = randn(3, 4, 5, 6).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    once(x)
    assert torch.equal(layer.running_mean, once.running_mean)
    assert torch.equal(layer.running_var, once.running_var)


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("dtype", FLOATS[2:], ids=names)
def test_16_bit_layer_norm_gradients_are_no_worse_than_natives(backend, dtype):
    x, dy = randn(128, 5, 5, dtype=dtype), randn(128, 5, 5, dtype=dtype, seed=1)

    def parameter_gradients(layer, dtype):
        layer = layer.to(dtype)
        layer(x.to(dtype)).backward(dy.to(dtype))
        return [p.grad.double() for p in layer.parameters()]

    exact = parameter_gradients(nn.LayerNorm(5), torch.float64)
    native = parameter_gradients(nn.LayerNorm(5), dtype)
    ours = parameter_gradients(normfused.LayerNormAct(5), dtype)
    for a, b, c in zip(ours, native, exact, strict=True):
        assert (a - c).abs().max() <= (b - c).abs().max()


def test_torchs_layer_norm_is_bit_equal():
    x = randn(7, 33)
    with normfused.use_backend("torch"):
        assert torch.equal(layer_norm_act(x, (33,)), F.layer_norm(x, (33,)))


def test_revert():
    model = nn.Sequential(
        normfused.InstanceNormAct1d(4, activation="silu"),
        normfused.InstanceNormAct2d(4),
        normfused.InstanceNormAct3d(4, affine=True),
        normfused.LayerNormAct((5, 6), activation="relu"),
    )
    plain = nn.Sequential(
        nn.Sequential(nn.InstanceNorm1d(4), nn.SiLU()),
        nn.InstanceNorm2d(4),
        nn.InstanceNorm3d(4, affine=True),
        nn.Sequential(nn.LayerNorm((5, 6)), nn.ReLU()),
    )
    assert str(normfused.revert(model)) == str(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
