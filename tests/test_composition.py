"""What the layers are combined with: dynamic shapes, export of training, deterministic mode, replicas, operators in
every layout under opcheck. The rest is in test_modules.py, test_transforms.py and test_gradients.py."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, assert_same, in_layout, interpreted, layouts, names, randn, training_or_eval
from test_modules import fused_and_plain, randomise
from torch import nn
from torch._dynamo.utils import counters

from normfused import BatchNormAct2d, GroupNormAct, backends
from normfused.functional import batch_norm_act, group_norm_act

SHAPE = (3, 6, 5, 4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# The operators


def batch_norm_calls(dtype, layout):
    """Arguments of batch_norm_act: training, evaluation, without parameters, without anything."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (in_layout(randn(*SHAPE, dtype=dtype, seed=seed), layout) for seed in (0, 1))
    weight, bias, mean = (randn(6, dtype=wide, seed=seed) for seed in (2, 3, 4))
    var, counter = randn(6, dtype=wide, seed=5).abs() + 0.5, torch.tensor(3)
    yield x, weight, bias, residual, mean, var, counter, True, 0.1, 1e-5, "relu6", None
    yield x, weight, bias, residual, mean, var, None, False, 0.1, 1e-5, "silu", None
    yield x, None, None, None, mean, var, counter, True, None, 1e-5, None, None
    yield x, None, None, None, None, None, None, True, 0.1, 1e-5, "relu", None


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("layout", layouts(4))
def test_opcheck_of_batch_norm_in_every_layout(backend, dtype, layout, record_property):
    operators = operators_of(backend, dtype, layout)
    calls = 0
    for arguments in batch_norm_calls(dtype, layout):
        torch.library.opcheck(operators.batch_norm_act, arguments, test_utils=TESTS)
        x, weight, bias, residual = arguments[:4]
        training, activation = arguments[7], arguments[10]
        _, mean, invstd = operators.batch_norm_act(*arguments)
        dy = in_layout(randn(*SHAPE, dtype=dtype, seed=6), layout)
        has_weight, has_bias, has_residual = (t is not None for t in (weight, bias, residual))
        torch.library.opcheck(
            operators.batch_norm_act_backward,
            (
                *(dy, x, weight, bias, residual, mean, invstd, training, activation, None),
                *(True, has_weight, has_bias, has_residual),
            ),
            test_utils=TESTS,
        )
        calls += 2
    record_property("cases", calls)


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("layout", layouts(4))
def test_opcheck_of_group_norm_in_every_layout(backend, dtype, layout, record_property):
    operators = operators_of(backend, dtype, layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (in_layout(randn(*SHAPE, dtype=dtype, seed=seed), layout) for seed in (0, 1))
    some, other = (randn(6, dtype=wide, seed=seed) for seed in (2, 3))
    calls = 0
    for weight, bias in ((some, other), (None, other), (None, None)):
        torch.library.opcheck(operators.group_norm_act, (x, weight, bias, 3, 1e-5, "relu6"), test_utils=TESTS)
        _, mean, rstd = operators.group_norm_act(x, weight, bias, 3, 1e-5, "relu6")
        torch.library.opcheck(
            operators.group_norm_act_backward,
            (dy, x, weight, bias, mean, rstd, 3, "relu6", True, weight is not None, bias is not None),
            test_utils=TESTS,
        )
        calls += 2
    record_property("cases", calls)


# test_aot_dispatch_dynamic takes a second for each call: test_operators.py has it in the two memory formats.
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def operators_of(backend, dtype, layout):
    if interpreted(backend) and FLOATS.index(dtype) != layouts(4).index(layout) % len(FLOATS):
        pytest.skip("seconds, interpreted: each layout with one dtype")
    if backend == "torch":
        pytest.skip("composed of PyTorch's own operators, no operator of ours")
    return backends.OPERATORS[backend]


# torch.compile and torch.export


@training_or_eval
@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_compile_with_dynamic_shapes(backend, training, compiler):
    """No break, eager's numbers, and one graph for every batch and size (but for inductor's own guards)."""
    if compiler == "inductor" and backend != "extension":
        pytest.skip("a minute of compiling: of interpreted kernels it compiles nothing, of native's nothing is ours")
    fused, plain = fused_and_plain()
    fused.train(training), plain.train(training)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=compiler)
    shapes = (4, 3, 8, 9), (5, 3, 10, 7), (7, 3, 12, 6)
    for step, shape in enumerate(shapes):
        x, native_x = (randn(*shape, seed=step).requires_grad_() for _ in range(2))
        y, native_y = compiled(x), plain(native_x)
        assert_same(y, native_y, "y")
        y.square().sum().backward()
        native_y.square().sum().backward()
        assert_same(x.grad, native_x.grad, "dx")
    graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    if compiler == "inductor" and graphs > 1:
        # Inductor's own backward of a convolution may settle on strides: no more graphs than PyTorch's layers need.
        counters.clear()
        native = torch.compile(copy.deepcopy(plain), fullgraph=True, dynamic=True, backend=compiler)
        for shape in shapes:
            native(randn(*shape).requires_grad_()).square().sum().backward()
        assert graphs <= counters["stats"]["unique_graphs"]
    else:
        assert graphs == 1
    for (name, buffer), native_buffer in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert_same(buffer, native_buffer, name)


