"""SyncBatchNormAct on several processes equals torch.nn's BatchNorm and activation on the whole batch in one."""

import contextlib
import copy
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import CHANNELS_LAST, activate, assert_memory_format, assert_same, names, randn
from ranks import Ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfused
from bench.mobilenet_v2 import MobileNetV2
from normfused import SyncBatchNormAct, distributed
from normfused.backends import BACKENDS

STEPS = 2


@pytest.fixture(scope="module")
def pools():
    """Ranks by world size."""
    pools = {world_size: Ranks(world_size) for world_size in (2, 4)}
    yield pools
    for ranks in pools.values():
        ranks.stop()


@pytest.fixture(params=(2, 4), ids=lambda world_size: f"{world_size} ranks")
def ranks(request, pools):
    return pools[request.param]


@dataclass(frozen=True)
class Case:
    """A layer, and what each rank gives it."""

    sizes: tuple[int, ...]  # N of each rank
    shape: tuple[int, ...] = (5, 3, 4)  # C and the spatial sizes
    activation: str | None = "relu6"
    pre_activation: str | None = None
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    channels_last: bool = False
    residual: bool = False
    affine: bool = True
    track: bool = True
    momentum: float | None = 0.1
    mean: float = 0.5
    backend: str | None = None

    def layer(self, cls, **kwargs):
        dtype = self.parameter_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        arguments = {"affine": self.affine, "track_running_stats": self.track, "momentum": self.momentum}
        layer = cls(self.shape[0], **arguments, **kwargs, dtype=dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(layer.parameters()):
                parameter.copy_(1 + 0.5 * randn(self.shape[0], seed=seed))
        return layer

    def tensors(self, step):
        """x, residual and dy of the whole batch."""
        shape = (sum(self.sizes), *self.shape)
        x, residual, dy = (randn(*shape, dtype=self.dtype, seed=10 * step + seed) for seed in range(3))
        return x + self.mean, residual if self.residual else None, dy

    def part(self, t, rank):
        if t is None:
            return None
        t = t.split(self.sizes)[rank].clone()
        return t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if self.channels_last else t


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def on_rank(case):
    """What this rank gets from SyncBatchNormAct over some steps."""
    layer = case.layer(SyncBatchNormAct, activation=case.activation, pre_activation=case.pre_activation)
    results = []
    for step in range(STEPS):
        x, residual, dy = (case.part(t, dist.get_rank()) for t in case.tensors(step))
        x.requires_grad_()
        if residual is not None:
            residual.requires_grad_()
        with normfused.use_backend(case.backend) if case.backend else contextlib.nullcontext():
            y = layer(x, residual)
            layer.zero_grad()
            y.backward(dy)
        for t in (y, x.grad):
            assert_memory_format(t, x)
        results.append(
            {
                "y": y.detach(),
                "dx": x.grad,
                "dresidual": None if residual is None else residual.grad,
                **{f"d{name}": parameter.grad for name, parameter in layer.named_parameters()},
                **state(layer),
            }
        )
    if case.track:
        with torch.no_grad():
            results[-1]["evaluation"] = layer.eval()(x, residual)
    return results


def in_one_process(case):
    """The same by torch.nn's BatchNorm on the whole batch."""
    layer = case.layer({1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(case.shape)])

    def forward(x, residual):
        z = layer(activate(x, case.pre_activation))
        return activate(z if residual is None else z + residual, case.activation)

    results = []
    for step in range(STEPS):
        x, residual, dy = case.tensors(step)
        x.requires_grad_()
        if residual is not None:
            residual.requires_grad_()
        y = forward(x, residual)
        layer.zero_grad()
        y.backward(dy)
        results.append(
            {
                "y": y.detach(),
                "dx": x.grad,
                "dresidual": None if residual is None else residual.grad,
                **{f"d{name}": parameter.grad for name, parameter in layer.named_parameters()},
                **state(layer),
            }
        )
    layer.eval()
    # Without running statistics evaluation normalises with those of the batch, on each rank its own.
    if case.track:
        with torch.no_grad():
            results[-1]["evaluation"] = forward(x, residual)
    return results


def check(ranks, case):
    all_results, expected = ranks.run(on_rank, case), in_one_process(case)
    for step in range(STEPS):
        on_ranks, whole = [results[step] for results in all_results], expected[step]
        for name, native in whole.items():
            if native is None:
                continue
            parts = [result[name] for result in on_ranks]
            if name in ("y", "dx", "dresidual", "evaluation"):
                actual = torch.cat(parts)
            elif name in ("dweight", "dbias"):
                # In 16 bits native rounds dz before it sums.
                actual, native = sum(parts).to(case.dtype), native.to(case.dtype)
            else:
                actual = parts[0]
                assert all(torch.equal(part, actual) for part in parts), f"{name} differs between ranks"
            assert_same(actual, native, f"{name} of step {step}", formats=False)


def sizes_for(world_size):
    return {
        "even": (3,) * world_size,
        "uneven": tuple(range(1, world_size + 1)),
        "an empty rank": (0, *(2,) * (world_size - 1)),
        "only the last": (*(0,) * (world_size - 1), 4),
    }


@pytest.mark.parametrize("sizes", ["even", "uneven", "an empty rank", "only the last"])
@pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("residual", [False, True], ids=("", "residual"))
def test_layer(ranks, sizes, channels_last, residual):
    check(ranks, Case(sizes_for(ranks.world_size)[sizes], channels_last=channels_last, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
def test_dtypes(pools, dtype, channels_last):
    check(pools[2], Case((3, 2), (5, 6, 7), dtype=dtype, channels_last=channels_last, residual=True))


@pytest.mark.parametrize("activation", [None, "relu", "silu", "hardswish", "sigmoid", "leaky_relu"])
@pytest.mark.parametrize("residual", [False, True], ids=("", "residual"))
def test_activations(pools, activation, residual):
    check(pools[2], Case((3, 2), activation=activation, residual=residual))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1), (5,)),
        Case((1, 0, 1, 1), (5,)),
        Case((4, 3), (6,)),
        Case((2, 3), (6, 7)),
        Case((2, 3), (3, 2, 4, 5), channels_last=True),
        Case((2, 3), affine=False),
        Case((2, 3), track=False),
        Case((2, 3), momentum=None),
        Case((0, 3), momentum=None, dtype=torch.float64),
        Case((2, 3), momentum=1.0),
        Case((2, 3), pre_activation="relu", activation=None),
        Case((20, 30), mean=1e4, activation=None, dtype=torch.float64),
        Case((2, 3), dtype=torch.bfloat16, parameter_dtype=torch.bfloat16),
    ],
    ids=(
        "one value a rank",
        "one value a rank, one empty",
        "2d",
        "3d",
        "5d",
        "no parameters",
        "no running statistics",
        "cumulative average",
        "cumulative average, an empty rank",
        "momentum 1",
        "pre_activation",
        "large mean",
        "16-bit parameters",
    ),
)
def test_variants(pools, case):
    check(pools[len(case.sizes)], case)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "extension"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_backends(pools, backend, dtype):
    check(pools[2], Case((2, 1), dtype=dtype, residual=True, backend=backend))


