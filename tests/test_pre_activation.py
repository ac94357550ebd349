"""pre_activation in the CPU's BatchNorm kernels: y = batch_norm(relu(x)) and its gradients in one operator.

What every backend makes of it is in test_modules.py, and the CUDA and Triton kernels' own tests are with theirs.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    activate,
    assert_memory_format,
    assert_same,
    in_layout,
    layouts,
    names,
    randn,
    training_or_eval,
)
from test_operators import DTYPES, FORMATS, INSTRUCTION_SETS, formats_of
from torch.utils._python_dispatch import TorchDispatchMode

from normfused import native, ops, reference
from normfused.functional import batch_norm_act

pytestmark = pytest.mark.skipif(not ops.LOADED, reason=str(ops.WHY_NOT))

FUSED = ("relu", "relu6")
# They take every path of csrc/kernels/cpu/partition.h: columns, one or several to a channel, ranges of rows, planes,
# and planes in two segments.
PATHS = ((40, 33, 7, 7), (3, 40, 20, 21), (1, 3, 300, 301), (600, 70), (9, 31, 13, 11), (9, 20, 33, 32), (5, 3, 1, 1))
EPS = 1e-5


def tensors(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    """x on both sides of 0 and 6, and on them; dy, weight, bias, running mean and variance."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = randn(*shape, dtype=torch.float64) * 4 + 2
    x.view(-1)[::7], x.view(-1)[3::11] = 0, 6
    x, dy = (t.to(dtype).contiguous(memory_format=memory_format) for t in (x, randn(*shape, seed=1)))
    weight, bias, mean = (randn(shape[1], dtype=wide, seed=seed) for seed in (2, 3, 4))
    return x, dy, weight, bias, mean, randn(shape[1], dtype=wide, seed=5).abs() + 0.5


def step(x, dy, weight, bias, mean, var, training, pre_activation):
    """All that the two operators compute: y, mean, invstd, running_mean, running_var, dx, dweight, dbias."""
    mean, var = mean.clone(), var.clone()
    forward = (x, weight, bias, None, mean, var, None, training, 0.1, EPS, None, pre_activation)
    y, batch_mean, invstd = ops.batch_norm_act(*forward)
    backward = (dy, x, weight, bias, None, batch_mean, invstd, training, None, pre_activation)
    return y, batch_mean, invstd, mean, var, *ops.batch_norm_act_backward(*backward, True, True, True, False)[:3]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = torch.ops.normfused.cpu_instruction_set()
    try:
        torch.ops.normfused.use_cpu_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    torch.ops.normfused.use_cpu_instruction_set(before)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", PATHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_against_the_reference(shape, dtype):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for memory_format, training in itertools.product(formats_of(shape), (True, False)):
        arguments = tensors(shape, dtype, memory_format)
        for pre_activation in FUSED:
            y, _, _, *rest = step(*arguments, training, pre_activation)
            assert y.is_contiguous(memory_format=memory_format)
            x, dy, weight, bias, mean, var = (t.double() for t in arguments)
            z = reference.FORWARD[pre_activation](x)
            running = reference.running_statistics(z, mean, var, 0.1) if training else (mean, var)
            if training:
                mean, var = reference.batch_statistics(z)
            gradients = reference.batch_norm_act_backward(
                dy, x, weight, bias, None, mean, (var + EPS).rsqrt(), training, EPS, None, pre_activation
            )
            exact = (reference.batch_norm_act(z, weight, bias, None, mean, var, EPS, None), *running, *gradients[:3])
            for ours, expected in zip((y, *rest), exact, strict=True):
                scale = expected.abs().max().clamp_min(1)
                torch.testing.assert_close(ours.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", PATHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_the_bits_are_those_of_the_two_one_after_the_other(shape, dtype):
    for memory_format, training, pre_activation in itertools.product(formats_of(shape), (True, False), FUSED):
        x, *others = tensors(shape, dtype, memory_format)
        *fused, dx, dweight, dbias = step(x, *others, training, pre_activation)
        *composed, dz, dweight_then, dbias_then = step(activate(x, pre_activation), *others, training, None)
        dx_then = dz.masked_fill((x <= 0) | ((x >= 6) if pre_activation == "relu6" else False), 0)
        for ours, theirs in zip(
            (*fused, dx, dweight, dbias), (*composed, dx_then, dweight_then, dbias_then), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", PATHS, ids=str)
def test_one_thread_and_two_are_bitwise_equal(shape):
    threads = torch.get_num_threads()
    try:
        for memory_format, pre_activation in itertools.product(formats_of(shape), FUSED):
            results = []
            for number in (1, 2):
                torch.set_num_threads(number)
                results.append(step(*tensors(shape, memory_format=memory_format), True, pre_activation))
            assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


def special_values(dtype):
    """As many as fill every kind of loop: vectors of each instruction set, and what is left."""
    six = torch.tensor(6.0, dtype=dtype)
    least, down = torch.nextafter(six * 0, six), torch.nextafter(six, six * 0)
    values = [
        torch.nan,
        torch.inf,
        -torch.inf,
        -1.0,
        0.0,
        -0.0,
        least,
        -least,
        1.0,
        down,
        6.0,
        torch.nextafter(six, 2 * six),
    ]
    return torch.tensor([float(value) for value in values], dtype=dtype).repeat(6)[:69]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", [(1, 1, 69), (69, 1, 1), (3, 23, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_dead_regions_are_selected_and_special_values_pass(shape, dtype):
    x, channels = special_values(dtype).view(shape), shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    zero, one = torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide)
    for pre_activation in FUSED:
        # A bias of -0.0 keeps the signs of zeros.
        forward = (x, None, -zero, None, zero, one, None, False, 0.1, 0.0, None, pre_activation)
        y, mean, invstd = ops.batch_norm_act(*forward)
        expected = activate(x, pre_activation)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~expected.isnan())
        dead = (x <= 0) | ((x >= 6) if pre_activation == "relu6" else False)
        for dy in (torch.full_like(x, torch.inf), torch.full_like(x, torch.nan), torch.full_like(x, -2.5)):
            backward = (dy, x, None, None, None, mean, invstd, False, None, pre_activation, True, False, False, False)
            dx = ops.batch_norm_act_backward(*backward)[0]
            torch.testing.assert_close(dx, dy.masked_fill(dead, 0), rtol=0, atol=0, equal_nan=True)
            assert not dx[dead].signbit().any()


