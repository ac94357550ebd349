"""Outputs recomputed in the backward pass: the same bits, one update of the statistics, less memory, nothing kept."""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, in_layout, names, randn
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normfused
from bench.memory import kept_memory, peak_memory
from bench.mobilenet_v2 import MobileNetV2
from bench.resnet import ResNet50
from normfused import BatchNormAct2d, GroupNormAct, functional, recompute

# Tests are small.
recompute_activations = functools.partial(normfused.recompute_activations, min_bytes=0)


@pytest.fixture
def clean():
    """Forgets the recipes of other tests, whose exceptions keep frames alive."""
    recompute._recipes.clear()


class Keeper:
    """An operation that keeps its input, and what it got back of it in the backward pass."""

    def __init__(self):
        self.back = []

    def __call__(self, y):
        keeper = self

        class Keep(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                ctx.save_for_backward(y)
                return y * 2

            @staticmethod
            def backward(ctx, dy):
                keeper.back.append(ctx.saved_tensors[0])
                return dy * 2

        return Keep.apply(y)


def recipes():
    """How many outputs can be recomputed now."""
    return len(recompute._recipes)


# The same bits


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
def test_batch_norm_bit_equal(clean, backend, dtype, layout, activation, training):
    x = in_layout(randn(3, 5, 6, 7, dtype=dtype, seed=1), layout).requires_grad_()
    residual = None if activation is None else in_layout(randn(3, 5, 6, 7, dtype=dtype, seed=2), layout)
    weight, bias, mean = (randn(5, dtype=dtype, seed=seed).requires_grad_(seed < 5) for seed in (3, 4, 5))
    keeper = Keeper()
    with recompute_activations():
        y = functional.batch_norm_act(
            x, mean, mean.abs(), weight, bias, training, activation=activation, residual=residual
        )
        expected = y.clone()
        out = keeper(y)
        if backend != "torch":
            assert recipes() == 1
    strides = y.stride()
    del y
    out.sum().backward()
    (back,) = keeper.back
    assert torch.equal(back, expected)
    assert back.stride() == strides


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [True, False], ids=("", "no parameters"))
def test_group_norm_bit_equal(clean, backend, dtype, layout, affine):
    x = in_layout(randn(3, 6, 5, 7, dtype=dtype, seed=1), layout).requires_grad_()
    weight, bias = (randn(6, dtype=dtype, seed=seed) if affine else None for seed in (3, 4))
    keeper = Keeper()
    with recompute_activations():
        y = functional.group_norm_act(x, 2, weight, bias, activation="silu")
        expected = y.clone()
        out = keeper(y)
        assert recipes() == (backend != "torch")
    del y
    out.sum().backward()
    assert torch.equal(keeper.back[0], expected)


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_without_parameters(weight, bias):
    x = randn(3, 5, 8, seed=1).requires_grad_()
    weight, bias = (randn(5) if given else None for given in (weight, bias))
    keeper = Keeper()
    with recompute_activations():
        y = functional.batch_norm_act(x, None, None, weight, bias, True)
        expected = y.clone()
        out = keeper(y)
    del y
    out.sum().backward()
    assert torch.equal(keeper.back[0], expected)


def test_many_channels_bit_equal():
    """Every rounding of invstd and of its product with weight."""
    x = (randn(4, 20000, 3) * torch.logspace(-15, 15, 20000)[None, :, None]).requires_grad_()
    weight = randn(20000, seed=1) * 10
    keeper = Keeper()
    with recompute_activations():
        y = functional.batch_norm_act(x, None, None, weight, None, True, eps=1e-20, activation=None)
        expected = y.clone()
        out = keeper(y)
    del y
    out.sum().backward()
    assert torch.equal(keeper.back[0], expected)


def test_views_are_recomputed():
    x = randn(4, 6, 2, 2).requires_grad_()
    keeper = Keeper()
    with recompute_activations():
        y = functional.group_norm_act(x, 2, activation="relu")
        views = [y.flatten(1), y[1:3, 2], y.permute(1, 0, 2, 3), y.unsqueeze(0).expand(3, -1, -1, -1, -1)]
        expected = [view.clone() for view in views]
        out = sum(keeper(view).sum() for view in views)
    del y, views
    out.backward()
    assert all(any(torch.equal(back, view) for back in keeper.back) for view in expected)
    # Of one y, made once.
    assert len({back.untyped_storage().data_ptr() for back in keeper.back}) == 1


# Models


def resnet_block(channels):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), BatchNormAct2d(channels)
            self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), BatchNormAct2d(channels)

        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)

    return Block()


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        BatchNormAct2d(8, momentum=None),
        nn.Conv2d(8, 8, 3),
        GroupNormAct(2, 8, activation="silu"),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        BatchNormAct2d(8, activation=None, pre_activation="silu"),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 3),
        BatchNormAct2d(4, activation=None),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.LazyLinear(2),
    )