# What goes on between the ranks


def count_collectives(sizes):
    calls = []

    def counted(function):
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return wrapper

    case = Case(sizes)
    x, _, dy = (case.part(t, dist.get_rank()) for t in case.tensors(0))
    layer = case.layer(SyncBatchNormAct)
    with (
        mock.patch.object(distributed, "_all_gather", counted(distributed._all_gather)),
        mock.patch.object(dist, "all_reduce", counted(dist.all_reduce)),
    ):
        y = layer(x.requires_grad_())
        forward = len(calls)
        y.backward(dy)
        backward = len(calls) - forward
        layer(x.detach()).backward(dy)
        without_dx = len(calls) - forward - backward
        layer.eval()(x).backward(dy)
    return forward, backward, without_dx, len(calls)


def test_one_collective_each_way(ranks):
    sizes = sizes_for(ranks.world_size)["an empty rank"]
    assert ranks.run(count_collectives, sizes) == ranks.world_size * [(1, 1, 1, 3)]


def all_empty():
    layer = Case((0,)).layer(SyncBatchNormAct)
    x = torch.empty(0, 5, 3, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return y.shape, x.grad.shape, state(layer), layer.weight.grad, layer.bias.grad


def test_all_ranks_empty(ranks):
    for y_shape, dx_shape, buffers, dweight, dbias in ranks.run(all_empty):
        assert y_shape == dx_shape == (0, 5, 3, 4)
        expected = {
            "running_mean": torch.zeros(5),
            "running_var": torch.ones(5),
            "num_batches_tracked": torch.tensor(1),
        }
        assert all(torch.equal(buffers[name], value) for name, value in expected.items())
        assert not dweight.any()
        assert not dbias.any()


def one_value(rank_with_it):
    layer = Case((0,)).layer(SyncBatchNormAct)
    x = torch.ones(int(dist.get_rank() == rank_with_it), 5)
    with pytest.raises(ValueError, match="more than 1 value per channel on all ranks together"):
        layer(x)
    return state(layer)


def test_one_value_on_all_ranks_together_raises_on_each(ranks):
    for buffers in ranks.run(one_value, 1):
        assert not buffers["running_mean"].any()
        assert buffers["num_batches_tracked"] == 1


def in_groups(case, groups):
    """The layer over groups of ranks: each is a world of its own."""
    groups = [dist.new_group(ranks) for ranks in groups]
    layer = normfused.convert_sync_batchnorm(normfused.BatchNormAct2d(5), groups[dist.get_rank() // 2])
    with torch.no_grad():
        return layer(case.part(case.tensors(0)[0], dist.get_rank())), state(layer)


def test_process_groups(pools):
    case = Case((2, 3, 1, 4))
    results = pools[4].run(in_groups, case, ((0, 1), (2, 3)))
    parts = case.tensors(0)[0].split(case.sizes)
    for first in (0, 2):
        layer = nn.BatchNorm2d(5)
        expected = F.relu6(layer(torch.cat(parts[first : first + 2])))
        assert_same(torch.cat([y for y, _ in results[first : first + 2]]), expected.detach(), formats=False)
        for _, buffers in results[first : first + 2]:
            assert_same(buffers["running_var"], layer.running_var)


def in_a_group_of_one():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    x = randn(3, 5, 2, seed=dist.get_rank())
    layer = SyncBatchNormAct(5, process_group=groups[dist.get_rank()])
    other = normfused.BatchNormAct1d(5)
    return torch.equal(layer(x), other(x)) and torch.equal(layer.running_var, other.running_var)


def test_a_group_of_one_synchronises_nothing(pools):
    assert all(pools[2].run(in_a_group_of_one))


def second_derivatives(y, tensors):
    """Of a loss that depends on the gradients of all."""
    first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first[:2]), tensors)


def differentiated_twice(case):
    tensors = [None if t is None else case.part(t, dist.get_rank()).requires_grad_() for t in case.tensors(0)]
    x, _, residual = tensors
    layer = case.layer(SyncBatchNormAct, activation=case.activation)
    return second_derivatives(layer(x, residual), [x] if residual is None else [x, residual])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_double_backward(ranks, affine, residual):
    sizes = sizes_for(ranks.world_size)["an empty rank"]
    case = Case(sizes, activation="silu", dtype=torch.float64, residual=residual, affine=affine)
    x, _, residual = case.tensors(0)
    layer = case.layer(nn.BatchNorm2d)
    tensors = [t.requires_grad_() for t in (x, residual) if t is not None]
    z = layer(x)
    expected = second_derivatives(F.silu(z if residual is None else z + residual), tensors)
    results = ranks.run(differentiated_twice, case)
    for actual, whole in zip(zip(*results, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(actual), whole)


def compiled(case):
    """The number of graph breaks of a layer that gives the same compiled and not."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(5, 5, 1), case.layer(SyncBatchNormAct, activation="relu6"))
    other = copy.deepcopy(model)
    x = case.part(case.tensors(0)[0], dist.get_rank())
    breaks = torch._dynamo.explain(copy.deepcopy(model))(x).graph_break_count
    for _ in range(STEPS):
        for forward in (torch.compile(model, backend="aot_eager"), other):
            forward.zero_grad()
            forward(x).square().sum().backward()
    for mine, others in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, others.grad)
    torch.testing.assert_close(state(model), state(other))
    return breaks


@pytest.mark.thorough
def test_compiles_without_graph_breaks(pools):
    assert pools[2].run(compiled, Case((2, 3))) == [0, 0]


def wrong_arguments():
    before = state(layer := SyncBatchNormAct(5))
    x = randn(3, 5, 2)
    for input, residual, error, message in (
        (x[0, 0], None, ValueError, "at least 2 dimensions, got 1"),
        (x[:, :0], None, RuntimeError, "5 channels, got shape"),
        (x.long(), None, NotImplementedError, "input must be float32"),
        (x, x[:, :, :1], ValueError, "residual of shape"),
        (x, x.double(), RuntimeError, "residual"),
        (x[:, :3], None, RuntimeError, "5 channels, got shape"),
    ):
        with pytest.raises(error, match=message):
            layer(input, residual)
    layer.eps = 0.0
    with pytest.raises(ValueError, match="eps must be positive"):
        layer(x)
    return all(torch.equal(before[name], layer.get_buffer(name)) for name in ("running_mean", "running_var"))


def test_wrong_arguments_leave_the_running_statistics(pools):
    assert all(pools[2].run(wrong_arguments))


def edited():
    layer, x = SyncBatchNormAct(5), randn(3, 5, seed=dist.get_rank()).requires_grad_()
    h = x * 2
    y = layer(h)
    y.add_(1)  # y is not kept
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    return True


def test_editing_the_output_is_fine_and_the_input_raises(pools):
    assert all(pools[2].run(edited))


# Memory


def with_less_memory(how):
    """Gradients and running statistics with and without checkpointing or recompute_activations."""
    layers = nn.Sequential(nn.Linear(4, 6), SyncBatchNormAct(6), nn.Linear(6, 6), SyncBatchNormAct(6), nn.Linear(6, 2))
    results = []
    for model, less in ((layers, False), (copy.deepcopy(layers), True)):
        for step in range(STEPS):
            x = randn(dist.get_rank() + 1, 4, seed=step)
            if not less:
                y = model(x)
            elif how == "recompute":
                with normfused.recompute_activations():
                    y = model(x)
            else:
                y = checkpoint(model, x.requires_grad_(), use_reentrant=how == "reentrant")
            y.square().sum().backward()
        results.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("how", ["recompute", "reentrant", "non-reentrant"])
def test_less_memory_changes_nothing(pools, how):
    assert all(pools[2].run(with_less_memory, how))


# Training a model


def train(wrap, parameters, batches, sizes, recompute=False):
    """Parameters and buffers after training a converted MobileNetV2 on this rank's part of every batch."""
    model = tiny_mobilenet()
    model.load_state_dict(parameters)
    model = normfused.convert_sync_batchnorm(normfused.convert(model))
    assert sum(isinstance(module, SyncBatchNormAct) for module in model.modules()) == 52
    model = WRAPPERS[wrap](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for x, labels in batches:
        x, labels = x.split(sizes)[rank], labels.split(sizes)[rank]
        with normfused.recompute_activations() if recompute else contextlib.nullcontext():
            loss = F.cross_entropy(model(x), labels, reduction="sum")
        optimizer.zero_grad()
        # The wrappers average over the ranks.
        (loss * world_size / sum(sizes)).backward()
        optimizer.step()
    return {
        name.removeprefix("module."): t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in model.state_dict().items()
    }


def tiny_mobilenet():
    return MobileNetV2(classes=3, width=0.125).double()


def fully_shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.features:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"DDP": nn.parallel.DistributedDataParallel, "FSDP2": fully_shard}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(
    ("world_size", "recompute"),
    [(2, False), *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((2, True), (4, False)))],
)
def test_training_a_model(pools, wrap, world_size, recompute):
    ranks = pools[world_size]
    torch.manual_seed(0)
    model = tiny_mobilenet()
    parameters = {name: t.clone() for name, t in model.state_dict().items()}
    sizes = (5, 3) if world_size == 2 else (3, 2, 1, 2)
    batches = [(randn(8, 3, 32, 32, seed=step, dtype=torch.float64), torch.arange(8) % 3) for step in range(3)]
    all_results = ranks.run(train, wrap, parameters, batches, sizes, recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    for results in all_results:
        assert list(results) == list(parameters)
        for name, native in model.state_dict().items():
            assert_same(results[name], native, name, formats=False)
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, parameters[name])]
    assert len(moved) == len(parameters)