@training_or_eval
def test_compiled_functions_equal_eager(backend, training):
    """The functional names, bit for bit: the same operators run."""
    x, weight, bias = randn(*SHAPE).requires_grad_(), randn(6, seed=1), randn(6, seed=2)
    dy = randn(*SHAPE, seed=3)

    def step(x, mean, var):
        y = batch_norm_act(x, mean, var, weight, bias, training, residual=x)
        return group_norm_act(y, 3, weight, bias, activation="silu")

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        mean, var = randn(6, seed=4), randn(6, seed=5).abs() + 0.5
        y = function(x, mean, var)
        results.append((y, *torch.autograd.grad(y, x, dy), mean, var))
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@training_or_eval
def test_export_round_trip(backend, training):
    """In training the exported program updates the buffers, as the module does."""
    fused, plain = fused_and_plain()
    fused.train(training), plain.train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused, (randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (4, 7):
        x = randn(size, 3, 8, 8, seed=size)
        assert_same(loaded(x), plain(x), "y")
    for name, buffer in plain.named_buffers():
        assert_same(dict(loaded.named_buffers())[name], buffer, name)


# Modes and copies


@training_or_eval
def test_deterministic_algorithms(backend, training):
    """Every kernel is deterministic, so nothing raises or warns, and nothing changes."""
    x, dy = randn(4, 6, 5, 5), randn(4, 6, 5, 5, seed=1)

    def everything():
        layers = randomise(BatchNormAct2d(6)).train(training), randomise(GroupNormAct(3, 6, activation="relu6"))
        results = []
        for layer in layers:
            argument = x.clone().requires_grad_()
            y = layer(argument)
            results += [y, *torch.autograd.grad(y, (argument, *layer.parameters()), dy), *layer.buffers()]
        return results

    before = everything()
    torch.use_deterministic_algorithms(True)
    try:
        after = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize(("module", "arguments"), [(BatchNormAct2d, (6,)), (GroupNormAct, (3, 6))], ids=names)
def test_data_parallel_replicas(backend, module, arguments):
    """What DataParallel makes of a module on each device: torch.nn.parallel.replicate itself refuses the CPU."""
    layer = randomise(module(*arguments, activation="silu"))
    replica = layer._replicate_for_data_parallel()
    for key, parameter in layer._parameters.items():
        # As replicate does: copies that belong to the graph of the originals.
        setattr(replica, key, parameter.clone())
    for key, buffer in layer._buffers.items():
        setattr(replica, key, buffer.clone())
    x = randn(4, 6, 5, 5)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    y = replica(x)
    assert type(replica) is type(layer)
    assert replica.activation == layer.activation
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    y.square().sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    expected = layer(x)
    assert torch.equal(y, expected)
    expected.square().sum().backward()
    assert all(torch.equal(*pair) for pair in zip(gradients, [p.grad for p in layer.parameters()], strict=True))


def test_swap_of_modules_inside_of_a_scripted_tool(backend):
    """Modules are found, replaced and counted by their torch.nn classes."""
    fused, _ = fused_and_plain()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 2
    assert sum(isinstance(m, nn.GroupNorm) for m in fused.modules()) == 1
    frozen = [p for m in fused.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()]
    assert len(frozen) == 4


@training_or_eval
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=names)
def test_autocast_around_a_network(backend, training, autocast_dtype):
    """Outputs and gradients in the dtypes, and about the values, that native gives under CPU autocast."""
    fused, plain = fused_and_plain()
    fused.train(training), plain.train(training)
    results = []
    for model in (fused, plain):
        x = randn(4, 3, 8, 8).requires_grad_()
        with torch.autocast("cpu", autocast_dtype):
            y = model(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, *(p.grad for p in model.parameters())))
    for ours, native in zip(*results, strict=True):
        assert ours.dtype == native.dtype
        difference = (ours.double() - native.double()).norm() / native.double().norm()
        assert difference <= 16 * torch.finfo(autocast_dtype).eps


@pytest.mark.parametrize(("training", "tracks"), list(itertools.product((True, False), repeat=2)))
def test_functions_of_none(backend, training, tracks):
    """Every combination of None that has a meaning, against native."""
    for weight, bias, residual in itertools.product(
        (None, randn(6, seed=1)), (None, randn(6, seed=2)), (None, randn(*SHAPE))
    ):
        if not (training or tracks):
            continue
        statistics = (torch.zeros(6), torch.ones(6)) if tracks else (None, None)
        native_statistics = [t if t is None else t.clone() for t in statistics]
        y = batch_norm_act(randn(*SHAPE, seed=3), *statistics, weight, bias, training, residual=residual)
        z = F.batch_norm(randn(*SHAPE, seed=3), *native_statistics, weight, bias, training)
        assert_same(y, F.relu6(z if residual is None else z + residual), "y")
