"""Malformed calls of the Python names, and the calls that crashed other implementations: each raises a clear error.

test_operators.py and test_triton.py hold those of the operators.
"""

import copy
import itertools

import pytest
import torch
from helpers import names, randn
from torch import nn

import normfused
from normfused import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct, backends
from normfused.functional import batch_norm_act, group_norm_act

SHAPE = (4, 6, 5, 5)
# AttributeError and MemoryError are not: they do not say what is wrong with the call.
ERRORS = (ValueError, RuntimeError, TypeError, NotImplementedError)


def good_batch_norm(training=True):
    return dict(
        input=randn(*SHAPE),
        running_mean=randn(6, seed=1),
        running_var=randn(6, seed=2).abs() + 0.5,
        weight=randn(6, seed=3),
        bias=randn(6, seed=4),
        training=training,
        momentum=0.1,
        eps=1e-5,
        activation="relu6",
        residual=randn(*SHAPE, seed=5),
    )


def good_group_norm():
    return dict(input=randn(*SHAPE), num_groups=3, weight=randn(6, seed=3), bias=randn(6, seed=4), eps=1e-5)


BAD_INPUTS = {
    **{f"shape {shape}": randn(*shape) for shape in ((), (6,), (4, 7, 5, 5), (4, 5, 5, 6), (6, 4), (1,) * 20)},
    **{str(d): torch.ones(SHAPE, dtype=d) for d in (torch.int64, torch.uint8, torch.bool, torch.complex64)},
    **{str(d): torch.ones(SHAPE).to(d) for d in (torch.float8_e5m2, torch.float8_e4m3fn)},
    "float64 among float32": torch.ones(SHAPE, dtype=torch.float64),
    "sparse": torch.ones(SHAPE).to_sparse(),
    "2^50 elements": torch.ones(1).expand(2**20, 6, 2**15, 2**13),
    **{repr(value): value for value in (None, 1.0, "x", [1.0], (randn(*SHAPE),), randn(*SHAPE).numpy())},
}
BAD_CHANNELS = {
    **{f"shape {shape}": torch.ones(shape) for shape in ((0,), (1,), (5,), (7,), (), (6, 1), (1, 6), (2, 3))},
    **{
        str(d): torch.ones(6, dtype=d) for d in (torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64)
    },
    "meta": torch.ones(6, device="meta"),
    "sparse": torch.ones(6).to_sparse(),
    **{repr(value): value for value in (1.0, "x", [1.0] * 6, True, randn(6).numpy())},
}
BAD_RESIDUALS = {
    **{f"shape {shape}": torch.ones(shape) for shape in ((), (6,), (4, 6, 5), (4, 6, 5, 4), (1, 6, 5, 5), (4, 6, 25))},
    **{str(d): torch.ones(SHAPE, dtype=d) for d in (torch.float64, torch.float16, torch.int64)},
    "meta": torch.ones(SHAPE, device="meta"),
    **{repr(value): value for value in (1.0, "x", [1.0])},
}
NOT_A_NUMBER = {repr(value): value for value in ("0.1", [0.1], None, 1j, object)}
BAD_NAMES = {repr(value): value for value in ("", "gelu", "ReLU6", "relu6 ", "relu\0", 6, nn.ReLU6, torch.relu)}