# In one process


def pair(**arguments):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **arguments), nn.ReLU6(), nn.BatchNorm2d(4, **arguments)
    )
    return model, copy.deepcopy(model)


def test_without_a_process_group_it_is_batch_norm_act():
    layer, native = SyncBatchNormAct(5, activation="relu"), nn.BatchNorm2d(5)
    x = randn(2, 5, 3, 3)
    assert_same(layer(x), F.relu(native(x)))
    assert_same(layer.running_var, native.running_var)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x[:1, :, :1, :1])
    layer.eval(), native.eval()
    assert_same(layer(x, x), F.relu(native(x) + x))


def test_constructor():
    layer = SyncBatchNormAct(5, 1e-3, None, False, False, "group", activation=None, pre_activation="silu")
    native = nn.SyncBatchNorm(5, 1e-3, None, False, False, "group")
    attributes = {name: value for name, value in vars(native).items() if not name.startswith("_")}
    assert attributes.items() <= vars(layer).items()
    layer = SyncBatchNormAct(5, dtype=torch.float64)
    assert layer.weight.dtype == torch.float64
    extra = nn.SyncBatchNorm(5).extra_repr()
    assert str(layer) == f"SyncBatchNormAct({extra}, activation='relu6')"
    assert list(SyncBatchNormAct(5).state_dict()) == list(nn.SyncBatchNorm(5).state_dict())
    with pytest.raises(ValueError, match="activation must be one of"):
        SyncBatchNormAct(5, activation="tanh")


