"""The modules as drop-ins for torch.nn's: constructors, state_dict, copies, dtypes, compile and export."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, activate, assert_same, names, randn, training_or_eval
from torch import nn

import normfused
from normfused import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct

# (ours, native's, constructor arguments, input shape).
LAYERS = (
    (BatchNormAct1d, nn.BatchNorm1d, (6,), (4, 6)),
    (BatchNormAct1d, nn.BatchNorm1d, (6,), (4, 6, 5)),
    (BatchNormAct2d, nn.BatchNorm2d, (6,), (4, 6, 5, 3)),
    (BatchNormAct3d, nn.BatchNorm3d, (6,), (2, 6, 5, 3, 2)),
    (GroupNormAct, nn.GroupNorm, (3, 6), (4, 6, 5, 3)),
)
layers = pytest.mark.parametrize(("ours", "native", "arguments", "shape"), LAYERS, ids=names)
batch_norms = pytest.mark.parametrize(("ours", "native", "arguments", "shape"), LAYERS[:-1], ids=names)


def randomise(module):
    """Parameters and statistics that are not the identity."""
    with torch.no_grad():
        for index, (name, tensor) in enumerate(module.state_dict().items()):
            if tensor.is_floating_point():
                values = randn(*tensor.shape, seed=index)
                tensor.copy_(values.abs() + 0.5 if name.endswith("var") else values)
    return module


def assert_modules_agree(ours, native, shape, training=True, dtype=torch.float32):
    """Output, gradients and buffers of one step."""
    x = randn(*shape, dtype=dtype).requires_grad_()
    y = ours.train(training)(x)
    native_y = activate(native.train(training)(x), ours.activation)
    assert_same(y, native_y, "y")
    dy = randn(*shape, dtype=dtype, seed=1)
    grads = torch.autograd.grad(y, (x, *ours.parameters()), dy)
    native_grads = torch.autograd.grad(native_y, (x, *native.parameters()), dy)
    for grad, native_grad in zip(grads, native_grads, strict=True):
        assert_same(grad, native_grad, "gradient")
    for (name, buffer), (native_name, native_buffer) in zip(ours.named_buffers(), native.named_buffers(), strict=True):
        assert name == native_name
        assert_same(buffer, native_buffer, name)


@layers
@training_or_eval
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_state_dict_goes_both_ways(backend, ours, native, arguments, shape, training, activation):
    fused, plain = ours(*arguments, activation=activation), randomise(native(*arguments))
    assert isinstance(fused, native)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert str(fused.load_state_dict(plain.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert_modules_agree(fused, plain, shape, training)
    plain = native(*arguments)
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert_modules_agree(fused, plain, shape, training)


@batch_norms
def test_batch_norm_constructors(backend, ours, native, arguments, shape):
    for args, kwargs in (
        ((6, 0.01, 0.3, True, True), {}),
        ((6, 0.01, None, False, False), {}),
        ((6,), {"eps": 0.5, "momentum": 0.7, "affine": True, "track_running_stats": False}),
        ((), {"num_features": 6, "affine": False}),
        ((6,), {"bias": False}),
        ((6, 1e-3), {"dtype": torch.float64, "device": torch.get_default_device()}),
    ):
        fused, plain = ours(*args, **kwargs, activation="silu"), native(*args, **kwargs)
        assert list(fused.state_dict()) == list(plain.state_dict())
        dtype = kwargs.get("dtype", torch.float32)
        for training in (True, False):
            assert_modules_agree(fused, plain, shape, training, dtype)


def test_group_norm_constructors(backend):
    for args, kwargs in (
        ((3, 6, 0.01, True), {}),
        ((3, 6, 0.01, False), {}),
        ((), {"num_groups": 2, "num_channels": 6, "eps": 0.5}),
        ((3, 6), {"bias": False}),
        ((1, 6), {"dtype": torch.float64, "device": torch.get_default_device()}),
    ):
        fused, plain = GroupNormAct(*args, **kwargs, activation="relu6"), nn.GroupNorm(*args, **kwargs)
        assert list(fused.state_dict()) == list(plain.state_dict())
        assert_modules_agree(fused, plain, (4, 6, 5), dtype=kwargs.get("dtype", torch.float32))


@pytest.mark.parametrize("arguments", [(), (4, 3)], ids=names)
def test_group_norm_constructor_errors(arguments):
    native_error = TypeError if not arguments else ValueError
    for module in (nn.GroupNorm, GroupNormAct):
        with pytest.raises(native_error):
            module(*arguments)


def test_defaults():
    """The activation is the fused one for BatchNorm, none for GroupNorm."""
    assert [ours(*arguments).activation for ours, _, arguments, _ in LAYERS] == ["relu6"] * 4 + [None]


@layers
def test_extra_repr(ours, native, arguments, shape):
    expected = native(*arguments).extra_repr()
    assert ours(*arguments, activation="relu6").extra_repr() == f"{expected}, activation='relu6'"
    assert ours(*arguments, activation=None).extra_repr() == f"{expected}, activation=None"
    if ours is not GroupNormAct:
        assert ours(*arguments, pre_activation="silu").extra_repr() == (
            f"{expected}, activation='relu6', pre_activation='silu'"
        )


@layers
@pytest.mark.parametrize("keyword", ["activation", "pre_activation"])
def test_unknown_activation(ours, native, arguments, shape, keyword):
    if ours is GroupNormAct and keyword == "pre_activation":
        with pytest.raises(TypeError, match="pre_activation"):
            ours(*arguments, pre_activation="relu")
        return
    for unknown in ("relu7", "", "ReLU6", nn.ReLU6(), 6):
        with pytest.raises((ValueError, TypeError), match=keyword):
            ours(*arguments, **{keyword: unknown})


def copy_through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@layers
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy_through_torch_save, copy.copy]
)
def test_copies(backend, ours, native, arguments, shape, copied):
    module = randomise(ours(*arguments, activation="hardswish"))
    plain = native(*arguments)
    plain.load_state_dict(module.state_dict())
    twin = copied(module)
    assert type(twin) is ours
    assert twin.activation == "hardswish"
    assert_modules_agree(twin, plain, shape)


@layers
def test_meta_device(backend, ours, native, arguments, shape):
    state = randomise(native(*arguments)).state_dict()
    for assign in (True, False):
        module, plain = ours(*arguments, device="meta"), native(*arguments)
        y = module(torch.empty(shape, device="meta"))
        assert y.is_meta
        assert y.shape == shape
        module = module if assign else module.to_empty(device=torch.get_default_device())
        module.load_state_dict(copy.deepcopy(state), assign=assign)
        plain.load_state_dict(copy.deepcopy(state))
        assert_modules_agree(module, plain, shape)


@batch_norms
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn(backend, ours, native, arguments, shape, momentum):
    loader = [randn(*shape, seed=seed) + seed for seed in range(3)]
    fused, plain = ours(6, momentum=momentum), native(6, momentum=momentum)
    for module in (fused, plain):
        module(loader[0])
        torch.optim.swa_utils.update_bn(loader, module)
    for buffer, native_buffer in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_same(buffer, native_buffer, "buffer")
    assert fused.num_batches_tracked.item() == 3
    assert fused.momentum == momentum


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=names)
@training_or_eval
def test_module_dtypes(backend, ours, native, arguments, shape, dtype, training):
    fused, plain = ours(*arguments, activation="relu6"), randomise(native(*arguments))
    fused.load_state_dict(plain.state_dict())
    assert_modules_agree(fused.to(dtype), plain.to(dtype), shape, training, dtype)


@batch_norms
def test_wrong_dimensions(backend, ours, native, arguments, shape):
    for dim in range(1, 7):
        if dim == len(shape) or (ours is BatchNormAct1d and dim in (2, 3)):
            continue
        for module in (native(*arguments), ours(*arguments)):
            with pytest.raises(ValueError, match="expected"):
                module(torch.ones([6] * dim))
            assert module.num_batches_tracked.item() == 0


@training_or_eval
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual(backend, training, activation):
    module, plain = randomise(BatchNormAct2d(6, activation=activation)), randomise(nn.BatchNorm2d(6))
    x, residual = randn(4, 6, 5, 3).requires_grad_(), randn(4, 6, 5, 3, seed=1).requires_grad_()
    y = module.train(training)(x, residual)
    native_y = activate(plain.train(training)(x) + residual, activation)
    assert_same(y, native_y, "y")
    dy = randn(4, 6, 5, 3, seed=2)
    grads = torch.autograd.grad(y, (x, residual, *module.parameters()), dy)
    for grad, native_grad in zip(
        grads, torch.autograd.grad(native_y, (x, residual, *plain.parameters()), dy), strict=True
    ):
        assert_same(grad, native_grad, "gradient")


@training_or_eval
@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("pre_activation", [name for name in ACTIVATIONS if name is not None])
def test_activation_before_the_norm(backend, training, activation, pre_activation):
    module = randomise(BatchNormAct2d(6, activation=activation, pre_activation=pre_activation))
    plain = randomise(nn.BatchNorm2d(6))
    x = randn(4, 6, 5, 3).requires_grad_()
    y = module.train(training)(x)
    native_y = activate(plain.train(training)(activate(x, pre_activation)), activation)
    assert_same(y, native_y, "y")
    dy = randn(4, 6, 5, 3, seed=2)
    (dx,), (native_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(native_y, x, dy)
    assert_same(dx, native_dx, "dx")
    assert_same(module.running_var, plain.running_var, "running_var")


@pytest.mark.parametrize("activation", [None, "relu6"])
@pytest.mark.parametrize("pre_activation", ["relu", "relu6", "silu"])
def test_an_activation_before_the_norm_is_in_the_kernel_where_that_has_it(backend, activation, pre_activation):
    x = randn(4, 6, 5, 3).requires_grad_()
    for residual in (None, randn(4, 6, 5, 3, seed=1)):
        alone = activation is None and residual is None
        fuses = (pre_activation != "silu" and alone) if backend == "extension" else backend != "torch"
        y = BatchNormAct2d(6, activation=activation, pre_activation=pre_activation)(x, residual)
        from_x = y.grad_fn.next_functions[0][0]
        assert (type(from_x).__name__ == "AccumulateGrad") == fuses


class Net(nn.Module):
    """Two fused layers, a residual, and their like in torch.nn."""

    def __init__(self, fused):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = BatchNormAct2d(6) if fused else nn.BatchNorm2d(6)
        self.bn2 = BatchNormAct2d(6, activation="silu") if fused else nn.BatchNorm2d(6)
        self.gn = GroupNormAct(3, 6, activation="relu6") if fused else nn.GroupNorm(3, 6)
        self.fused = fused

    def forward(self, x):
        x = self.conv(x)
        if self.fused:
            return self.gn(self.bn2(self.bn1(x), x))
        return F.relu6(self.gn(F.silu(self.bn2(F.relu6(self.bn1(x))) + x)))


def fused_and_plain():
    fused, plain = Net(True), randomise(Net(False))
    fused.load_state_dict(plain.state_dict())
    return fused, plain


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compile(backend, compiler):
    """Two steps of training and an evaluation without a graph break: native's numbers, buffers included."""
    torch._dynamo.reset()
    fused, plain = fused_and_plain()
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    for step in range(2):
        x, native_x = (randn(4, 3, 8, 8, seed=step).requires_grad_() for _ in range(2))
        y, native_y = compiled(x), plain(native_x)
        assert_same(y, native_y, "y")
        y.square().sum().backward()
        native_y.square().sum().backward()
        assert_same(x.grad, native_x.grad, "dx")
    for (name, p), native_p in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_same(p.grad, native_p.grad, name)
    for (name, buffer), native_buffer in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert_same(buffer, native_buffer, name)
    assert fused.bn1.num_batches_tracked.item() == 2
    fused.eval(), plain.eval()
    with torch.no_grad():
        assert_same(compiled(x), plain(x), "y")
    assert fused.bn1.num_batches_tracked.item() == 2
    torch._dynamo.reset()