def test_an_infinite_gradient_in_training_is_0_where_it_is_dead():
    x, dy, *others = tensors((4, 3, 9, 9))
    dy[0, 0, 0, 0] = torch.inf
    *_, dx, dweight, dbias = step(x, dy, *others, True, "relu")
    assert not dx[x <= 0].any()
    assert not dx[:, 0][x[:, 0] > 0].isfinite().any()
    assert all(t.isfinite().all() for t in (dx[:, 1:], dweight[1:], dbias[1:]))
    assert dbias[0] == torch.inf


@training_or_eval
@pytest.mark.parametrize("pre_activation", FUSED)
def test_only_what_is_asked_for_is_computed(training, pre_activation):
    for shape, memory_format in (((4, 6, 5, 5), FORMATS["channels_last"]), ((2, 3, 300, 301), FORMATS["contiguous"])):
        x, dy, weight, bias, mean, var = tensors(shape, memory_format=memory_format)
        arguments = (dy, x, weight, bias, None, mean, var.rsqrt(), training, None, pre_activation)
        everything = ops.batch_norm_act_backward(*arguments, True, True, True, False)
        for mask in itertools.product((True, False), repeat=3):
            gradients = ops.batch_norm_act_backward(*arguments, *mask, False)
            for asked, gradient, full in zip(mask, gradients, everything, strict=False):
                assert torch.equal(gradient, full) if asked else gradient.numel() == 0


@pytest.mark.parametrize("layout", layouts(4))
@pytest.mark.parametrize("pre_activation", FUSED)
def test_every_layout(layout, pre_activation):
    for training in (True, False):
        x, dy, *parameters, mean, var = tensors((4, 6, 5, 3))
        x, dy = in_layout(x, layout).requires_grad_(), in_layout(dy, layout)
        wanted = x, *(t.requires_grad_() for t in parameters)
        results = []
        for composed in (False, True):
            running = mean.clone(), var.clone()
            arguments = (*running, *parameters, training, 0.1, EPS)
            if composed:
                y = F.batch_norm(activate(x, pre_activation), *arguments)
            else:
                y = batch_norm_act(x, *arguments, activation=None, pre_activation=pre_activation)
            results.append((y, *running, *torch.autograd.grad(y, wanted, dy)))
        for ours, theirs in zip(*results, strict=True):
            assert_same(ours, theirs, formats=False)
        assert_memory_format(results[0][0], x)


class Called(TorchDispatchMode):
    """The operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@training_or_eval
@pytest.mark.parametrize("pre_activation", FUSED)
def test_one_operator_forward_and_one_backward_and_x_is_all_that_is_kept(training, pre_activation):
    x, dy, weight, _, mean, var = tensors((4, 6, 5, 3))
    wanted, kept = (x.requires_grad_(), weight.requires_grad_()), []

    def pack(t):
        kept.append(t.data_ptr())
        return t

    with Called() as called, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = batch_norm_act(x, mean, var, weight, None, training, activation=None, pre_activation=pre_activation)
    assert called.names == ["normfused.batch_norm_act.default"]
    assert kept == [t.data_ptr() for t in wanted]
    with Called() as called:
        torch.autograd.grad(y, wanted, dy)
    assert called.names == ["normfused.batch_norm_act_backward.default"]


@pytest.mark.parametrize("pre_activation", native.ACTIVATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_take_what_is_promised_and_refuse_the_rest(activation, pre_activation):
    x, dy, weight, bias, mean, var = tensors((4, 6, 5, 3))
    for residual in (None, dy):
        forward = (x, weight, bias, residual, mean, var, None, False, 0.1, EPS, activation, pre_activation)
        backward = (dy, x, weight, bias, residual, mean, var, False, activation, pre_activation, *(True,) * 3, False)
        for operator, arguments in ((ops.batch_norm_act, forward), (ops.batch_norm_act_backward, backward)):
            if ops.fuses_pre_activation("cpu", pre_activation, activation, residual):
                operator(*arguments)
            else:
                with pytest.raises(
                    RuntimeError, match=f"pre_activation '{pre_activation}' is not part of a cpu kernel"
                ):
                    operator(*arguments)


@training_or_eval
def test_opcheck_and_compile(training):
    x, dy, weight, bias, mean, var = tensors((4, 6, 5, 3))
    x.requires_grad_()
    forward = (x.detach(), weight, bias, None, mean, var, None, training, 0.1, EPS, None, "relu6")
    torch.library.opcheck(ops.batch_norm_act, forward)
    backward = (dy, x.detach(), weight, bias, None, mean, var, training, None, "relu6", True, True, False, False)
    torch.library.opcheck(ops.batch_norm_act_backward, backward)

    def function(x):
        options = dict(activation=None, pre_activation="relu6")
        return batch_norm_act(x, mean.clone(), var.clone(), weight, bias, training, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    for ours, theirs in zip(
        (compiled, *torch.autograd.grad(compiled, x, dy)),
        (function(x), *torch.autograd.grad(function(x), x, dy)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