def malformed_batch_norm():
    """(what is wrong, arguments)"""
    for training in (True, False):
        good = good_batch_norm(training)
        bad = {
            "input": BAD_INPUTS,
            **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), BAD_CHANNELS),
            "residual": BAD_RESIDUALS,
            "training": {repr(value): value for value in (None, 1.0, "True", [True], 1)},
            "momentum": NOT_A_NUMBER,
            "eps": {"-1": -1.0, "nan": float("nan"), **NOT_A_NUMBER},
            "activation": BAD_NAMES,
            "pre_activation": BAD_NAMES,
        }
        for argument, values in bad.items():
            for what, value in values.items():
                yield f"{argument}={what}, training={training}", good | {argument: value}
    good, statistics = good_batch_norm(), torch.ones(12)
    for what, changes in {
        "one value": dict(input=randn(1, 6, 1, 1), residual=None),
        "eps 0": dict(eps=0.0),
        "no running_mean": dict(running_mean=None),
        "no running_var": dict(running_var=None),
        "no channels": dict(input=randn(4, 0, 5), residual=None),
        "running_mean is running_var": dict(running_mean=statistics[:6], running_var=statistics[:6]),
        "overlapping statistics": dict(running_mean=statistics[:6], running_var=statistics[5:11]),
        "overlapping columns": dict(running_mean=statistics[::2], running_var=statistics[0:12:2]),
        "expanded running_mean": dict(running_mean=torch.zeros(1).expand(6)),
        "expanded running_var": dict(running_var=torch.ones(1).expand(6)),
        "no statistics in evaluation": dict(running_mean=None, running_var=None, training=False),
        "running_mean wants a gradient": dict(running_mean=torch.zeros(6, requires_grad=True)),
        "evaluation, running_var wants a gradient": dict(running_var=torch.ones(6).requires_grad_(), training=False),
    }.items():
        yield what, good | changes


def malformed_group_norm():
    bad = {
        "input": BAD_INPUTS,
        **dict.fromkeys(("weight", "bias"), BAD_CHANNELS),
        "num_groups": {repr(v): v for v in (0, -1, 4, 7, 12, 2**40, 1.0, 1.5, "3", [3], None, 2**70)},
        "eps": NOT_A_NUMBER,
        "activation": BAD_NAMES,
    }
    for argument, values in bad.items():
        for what, value in values.items():
            yield f"{argument}={what}", good_group_norm() | {argument: value}
    yield "one value", good_group_norm() | dict(input=randn(1, 6, 1, 1), num_groups=6)


# Where PyTorch's own operators, composed, take what our operators refuse.
NATIVE_TAKES = {
    "overlapping statistics": "writes both into one place",
    "overlapping columns": "writes both into one place",
    "running_mean is running_var": "writes both into one place",
    "expanded running_mean": "writes every channel into one place",
    "expanded running_var": "writes every channel into one place",
    "no channels": "gives an empty output",
    **{
        f"{argument}=shape {shape}, training={training}": "counts the elements, whatever the dimensions"
        for argument in ("weight", "bias")
        for shape in ((6, 1), (1, 6), (2, 3))
        for training in (True, False)
    },
}
# What PyTorch's own operators notice when the running statistics are written already.
NATIVE_WRITES = ("weight=", "bias=", "running_var=", "running_mean=", "residual=")


def state_of(arguments):
    return {
        name: copy.deepcopy(value)
        for name, value in arguments.items()
        if name.startswith("running") and isinstance(value, torch.Tensor) and value.layout == torch.strided
    }


def refused(function, what, arguments, may_write=()):
    """Whether the call raises, with a message, and leaves the running statistics as they were."""
    before = state_of(arguments)
    try:
        function(**arguments)
    except ERRORS as error:
        assert str(error).strip(), f"{what}: {error!r} says nothing"
    except Exception as error:
        pytest.fail(f"{what}: {error!r} is not clear")
    else:
        return False
    for name, value in before.items() if not what.startswith(may_write) else ():
        assert value.is_meta or torch.equal(arguments[name], value), f"{what}: {name} was written"
    return True


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_malformed_calls_of_the_functions(backend, requires_grad, kind, record_property):
    calls = list(malformed_batch_norm() if kind == "batch_norm" else malformed_group_norm())
    taken = []
    for what, arguments in calls:
        for name in ("weight", "input") if requires_grad else ():
            value = arguments[name]
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided:
                arguments = arguments | {name: value.detach().requires_grad_()}
        function = batch_norm_act if kind == "batch_norm" else group_norm_act
        if not refused(function, what, arguments, NATIVE_WRITES if backend == "torch" else ()):
            taken.append(what)
    record_property("cases", len(calls))
    assert len(calls) >= (200 if kind == "batch_norm" else 60)
    if backend == "torch":
        # One value for each channel may have any shape there.
        shapes = tuple(f"{name}=shape" for name in ("weight", "bias", "running_mean", "running_var"))
        taken = [what for what in taken if what not in NATIVE_TAKES and not what.startswith(shapes)]
    assert not taken