def test_compile_has_one_graph(backend):
    torch._dynamo.reset()
    fused, _ = fused_and_plain()
    for training in (True, False):
        explanation = torch._dynamo.explain(fused.train(training))(randn(4, 3, 8, 8))
        assert explanation.graph_break_count == 0
        assert explanation.graph_count == 1
    torch._dynamo.reset()


@pytest.mark.stricter_than_native("momentum=None breaks the graph (#194504)")
def test_compile_of_cumulative_averages(backend):
    torch._dynamo.reset()
    ours, native = BatchNormAct2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = randn(4, 3, 5, 5, seed=step)
        assert_same(compiled(x), F.relu6(native(x)), "y")
    for buffer, native_buffer in zip(ours.buffers(), native.buffers(), strict=True):
        assert_same(buffer, native_buffer, "buffer")
    torch._dynamo.reset()


def test_export(backend):
    """An evaluated model through torch.export, saved and loaded, at two batch sizes."""
    fused, plain = fused_and_plain()
    fused.eval(), plain.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused, (randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (4, 7):
        x = randn(size, 3, 8, 8, seed=size)
        assert_same(loaded(x), plain(x), "y")


def test_public_names():
    assert set(normfused.__all__) >= {ours.__name__ for ours, *_ in LAYERS} | {"info", "use_backend"}