MODELS = {
    "convolutions": convolutions,
    "residual blocks": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), BatchNormAct2d(8), *(resnet_block(8) for _ in range(4))
    ),
    "layers in a row": lambda: nn.Sequential(
        BatchNormAct2d(3), BatchNormAct2d(3), GroupNormAct(1, 3), nn.Conv2d(3, 1, 1)
    ),
    "activations before the norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        BatchNormAct2d(8, activation=None, pre_activation="relu6"),
        nn.Conv2d(8, 4, 3),
        BatchNormAct2d(4, activation=None, pre_activation="relu"),
        nn.Conv2d(4, 1, 1),
    ),
    "MobileNetV2": lambda: normfused.convert(MobileNetV2(width=0.25)),
    "MobileNetV2, not converted": lambda: MobileNetV2(width=0.25),
}


def twins(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model(randn(2, 3, 16, 16))  # the lazy layer
    return model, copy.deepcopy(model)


def train(model, forward, steps=2):
    """Gradients and running statistics after some steps."""
    for step in range(steps):
        torch.manual_seed(step)
        x = randn(4, 3, 16, 16, seed=step).requires_grad_()
        forward(model, x).square().sum().backward()
    return [
        x.grad,
        *(parameter.grad for parameter in model.parameters()),
        *(buffer.clone() for buffer in model.buffers()),
    ]


def assert_equal(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def recomputed(model, x):
    with recompute_activations():
        return model(x)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_statistics(name):
    model, other = twins(name)
    assert_equal(train(model, recomputed), train(other, lambda model, x: model(x)))


def test_backward_within(clean):
    model, other = twins("convolutions")
    with recompute_activations():
        actual = train(model, lambda model, x: model(x))
        assert not recipes()
    assert_equal(actual, train(other, lambda model, x: model(x)))


def test_backward_twice():
    model, other = twins("residual blocks")
    x = randn(4, 3, 16, 16)
    out, expected = recomputed(model, x).sum(), other(x).sum()
    for _ in range(2):
        out.backward(retain_graph=True)
        expected.backward(retain_graph=True)
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])