@pytest.mark.parametrize("first", [True, False], ids=("convert first", "sync only"))
def test_convert_sync_batchnorm(first):
    model, native = pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train(False)
    if first:
        normfused.convert(model)
    parameters, layer = list(model.parameters()), model[1]
    assert normfused.convert_sync_batchnorm(model) is model
    assert [type(module) for module in (model[1], model[3])] == 2 * [SyncBatchNormAct]
    assert [model[1].activation, model[3].activation] == (["relu6", None] if first else [None, None])
    assert model[1] is layer
    assert not model[1].training
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["params"] == parameters
    assert list(model.state_dict()) == list(native.state_dict())
    assert_same(model.train()(x := randn(2, 3, 8, 8)), native(x))
    # Again, with another group.
    normfused.convert_sync_batchnorm(model, "group")
    assert model[1].process_group == "group"


@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy], ids=("", "a copy"))
@pytest.mark.parametrize("first", [True, False], ids=("convert first", "sync only"))
def test_revert(first, duplicate):
    model, native = pair()
    if first:
        normfused.convert(model)
    model = duplicate(normfused.convert_sync_batchnorm(model))
    normfused.revert(model)
    assert str(model) == str(native)
    for module, other in zip(model.modules(), native.modules(), strict=True):
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()
    assert torch.equal(model.eval()(x := randn(2, 3, 8, 8)), native.eval()(x))