MODULES = (
    (BatchNormAct1d, (6,), (4, 6, 5)),
    (BatchNormAct2d, (6,), (4, 6, 5, 5)),
    (BatchNormAct3d, (6,), (4, 6, 2, 3, 2)),
    (GroupNormAct, (3, 6), (4, 6, 5)),
)


@pytest.mark.parametrize(("module", "arguments", "shape"), MODULES, ids=names)
@pytest.mark.parametrize("training", [True, False])
def test_malformed_calls_of_the_modules(backend, module, arguments, shape, training, record_property):
    layer = module(*arguments).train(training)
    before = [b.clone() for b in layer.buffers() if b.is_floating_point()]
    bad = [
        *(randn(*([6] * dim)) for dim in range(8) if dim != len(shape) and not (module is BatchNormAct1d and dim == 2)),
        *(torch.ones(shape).to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float64)),
        randn(shape[0], 5, *shape[2:]),
        randn(shape[0], 7, *shape[2:]),
        torch.ones(shape).to_sparse(),
    ]
    if module is GroupNormAct:
        # It takes any number of dimensions from 2 on.
        bad = [x for x in bad if x.dim() < 2 or x.shape[1] != 6 or x.dtype != torch.float32 or x.is_sparse]
    for x in bad:
        with pytest.raises(ERRORS):
            layer(x)
    assert all(torch.equal(*pair) for pair in zip(before, [b for b in layer.buffers() if b.dim()], strict=True))
    record_property("cases", len(bad))
    for x in (None, 1.0, "x", [1.0]):
        # As native: its modules ask for x.dim() first.
        with pytest.raises((*ERRORS, AttributeError)):
            layer(x)


@pytest.mark.parametrize("function", [normfused.convert, normfused.revert])
def test_malformed_calls_of_convert_and_revert(function):
    for model in (None, 1, "model", [], torch.ones(3), nn.ReLU, lambda x: x):
        with pytest.raises(ERRORS, match=r".+"):
            function(model)


def test_malformed_calls_of_use_backend():
    for name in ("", "cuda", "Extension", "native", None, 1, ["torch"]):
        with pytest.raises(ERRORS, match="name must be one of"), normfused.use_backend(name):
            pass