def test_double_backward():
    model, other = (model.double() for model in twins("residual blocks"))
    for m, forward in ((model, recomputed), (other, lambda model, x: model(x))):
        x = randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(forward(m, x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_amp_with_a_scaler_and_frozen_layers():
    model, other = twins("MobileNetV2")
    for m in (model, other):
        m.features[:4].eval()
        m.features[:2].requires_grad_(False)

    def forward(model, x, less):
        with torch.autocast("cpu", torch.bfloat16), recompute_activations() if less else contextlib.nullcontext():
            return model(x)

    x = randn(4, 3, 32, 32)
    for m, less in ((model, True), (other, False)):
        (forward(m, x, less).sum() * 1024).backward()
    trained = [(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True) if a.requires_grad]
    assert all(torch.equal(a, b) for a, b in trained)


def test_parameters_may_change_before_the_backward_pass():
    """What keeps y natively does not depend on them: an optimizer may step between a forward and its backward."""
    layer = BatchNormAct2d(3, activation=None)
    x = randn(2, 3, 4, 4)
    keeper = Keeper()
    with recompute_activations():
        y = layer(x)
        expected = y.detach().clone()
        out = keeper(y)
    del y
    with torch.no_grad():
        layer.bias.add_(1)
    out.sum().backward()
    assert torch.equal(keeper.back[0], expected)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_a_share_is_recomputed(clean, share, expected):
    x = randn(2, 3, 4, 4).requires_grad_()
    layers = nn.Sequential(*(BatchNormAct2d(3) for _ in range(8)))
    with recompute_activations(share):
        y = layers(x)
        assert recipes() == expected
    del y


def test_small_outputs_are_kept(clean):
    x, layer = randn(2, 3, 4, 4).requires_grad_(), BatchNormAct2d(3)
    with normfused.recompute_activations():
        y = layer(x)
        assert not recipes()
    with recompute_activations(min_bytes=y.nbytes):
        z = layer(x)
        assert recipes() == 1
    del y, z


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_wrong_shares_raise(share):
    with pytest.raises(ValueError, match="share must be from 0 to 1"), recompute_activations(share):
        pass
    assert recompute.local.choice is None


def test_chains_are_cut(clean):
    """Residual blocks in a row: each output takes the one before it, so that one in between is kept."""
    layers = nn.ModuleList(BatchNormAct2d(3, activation="relu") for _ in range(40))
    other = copy.deepcopy(layers)
    chains = []

    def forward(layers, x, less):
        with recompute_activations() if less else contextlib.nullcontext():
            for layer in layers:
                x = layer(x * 1, x)
                if less and (recipe := recompute._recipes.get(x.untyped_storage()._cdata)):
                    chains.append(recipe.chain)
        return x

    x = randn(2, 3, 4, 4)
    outs = [forward(model, x, less).sum() for model, less in ((layers, True), (other, False))]
    assert (len(chains), max(chains)) == (38, 16)
    for out in outs:
        out.backward()
    assert_equal([p.grad for p in layers.parameters()], [p.grad for p in other.parameters()])


# Edits in place, reused memory


def test_an_edited_output_is_kept_as_it_is():
    x = randn(2, 3, 4, 4).requires_grad_()
    keeper = Keeper()
    with recompute_activations():
        y = BatchNormAct2d(3)(x * 1)
        y.add_(1)
        out = keeper(y)
    out.sum().backward()
    assert torch.equal(keeper.back[0], y)


@pytest.mark.parametrize("edit", ["x", "residual", "the kept tensor"])
def test_edits_of_what_is_needed_raise(edit):
    layer = BatchNormAct2d(3)
    x, residual = (randn(2, 3, 4, 4, seed=seed).requires_grad_() for seed in range(2))
    with recompute_activations():
        h, r = x * 1, residual * 1
        y = layer(h, residual=r)
        out = F.conv2d(y, randn(1, 3, 1, 1).requires_grad_())
        last = out.exp()
        loss = last.sum()
    {"x": h, "residual": r, "the kept tensor": last}[edit].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_tensor_in_the_same_memory_is_kept(clean):
    """A y is gone, its recipe alive, and its memory serves another tensor."""
    x = randn(8, 4, 256, 256).requires_grad_()  # large: normfused keeps the memory of such outputs
    layer = BatchNormAct2d(4)
    keeper = Keeper()
    with recompute_activations():
        y = layer(x)
        address, expected = y.data_ptr(), y.detach().clone()
        first = keeper(y)
        del y
        with torch.no_grad():
            other = layer(x + 1)
        assert other.data_ptr() == address
        other.requires_grad_()
        second = keeper(other)
    (first + second).sum().backward()
    assert sorted(torch.equal(back, expected) for back in keeper.back) == [False, True]
    assert any(back.data_ptr() == address for back in keeper.back)


def test_set_data_is_another_tensor():
    x = randn(2, 3, 4, 4).requires_grad_()
    keeper = Keeper()
    with recompute_activations():
        y = BatchNormAct2d(3)(x)
        y.data = torch.zeros_like(y)
        out = keeper(y)
    out.sum().backward()
    assert not keeper.back[0].any()


# Nothing is kept for longer than natively


def test_no_cycle_with_a_kept_output(clean):
    x = randn(2, 3).requires_grad_()
    gc.disable()
    try:
        with recompute_activations():
            y = x.exp()  # keeps its own output
        ref = StorageWeakRef(y.untyped_storage())
        del y
        assert ref.expired()
    finally:
        gc.enable()


def alive(tensors):
    return [ref() is not None for ref in tensors]


def storages(model, forward):
    """Runs a forward with references to the outputs of all convolutions and norms."""
    outputs = {}

    def note(module, args, output):
        outputs[module] = output.untyped_storage()

    handles = [m.register_forward_hook(note) for m in model if not isinstance(m, nn.Identity)]
    out = forward(model, randn(2, 3, 8, 8))
    for handle in handles:
        handle.remove()
    refs = {module: StorageWeakRef(storage) for module, storage in outputs.items()}
    return out, refs


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 1, 1)
    )


def test_only_inputs_of_norms_are_kept(clean):
    model = chain()
    out, refs = storages(model, recomputed)
    assert [refs[m].expired() for m in model] == [False, True, False, True, False]
    out.sum().backward()
    # The last graph is still there, as in a training loop: what it kept is gone.
    assert [refs[m].expired() for m in model] == [True, True, True, True, False]
    assert not recipes()


def test_a_graph_without_backward_is_freed(clean):
    model = chain()
    out, refs = storages(model, recomputed)
    del out
    assert all(ref.expired() for ref in refs.values())
    assert not recipes()


def test_gradients_of_a_part_free_the_part(clean):
    model = chain()
    x = randn(2, 3, 8, 8)
    with recompute_activations():
        h = model[:3](x)
        out = model[3:](h)
    torch.autograd.grad(out.sum(), h)
    assert recipes() == 1
    del out, h


def test_many_steps_within_one_context(clean):
    model, x = chain(), randn(2, 3, 8, 8)
    refs = []
    with recompute_activations():
        for _ in range(3):
            y = model[1](model[0](x))
            refs.append(weakref.ref(y))
            model[2:](y).sum().backward()
            del y
            assert not recipes()
    assert not any(alive(refs))