def test_revert_of_layers_built_synchronised():
    built, torchs = SyncBatchNormAct(4, process_group="group"), nn.SyncBatchNorm(4, process_group="group")
    model = nn.Sequential(built, normfused.convert_sync_batchnorm(copy.deepcopy(torchs)))
    assert type(model[1]) is SyncBatchNormAct
    model[1].process_group = "group"
    normfused.revert(model)
    assert str(model) == str(nn.Sequential(nn.Sequential(torchs, nn.ReLU6()), torchs))
    assert model[0][0].process_group == model[1].process_group == "group"


def test_convert_leaves_synchronised_layers():
    model, _ = pair()
    normfused.convert_sync_batchnorm(normfused.convert(model))
    sites = []
    normfused.convert(model, report=sites)
    assert [(site.outcome, site.reason) for site in sites] == [
        ("fused with relu6", "already converted"),
        ("no activation", "already converted"),
    ]


class Mine(nn.BatchNorm2d):
    pass


def test_convert_sync_batchnorm_names_what_it_leaves():
    model = nn.Sequential(nn.BatchNorm2d(4), Mine(4), nn.Sequential(nn.LazyBatchNorm1d()), nn.InstanceNorm2d(4))
    with pytest.warns(UserWarning, match=r"unsynchronised: 1 \(test_distributed\.Mine\), 2\.0 \(.*LazyBatchNorm1d\)$"):
        normfused.convert_sync_batchnorm(model)
    assert [type(module) for module in model[:2]] == [SyncBatchNormAct, Mine]
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        normfused.convert_sync_batchnorm(3)


def test_torchs_converter_never_drops_an_activation():
    """What Lightning's Trainer(sync_batchnorm=True) calls."""
    model, _ = pair()
    normfused.convert(model)
    for layer in (model, normfused.convert_sync_batchnorm(model), SyncBatchNormAct(4)):
        with pytest.raises(RuntimeError, match=r"drop the fused activation 'relu6'.*normfused\.convert_sync_batchnorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model[3])) is nn.SyncBatchNorm
    assert SyncBatchNormAct.convert_sync_batchnorm(model, "group")[1].process_group == "group"