# Calls that crashed, or read what is not theirs, elsewhere: (operator, arguments in its order).
ONE, ZERO = torch.ones(8), torch.zeros(8)
X = randn(4, 8, 3, 3)
CRASHES = {
    "pytorch#85217 sizes of nothing": (
        "batch_norm_act",
        (torch.ones(5, 5).double(), torch.ones(14, 9, 12, 0, 6).double(), torch.ones(5).double(), None),
        (torch.ones(0).double(), torch.ones(0).double(), None, True, 0.0, 0.0, None, None),
    ),
    "pytorch#169208 empty running_var": (
        "batch_norm_act",
        (randn(10, 8), ONE, ZERO, None),
        (ZERO, torch.ones(0), None, True, 0.1, 1e-5, None, None),
    ),
    "pytorch#194014, #141203 no statistics in evaluation": (
        "batch_norm_act",
        (torch.full((9, 2, 8, 8), 1.11e15), None, None, None),
        (None, None, None, False, 0.1, 1e-5, None, None),
    ),
    "pytorch#194798 short running statistics": (
        "batch_norm_act",
        (torch.arange(8.0).reshape(2, 4, 1, 1), None, None, None),
        (torch.zeros(1), torch.ones(1), None, True, 0.1, 1e-5, None, None),
    ),
    "pytorch#193097 short running statistics in evaluation": (
        "batch_norm_act",
        (randn(2, 3, 2, 4).transpose(2, 3), torch.ones(3), None, None),
        (torch.zeros(1), torch.ones(1), None, False, 0.1, 1e-5, None, None),
    ),
    "pytorch#193698 running statistics of different dtypes": (
        "batch_norm_act",
        (torch.ones(2, 1).bfloat16(), None, None, None),
        (torch.zeros(1).double(), torch.ones(2)[1:], None, True, 0.1, 1e-5, None, None),
    ),
    "pytorch#186212 one dimension": (
        "batch_norm_act",
        (randn(1), None, None, None),
        (None, None, None, True, 0.5, 1 / 3, None, None),
    ),
    "pytorch#188958 empty dy and invstd": (
        "batch_norm_act_backward",
        (torch.ones(0, 128).double(), torch.ones(2, 2).double(), None, None, None),
        (torch.zeros(2).double(), torch.ones(0, 16, 16, 3).double(), True, None, None, True, True, True, False),
    ),
    "pytorch#189831 empty x, dy and invstd": (
        "batch_norm_act_backward",
        (torch.zeros(0), torch.ones(4, 2, 0, 3), torch.ones(2), None, None),
        (torch.ones(2), torch.zeros(0), True, None, None, True, False, False, False),
    ),
    "pytorch#189828 rstd of no groups": (
        "group_norm_act_backward",
        (torch.ones(1, 3, 3, 0), torch.ones(1, 3, 3, 0), None, None),
        (torch.ones(1, 3), torch.ones(1, 0), 3, None, True, True, True),
    ),
    "pytorch#194806 group_norm of one dimension": (
        "group_norm_act",
        (torch.ones(1), torch.ones(1), None),
        (1, 1e-5, None),
    ),
    "pytorch#73194 no groups": ("group_norm_act", (X, ONE, ZERO), (0, 0.0, None)),
}


@pytest.mark.parametrize("issue", CRASHES)
def test_calls_that_crashed_elsewhere(backend, issue):
    """The operators themselves: the Python names in front of them are tested above."""
    if backend == "torch":
        pytest.skip("PyTorch's operators: those are their crashes")
    name, tensors, rest = CRASHES[issue]
    with pytest.raises((RuntimeError, ValueError), match=r"must|expected"):
        getattr(backends.OPERATORS[backend], name)(*tensors, *rest)


def test_pytorch_195186_misaligned_parameters_are_right_not_refused(backend):
    x, base = randn(3, 32, 5, 5).half().contiguous(memory_format=torch.channels_last), randn(33)
    statistics = [torch.zeros(32), torch.ones(32)]
    y = batch_norm_act(x, *statistics, base[:-1], base[1:], True, activation="silu")
    copies = base[:-1].clone(), base[1:].clone()
    assert torch.equal(y, batch_norm_act(x, torch.zeros(32), torch.ones(32), *copies, True, activation="silu"))


def test_refused_notices(monkeypatch):
    """Guards the guard: a call that is taken, one that writes before it raises, and one that says nothing."""

    def taken(**arguments):
        pass

    def writes(running_mean, **arguments):
        running_mean.add_(1)
        raise ValueError("late")

    def silent(**arguments):
        raise RuntimeError

    def unclear(**arguments):
        raise AttributeError("'list' object has no attribute 'dim'")

    good = good_batch_norm()
    assert not refused(taken, "taken", good)
    for wrong, exception in itertools.product((writes, silent, unclear), ((AssertionError, pytest.fail.Exception),)):
        with pytest.raises(exception):
            refused(wrong, "wrong", good_batch_norm())


def test_more_memory_than_there_is(backend):
    """The message is that of torch's allocators, which programs look for to try again with less."""
    x = torch.zeros(1).expand(2**10, 3, 2**20, 2**20)
    with pytest.raises(RuntimeError, match=r"can't allocate memory|out of memory"):
        group_norm_act(x, 3)