def test_without_gradients_nothing_is_noted(clean):
    with recompute_activations(), torch.no_grad():
        chain()(randn(2, 3, 8, 8))
        assert not recipes()
    chain()(randn(2, 3, 8, 8))
    assert not recipes()


def test_exceptions_end_it(clean):
    with pytest.raises(ZeroDivisionError), recompute_activations(), recompute_activations():
        raise ZeroDivisionError
    assert recompute.local.choice is None
    y = chain()(randn(2, 3, 8, 8))
    assert not recipes()
    del y


def bytes_of(model, x, forward):
    """Peak bytes of a forward whose graph is kept."""
    forward(model, x)  # oneDNN's weights in its own order
    return peak_memory(lambda: forward(model, x))


@pytest.mark.parametrize(
    "channels_last", [pytest.param(False, marks=pytest.mark.thorough), True], ids=("contiguous", "channels_last")
)
def test_mobilenet_needs_35_percent_less(channels_last):
    native_model = MobileNetV2(width=0.5).requires_grad_()
    x = randn(8, 3, 64, 64)
    if channels_last:
        native_model, x = (t.to(memory_format=torch.channels_last) for t in (native_model, x))
    model = normfused.convert(copy.deepcopy(native_model))
    native_bytes = bytes_of(native_model, x, lambda model, x: model(x))
    plain = bytes_of(model, x, lambda model, x: model(x))
    less = bytes_of(model, x, recomputed)
    assert less < 0.65 * native_bytes
    assert less < plain

    def step(model, forward):
        return lambda: forward(model, x).sum().backward()

    model.zero_grad()
    whole = peak_memory(step(native_model, lambda model, x: model(x)))
    assert peak_memory(step(model, recomputed)) < 0.75 * whole


def test_resnet_needs_35_percent_less():
    native_model = ResNet50(classes=10).to(memory_format=torch.channels_last)
    x = randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    model = normfused.convert(copy.deepcopy(native_model))
    native_model(x), recomputed(model, x)  # oneDNN's weights in its own order
    native_bytes = kept_memory(lambda: native_model(x))
    assert kept_memory(lambda: recomputed(model, x)) < 0.65 * native_bytes


# Together with others


def test_other_hooks_come_first(clean):
    model, other = twins("convolutions")

    def forward(model, x):
        with recompute_activations(), save_on_cpu():
            y = model(x)
            assert not recipes()
        return y

    assert_equal(train(model, forward), train(other, lambda model, x: model(x)))


def test_within_other_hooks():
    packed = []
    model = chain()
    with saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t), recompute_activations():
        y = model(randn(2, 3, 8, 8))
    assert not packed
    y.sum().backward()


def test_compiled_models_keep_what_they_keep():
    model, other = chain(), None
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    x = randn(2, 3, 8, 8)
    recomputed(compiled, x).sum().backward()
    other(x).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# Checkpointing: one update of the running statistics for each step


def checkpointed(model, x, **kwargs):
    return checkpoint(model, x, **kwargs)


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, normfused.checkpoint_policy)
CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": SELECTIVE},
    "selective, our operators saved": {
        "use_reentrant": False,
        "context_fn": functools.partial(
            create_selective_checkpoint_contexts,
            [torch.ops.normfused.batch_norm_act.default, torch.ops.normfused.group_norm_act.default],
        ),
    },
}


@pytest.mark.parametrize("backend", ["extension", "torch"], indirect=True)
@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("name", ["residual blocks", "MobileNetV2", "layers in a row"])
def test_checkpointing_updates_statistics_once(backend, how, name):
    model, other = twins(name)
    actual = train(model, functools.partial(checkpointed, **CHECKPOINTS[how]))
    assert_equal(actual, train(other, lambda model, x: model(x)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_inside_the_context(clean, momentum):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, momentum=momentum), nn.Conv2d(4, 1, 1))
    other = copy.deepcopy(model)

    def forward(model, x):
        with recompute_activations():
            y = checkpoint(model, x, use_reentrant=False)
            assert not recipes()
        return y

    assert_equal(train(model, forward), train(other, lambda model, x: model(x)))


def test_selective_checkpointing_recomputes_no_convolution():
    model = chain()
    called = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    y = checkpoint(model, randn(2, 3, 8, 8).requires_grad_(), **CHECKPOINTS["selective"])
    with Count():
        y.sum().backward()
    assert torch.ops.aten.convolution.default not in called
    assert called.count(torch.ops.normfused.batch_norm_act.default) == 2


def test_selective_checkpointing_needs_less_memory():
    model = normfused.convert(MobileNetV2(width=0.5))
    x = randn(8, 3, 64, 64)

    def forward(model, x):
        for block in model.features:
            x = checkpoint(block, x, **CHECKPOINTS["selective"])
        return x

    plain = bytes_of(model, x, lambda model, x: model.features(x))
    assert bytes_of(model, x, forward) < 0.75 * plain
