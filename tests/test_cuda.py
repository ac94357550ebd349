"""What only a GPU can show: streams, devices, CUDA graphs, grid limits, host synchronisation, repeatability.

The tests that take the fixture ``backend`` elsewhere run on the GPU too (conftest.py): ``pytest -m cuda``.
"""

import copy
import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import WHY_NOT_CUDA
from helpers import assert_same, in_layout, layouts, names, native_batch_norm_act, randn

import normfused
from bench import cases, check, providers
from normfused import BatchNormAct2d, GroupNormAct
from normfused.functional import batch_norm_act, group_norm_act

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-5


@pytest.fixture(params=("extension", "triton"))
def backend(request):
    """Serves CUDA tensors by one of our backends."""
    if WHY_NOT_CUDA[request.param] is not None:
        pytest.skip(WHY_NOT_CUDA[request.param])
    with normfused.use_backend(request.param):
        yield request.param


def on_gpu(*shape, dtype=torch.float32, layout="contiguous", seed=0):
    """Normal numbers on the GPU."""
    t = randn(*shape, dtype=dtype, seed=seed).to(DEVICE)
    return t.contiguous(memory_format=LAYOUTS[layout])


def step(layer, x, dy, *residual):
    """[y, dx, dweight, dbias] of one training step."""
    x = x.detach().requires_grad_()
    y = layer(x, *residual)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# Every dtype, layout and path

# Small planes, planes of one value, planes that are no multiple of a vector, channels that fit on chip, and do not.
BATCH_NORM = (
    *((2, 3, 7, 7), (32, 40, 7, 7), (64, 33, 1, 1), (5, 33, 14, 14), (7, 1000, 2, 2), (3, 8, 56, 56)),
    *((2, 5, 113, 113), (16, 64, 28, 28), (1, 2, 300, 301), (8, 4, 256, 256), (2, 130, 3, 5, 7), (4, 256, 16, 16)),
)
GROUP_NORM = (
    *(((2, 64, 8, 8), 32), ((2, 320, 16, 16), 32), ((3, 30, 7, 7), 5), ((1, 8, 64, 1024), 2), ((2, 6, 5, 5), 1)),
    *(((2, 6, 5, 5), 6), ((2, 16, 9, 9, 5), 4), ((130, 8, 3, 3), 2), ((2, 1280, 8, 8), 32), ((1, 32, 256, 256), 4)),
)
ACTIVATIONS = ("relu6", "relu", None, "silu", "hardswish", "leaky_relu", "sigmoid")


def _cases():
    turns = itertools.count()
    for dtype, layout in itertools.product(cases.DTYPES, cases.LAYOUTS):
        for shape in BATCH_NORM:
            turn = next(turns)
            yield cases.Case("own", shape, dtype, layout, None, ACTIVATIONS[turn % 7], residual=turn % 3 == 0)
        for shape, groups in GROUP_NORM:
            yield cases.Case("own", shape, dtype, layout, groups, ACTIVATIONS[next(turns) % 7])


def judge(case, training):
    """What bench.check finds wrong in one call of the layer, or None."""
    inputs = cases.inputs(case, DEVICE)
    layer = providers.fused(case, DEVICE, training)
    if not training:
        with torch.no_grad():
            result = (layer.run(*inputs.arguments),)
        statistics = providers.statistics(case, DEVICE)
        return check.check(case, inputs, layer.parameters, {"ours": result}, statistics)["ours"]
    y = layer.run(*inputs.arguments)
    result = (y.detach(), *torch.autograd.grad(y, providers.wanted(inputs, layer.parameters), inputs.dy))
    return check.check(case, inputs, layer.parameters, {"ours": result})["ours"]


@pytest.mark.parametrize("case", list(_cases()), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
def test_values_against_float64(backend, case, training):
    assert judge(case, training) is None


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 7, 7), None), ((2, 24, 17, 17), None), ((2, 12, 9, 9), 3)])
def test_selection_for_the_sanitizer(backend, shape, groups, dtype, layout):
    for activation, training in (("relu6", True), ("silu", False)):
        assert judge(cases.Case("own", shape, dtype, layout, groups, activation), training) is None


@pytest.mark.parametrize("path", providers.LAUNCH_PATHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_launch_path(path, layout, dtype):
    """Where a path cannot serve a shape another one does."""
    if WHY_NOT_CUDA["extension"] is not None:
        pytest.skip(WHY_NOT_CUDA["extension"])
    with normfused.use_backend("extension"), providers.launch_path(path):
        for shape, residual in itertools.product(BATCH_NORM, (False, True)):
            case = cases.Case("own", shape, dtype, layout, None, "relu6", residual)
            assert judge(case, True) is None, case
        for shape, groups in GROUP_NORM:
            case = cases.Case("own", shape, dtype, layout, groups, "silu")
            assert judge(case, True) is None, case


@pytest.mark.parametrize("path", providers.LAUNCH_PATHS)
def test_replays_and_repetitions_of_every_launch_path(path):
    if WHY_NOT_CUDA["extension"] is not None:
        pytest.skip(WHY_NOT_CUDA["extension"])
    with normfused.use_backend("extension"), providers.launch_path(path):
        for shape, layout in itertools.product(((32, 96, 14, 14), (16, 3, 56, 56), (64, 320, 7, 7)), LAYOUTS):
            layer = BatchNormAct2d(shape[1], track_running_stats=False).to(DEVICE)
            x, dy = (on_gpu(*shape, layout=layout, seed=seed) for seed in (0, 1))
            first = step(layer, x, dy)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = step(layer, x, dy)
            for _ in range(100):
                for result in results:
                    result.zero_()
                graph.replay()
                assert_equal(results, first)
                assert_equal(step(layer, x, dy), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=names)
@pytest.mark.parametrize("layout", layouts(4))
def test_every_layout_and_alignment(backend, layout, dtype):
    x, dy = (in_layout(randn(3, 6, 9, 8, dtype=dtype, seed=seed).to(DEVICE), layout) for seed in (0, 1))
    weight, bias = on_gpu(6, seed=2), on_gpu(6, seed=3)
    for function in (
        lambda x, w, b: batch_norm_act(x, None, None, w, b, True, activation="silu"),
        lambda x, w, b: group_norm_act(x, 3, w, b, activation="silu"),
    ):
        found = []
        for kind in (dtype, torch.float64):
            wide = kind == torch.float64
            # Not .to(): it would lay x out anew.
            arguments = [(t.double() if wide else t).detach().requires_grad_() for t in (x, weight, bias)]
            y = function(*arguments)
            found.append([y.detach(), *torch.autograd.grad(y, arguments, dy.to(kind))])
        for actual, exact in zip(*found, strict=True):
            # z is rounded to x's dtype before its gradient is taken, so that dweight is no better than that.
            assert_same(actual.to(dtype), exact.to(dtype), layout, formats=False)


# Streams and devices


def _through_a_stream(backend):
    """A step on another stream, whose input arrives late: what ran on the default stream would miss it."""
    values, dy = on_gpu(8, 16, 32, 32), on_gpu(8, 16, 32, 32, seed=1)
    layer = BatchNormAct2d(16).to(DEVICE)
    expected = step(copy.deepcopy(layer), values, dy)
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        x.copy_(values)
        result = step(layer, x, dy)
    stream.synchronize()
    return result, expected


def test_runs_on_the_current_stream(backend):
    assert_equal(*_through_a_stream(backend))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
def test_runs_on_the_device_of_its_input(backend):
    assert torch.cuda.current_device() == 0
    layer, x, dy = BatchNormAct2d(16).to("cuda:1"), *(randn(8, 16, 9, 9, seed=seed) for seed in (0, 1))
    result = step(layer, x.to("cuda:1"), dy.to("cuda:1"))
    expected = step(BatchNormAct2d(16).to("cuda:0"), x.to("cuda:0"), dy.to("cuda:0"))
    assert all(t.device == torch.device("cuda:1") for t in result)
    assert_equal([t.cpu() for t in result], [t.cpu() for t in expected])
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("place", ["weight", "bias", "residual", "running_mean", "running_var"])
def test_tensors_on_different_devices_raise(backend, place):
    arguments = {name: torch.ones(4, device=DEVICE) for name in ("weight", "bias", "running_mean", "running_var")}
    arguments["residual"] = on_gpu(2, 4, 5, 5)
    arguments[place] = arguments[place].cpu()
    with pytest.raises(RuntimeError, match="device"):
        batch_norm_act(on_gpu(2, 4, 5, 5), training=True, **arguments)
    with pytest.raises(RuntimeError, match="device"):
        group_norm_act(on_gpu(2, 4, 5, 5), 2, torch.ones(4), None)
    torch.cuda.synchronize()  # nothing was launched that fails now


def test_gradient_on_another_device_raises(backend):
    x = on_gpu(2, 4, 5, 5).requires_grad_()
    with pytest.raises(RuntimeError):
        batch_norm_act(x, None, None, training=True).backward(torch.ones(2, 4, 5, 5))


# CUDA graphs and the host


def _buffers(layer):
    return [buffer.clone() for buffer in layer.buffers()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_graph_replays_equal_eager(backend, layout, momentum, dtype):
    shape = (4, 24, 14, 14)
    layer = BatchNormAct2d(24, momentum=momentum).to(DEVICE)
    twin = copy.deepcopy(layer)
    before = _buffers(layer)
    x, dy = (torch.zeros_like(on_gpu(*shape, dtype=dtype, layout=layout)) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, dy)
    for buffer, value in zip(layer.buffers(), before, strict=True):
        buffer.copy_(value)  # what warming up did to them
    for replay in range(100):
        batch = [on_gpu(*shape, dtype=dtype, layout=layout, seed=2 * replay + i) for i in range(2)]
        x.copy_(batch[0])
        dy.copy_(batch[1])
        graph.replay()
        assert_equal(results, step(twin, *batch))
    assert_equal(layer.buffers(), twin.buffers())
    assert layer.num_batches_tracked.item() == 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_replays_of_group_norm_equal_eager(backend, layout):
    layer = GroupNormAct(8, 64, activation="silu").to(DEVICE)
    x, dy = (torch.zeros_like(on_gpu(2, 64, 16, 16, layout=layout)) for _ in range(2))
    step(layer, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, dy)
    for replay in range(100):
        batch = [on_gpu(2, 64, 16, 16, layout=layout, seed=2 * replay + i) for i in range(2)]
        x.copy_(batch[0])
        dy.copy_(batch[1])
        graph.replay()
        assert_equal(results, step(layer, *batch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_call_waits_for_the_gpu(backend, momentum, layout):
    x, dy = on_gpu(4, 24, 14, 14, layout=layout), on_gpu(4, 24, 14, 14, layout=layout)
    batch_norm = BatchNormAct2d(24, momentum=momentum).to(DEVICE)
    group_norm = GroupNormAct(4, 24).to(DEVICE)
    for layer in (batch_norm, group_norm):
        step(layer, x, dy)  # compiles, allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in (batch_norm, group_norm):
            step(layer, x, dy)
            layer.eval()
            with torch.no_grad():
                layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch_norm.num_batches_tracked.item() == 2


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_running_statistics_and_counter(backend, momentum):
    layer = BatchNormAct2d(5, momentum=momentum).to(DEVICE)
    native = torch.nn.BatchNorm2d(5, momentum=momentum).double()
    for seed in range(4):
        x = randn(3, 5, 6, 7, seed=seed)
        layer(x.to(DEVICE))
        native(x.double())
    assert layer.num_batches_tracked.item() == 4
    torch.testing.assert_close(layer.running_mean.cpu(), native.running_mean.float())
    torch.testing.assert_close(layer.running_var.cpu(), native.running_var.float())


def test_the_host_time_of_a_tiny_call(backend):
    """A rough bound, for a busy machine; the benchmark measures it."""
    x, dy = on_gpu(2, 4, 2, 2), on_gpu(2, 4, 2, 2, seed=1)
    norm = torch.nn.BatchNorm2d(4).to(DEVICE)
    native = torch.nn.Sequential(norm, torch.nn.ReLU6(inplace=True))
    native.weight, native.bias = norm.weight, norm.bias
    best = {}
    for _ in range(5):
        for name, layer in (("ours", BatchNormAct2d(4).to(DEVICE)), ("native", native)):
            step(layer, x, dy)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                step(layer, x, dy)
            best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
            torch.cuda.synchronize()
    assert best["ours"] < (3 if backend == "extension" else 10) * best["native"]


# Limits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((131_072, 3, 2, 2), None),
        ((131_072, 4, 2, 2), 2),
        ((65_536, 2, 1, 3), None),
        ((2, 70_000, 2, 2), None),
        ((2, 70_000, 2, 2), 35_000),
        ((1, 70_000, 3, 3), 70_000),
    ],
    ids=str,
)
def test_more_than_a_grid_dimension_holds(backend, shape, groups, layout):
    assert judge(cases.Case("own", shape, "float32", layout, groups, "relu6"), True) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_elements_than_an_int_counts(backend, layout):
    n, c, h, w = shape = (3, 4, 16_384, 10_923)  # 2^31 + 98,304 elements
    elements = n * c * h * w
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 10 * 2 * elements:
        pytest.skip("not enough GPU memory")
    x = torch.empty(shape, dtype=torch.float16, device=DEVICE, memory_format=LAYOUTS[layout])
    x.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    x.requires_grad_()
    weight, bias = on_gpu(c, seed=1).requires_grad_(), on_gpu(c, seed=2).requires_grad_()
    y = batch_norm_act(x, None, None, weight, bias, True, activation=None)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    with torch.no_grad():
        for channel in range(c):
            values = [x[i, channel].double() for i in range(n)]
            mean = sum(v.mean() for v in values) / n
            var = sum((v - mean).square().mean() for v in values) / n
            for i in (0, n - 1):
                z = (values[i] - mean) * (var + EPS).rsqrt() * weight[channel] + bias[channel]
                assert (y[i, channel].double() - z).abs().max() < 2e-2
    # Of a constant gradient nothing is left, and the sums count the elements.
    assert dx.abs().max() < 1e-2
    torch.testing.assert_close(dbias, torch.full_like(dbias, elements / c), rtol=1e-5, atol=0)
    assert (dweight.abs() < 1e-4 * elements / c).all()


def test_empty_tensors(backend):
    for shape in ((0, 4, 5, 5), (2, 4, 0, 5)):
        layer = BatchNormAct2d(4).to(DEVICE)
        x = torch.empty(shape, device=DEVICE, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape
        assert layer.num_batches_tracked.item() == 1
        assert not layer.weight.grad.any()
        assert not layer.running_mean.any()


# Autocast


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names)
def test_autocast(backend, dtype):
    x = on_gpu(2, 8, 6, 6, dtype=dtype)
    group_norm, batch_norm = GroupNormAct(4, 8).to(DEVICE), BatchNormAct2d(8).to(DEVICE)
    with torch.autocast("cuda", dtype):
        y, z = group_norm(x), batch_norm(x)
        native = F.relu6(F.group_norm(x, 4, group_norm.weight, group_norm.bias))
    assert y.dtype == native.dtype == torch.float32
    assert_same(y, native)
    assert z.dtype == dtype
    expected = native_batch_norm_act(x, None, None, batch_norm.weight, batch_norm.bias, True, 0.1, EPS, "relu6")
    assert_same(z, expected)


# Repeatability


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((32, 96, 14, 14), None),
        ((16, 3, 56, 56), None),
        ((64, 320, 7, 7), None),
        ((2, 320, 32, 32), 32),
        ((1, 8, 128, 128), 2),
    ],
    ids=str,
)
def test_repeatability(backend, shape, groups, layout):
    dtype = torch.bfloat16 if shape[0] > 16 else torch.float32
    layer = BatchNormAct2d(shape[1], track_running_stats=False) if groups is None else GroupNormAct(groups, shape[1])
    layer.to(DEVICE)
    x, dy = (on_gpu(*shape, dtype=dtype, layout=layout, seed=seed) for seed in (0, 1))
    first = step(layer, x, dy)
    other = torch.empty(1 << 22, device=DEVICE)
    for _ in range(1000):
        other.normal_()  # so that the caches are in another state each time
        assert_equal(step(layer, x, dy), first)
