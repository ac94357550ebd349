"""The CUDA kernels, run by the emulator, against the float64 formulas, and the invariants of their launch plans."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from emulated import (
    ACTIVATIONS,
    COMPILER,
    DTYPES,
    FORMATS,
    PATH_NAMES,
    ROOT,
    SCHEDULES,
    SOURCES,
    Kernels,
    build,
    compiler_or_skip,
    rebuild,
)
from emulated import limits as device_limits

from normfused import reference

EPS = 1e-5
# (rtol, atol) of what is rounded to x's dtype.
TOLERANCE = {
    torch.float32: (2e-5, 2e-5),
    torch.float64: (1e-10, 1e-10),
    torch.bfloat16: (1.6e-2, 1.6e-2),
    torch.float16: (2e-3, 2e-3),
}
# The least z that rounds to six.
SIX = {torch.float32: 6, torch.float64: 6, torch.bfloat16: 6 - 2**-6, torch.float16: 6 - 2**-9}
SHAPES = (
    (1, 1, 2),
    (2, 3, 1),
    (3, 5, 7),
    (2, 31, 49),
    (32, 33, 2),
    (32, 2, 49),
    (1, 3, 1023),
    (2, 5, 1024),
    (3, 2, 1025),
    (2, 16, 196),
    (3, 8, 300),
    (4, 64, 9),
    (131, 3, 1),
    (1, 2, 9000),
)
SMALL_L2 = device_limits(multiprocessors=2, l2_bytes=8192)
ON_CHIP = ("block", "cluster", "cooperative")
PATHS = {
    *(
        f"{shape}_{stage}{suffix}"
        for stage in ("stats", "apply", "backward_reduce", "backward_apply")
        for shape, suffix in (("plane", ""), ("column", ""), ("column", "_scalar"))
    ),
    *(
        f"{path}_{shape}_{direction}"
        for path in ON_CHIP
        for shape in ("planes", "columns")
        for direction in ("forward", "backward")
    ),
    *("finish_stats", "finish_backward", "finish_parameters"),
    *("use_running_stats", "count_batch", "clear_barriers"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    compiler_or_skip()
    return build(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def kernels(built):
    return Kernels(built[0])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_layout(t, layout):
    """``(N, C, S)`` as the kernels see it in a memory format."""
    return t.contiguous() if layout == "contiguous" else t.transpose(1, 2).contiguous()


def as_ncs(t, layout):
    return t if layout == "contiguous" else t.transpose(1, 2)


def misalign(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def check(name, actual, expected, dtype, scale=1.0):
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol * scale, msg=lambda m: f"{name}: {m}")


def blank(t):
    return None if t is None else torch.full_like(t, float("nan"))


class Case:
    """Random arguments of one call, and dy that is 0 where z is so near a kink that rounding decides."""

    def __init__(
        self, shape, dtype, layout, activation, seed, groups=0, residual=False, affine=(True, True), aligned=True,
        narrow=False, pre_activation=None, path="automatic",
    ):  # fmt: skip
        n, c, s = shape
        self.shape, self.dtype, self.layout, self.activation, self.groups = shape, dtype, layout, activation, groups
        wide = statistics_type(dtype)
        place = (lambda t: in_layout(t, layout)) if aligned else (lambda t: misalign(in_layout(t, layout)))
        self.x64 = (3 * randn(n, c, s, seed=seed) + 2).to(dtype).double()
        self.input64 = reference.FORWARD[pre_activation](self.x64).to(dtype).double()
        self.pre_activation, self.narrow, self.path = pre_activation, narrow, PATH_NAMES.index(path)
        parameter = dtype if narrow else wide
        self.weight = (randn(c, seed=seed + 1) + 2).to(parameter) if affine[0] else None
        self.bias = (randn(c, seed=seed + 2) + 1).to(parameter) if affine[1] else None
        self.residual64 = randn(n, c, s, seed=seed + 3).to(dtype).double() if residual else None
        self.x = place(self.x64.to(dtype))
        self.residual = place(self.residual64.to(dtype)) if residual else None
        self.seed, self.place, self.wide = seed, place, wide

    def parameters64(self):
        return tuple(t if t is None else t.double() for t in (self.weight, self.bias))

    def set_dy(self, z):
        dy = randn(*self.shape, seed=self.seed + 4)
        near = (z.abs() < 1e-3) | ((z > SIX[self.dtype] - 1e-3) & (z < 6 + 1e-3)) | ((z.abs() - 3).abs() < 2e-2)
        self.dy64 = torch.where(near, 0, dy).to(self.dtype).double()
        self.dy = self.place(self.dy64.to(self.dtype))

    def rounding(self):
        """Makes the float64 formulas decide by z as an element of the case's dtype."""
        return mock.patch.object(reference, "_rounded", lambda z, _: z.to(self.dtype).double())

    def check(self, name, actual, expected):
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        if actual.dim() == 3:
            actual = as_ncs(actual, self.layout)
        # A z that single precision rounds the other way is one element's error of a 16-bit sum.
        selects = self.activation in (None, "relu", "relu6")
        wide = name not in ("y", "dx", "dresidual", *(() if selects else ("dweight", "dbias")))
        wide = wide and not (self.narrow and name.startswith("running"))
        check(name, actual, expected, self.wide if wide else self.dtype, scale)


def run_batch_norm(kernels, case, training=True, momentum=0.3, needs=(True, True, True, True)):
    c = case.shape[1]
    running_dtype = case.dtype if case.narrow else case.wide
    running = [randn(c, seed=5).to(running_dtype), (randn(c, seed=6).abs() + 0.5).to(running_dtype)]
    before = [t.double().clone() for t in running]
    counter = torch.tensor([4])
    y, mean, invstd = blank(case.x), torch.empty(c, dtype=case.wide), torch.empty(c, dtype=case.wide)
    kernels.batch_norm_forward(
        case.x, case.layout, case.activation, training=training, momentum=momentum or 0.0, cumulative=momentum is None,
        eps=EPS, residual=case.residual, weight=case.weight, bias=case.bias, running_mean=running[0],
        running_var=running[1], num_batches_tracked=counter if training else None, y=y, mean=mean, invstd=invstd,
        pre_activation=case.pre_activation, narrow_parameters=case.narrow, narrow_running=case.narrow, path=case.path,
    )  # fmt: skip
    weight, bias = case.parameters64()
    factor = 1 / 5 if momentum is None else momentum
    if training:
        mean64, var64 = reference.batch_statistics(case.input64)
        after = reference.running_statistics(case.input64, *before, factor)
        assert counter.item() == 5
    else:
        (mean64, var64), after = before, before
    case.check("mean", mean, mean64)
    case.check("invstd", invstd, (var64 + EPS).rsqrt())
    case.check("running_mean", running[0], after[0])
    case.check("running_var", running[1], after[1])
    args = (case.input64, weight, bias, case.residual64, mean64, var64, EPS)
    case.check("y", y, reference.batch_norm_act(*args, case.activation))

    case.set_dy(reference.batch_norm_act(*args, None))
    need_dx, need_dweight, need_dbias, need_dresidual = needs
    dx = blank(case.x) if need_dx else None
    dweight = torch.empty(c, dtype=case.wide) if need_dweight else None
    dbias = torch.empty(c, dtype=case.wide) if need_dbias else None
    dresidual = blank(case.x) if need_dresidual and case.residual is not None else None
    kernels.batch_norm_backward(
        case.x, case.layout, case.activation, training=training, dy=case.dy, residual=case.residual, weight=case.weight,
        bias=case.bias, mean=mean, invstd=invstd, dx=dx, dweight=dweight, dbias=dbias, dresidual=dresidual,
        pre_activation=case.pre_activation, narrow_parameters=case.narrow, path=case.path,
    )  # fmt: skip
    invstd64 = (var64 + EPS).rsqrt()
    args = (case.dy64, case.input64, weight, bias, case.residual64, mean64, invstd64, training, EPS, case.activation)
    with case.rounding():
        dx64, *others = reference.batch_norm_act_backward(*args)
    expected = (reference.BACKWARD[case.pre_activation](case.x64, dx64), *others)
    names = ("dx", "dweight", "dbias", "dresidual")
    for name, actual, value in zip(names, (dx, dweight, dbias, dresidual), expected, strict=True):
        if actual is not None:
            case.check(name, actual, value)
    return y, dx, dweight, dbias


def run_group_norm(kernels, case, needs=(True, True, True)):
    n, c, _ = case.shape
    y = blank(case.x)
    mean, rstd = (torch.full((n, case.groups), float("nan"), dtype=case.wide) for _ in range(2))
    kernels.group_norm_forward(
        case.x, case.layout, case.activation, case.groups, eps=EPS, weight=case.weight, bias=case.bias, y=y, mean=mean,
        rstd=rstd, narrow_parameters=case.narrow, path=case.path,
    )  # fmt: skip
    weight, bias = case.parameters64()
    mean64, var64 = reference.group_statistics(case.x64, case.groups)
    case.check("mean", mean, mean64)
    case.check("invstd", rstd, (var64 + EPS).rsqrt())
    args = (case.x64, case.groups, weight, bias, EPS)
    case.check("y", y, reference.group_norm_act(*args, case.activation))

    case.set_dy(reference.group_norm_act(*args, None))
    dx = blank(case.x) if needs[0] else None
    dweight, dbias = (torch.empty(c, dtype=case.wide) if need else None for need in needs[1:])
    kernels.group_norm_backward(
        case.x, case.layout, case.activation, case.groups, dy=case.dy, weight=case.weight, bias=case.bias, mean=mean,
        rstd=rstd, dx=dx, dweight=dweight, dbias=dbias, narrow_parameters=case.narrow, path=case.path,
    )  # fmt: skip
    args = (case.dy64, case.x64, weight, bias, case.groups, EPS, case.activation)
    with case.rounding():
        expected = reference.group_norm_act_backward(*args)
    for name, actual, value in zip(("dx", "dweight", "dbias"), (dx, dweight, dbias), expected, strict=True):
        if actual is not None:
            case.check(name, actual, value)
    return y, dx, dweight, dbias


def cases():
    """Every shape x dtype x format, the other choices taken in turn."""
    turns = itertools.count()
    for shape, dtype, layout in itertools.product(SHAPES, DTYPES, FORMATS):
        turn = next(turns)
        yield pytest.param(
            shape, dtype, layout, turn, id=f"{shape}-{dtype}-{layout}".replace("torch.", "").replace(" ", "")
        )


def prepare(kernels, turn):
    kernels.set_schedule(*SCHEDULES[turn % len(SCHEDULES)])
    kernels.set_limits(SMALL_L2 if turn % 3 == 0 else device_limits())


@pytest.mark.parametrize(("shape", "dtype", "layout", "turn"), list(cases()))
def test_batch_norm(kernels, shape, dtype, layout, turn):
    prepare(kernels, turn)
    case = Case(
        shape, dtype, layout, ACTIVATIONS[turn % 7], turn, residual=turn % 2 == 1,
        affine=(turn % 5 != 0, turn % 4 != 0), aligned=turn % 6 != 5,
    )  # fmt: skip
    needs = ((True,) * 4, (False, True, False, True), (True, False, True, False), (False, False, False, True))
    run_batch_norm(kernels, case, training=turn % 5 < 3, momentum=None if turn % 2 else 0.3, needs=needs[turn % 11 % 4])


@pytest.mark.parametrize(("shape", "dtype", "layout", "turn"), list(cases()))
def test_group_norm(kernels, shape, dtype, layout, turn):
    n, c, s = shape
    if n * c * s < 4:
        pytest.skip("one value per group")
    prepare(kernels, turn + 1)
    divisors = [g for g in range(1, c + 1) if c % g == 0 and c // g * s > 1]
    case = Case(
        shape, dtype, layout, ACTIVATIONS[turn % 7], turn, groups=divisors[turn % len(divisors)],
        affine=(turn % 5 != 0, turn % 4 != 0), aligned=turn % 6 != 5,
    )  # fmt: skip
    needs = ((True,) * 3, (True, False, True), (False, True, False))
    run_group_norm(kernels, case, needs=needs[turn % 7 % 3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(kernels, dtype, layout, activation):
    prepare(kernels, 1)
    for shape in ((2, 8, 36), (2, 3, 264)):
        run_batch_norm(kernels, Case(shape, dtype, layout, activation, 40, residual=True))
        run_group_norm(kernels, Case(shape, dtype, layout, activation, 50, groups=1))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_running_statistics_in_the_dtype_of_x(kernels, dtype, layout):
    prepare(kernels, 1)
    for training, s in ((True, 36), (True, 300), (False, 36)):
        run_batch_norm(kernels, Case((3, 8, s), dtype, layout, "relu", s, narrow=True), training=training)
    run_group_norm(kernels, Case((3, 8, 36), dtype, layout, "relu", 30, groups=2, narrow=True))


@pytest.mark.parametrize("pre_activation", [a for a in ACTIVATIONS if a])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pre_activation(kernels, dtype, layout, pre_activation):
    prepare(kernels, 1)
    for training, shape in ((True, (2, 3, 36)), (True, (3, 8, 264)), (False, (2, 8, 36))):
        case = Case(shape, dtype, layout, "relu6", 33, residual=True, pre_activation=pre_activation)
        run_batch_norm(kernels, case, training=training)


def test_pre_activation_kinks(kernels):
    """The gradient is selected by x: none, not even of a NaN, where relu6 is flat."""
    prepare(kernels, 1)
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0]).view(1, 5, 1).expand(2, 5, 8).contiguous()
    ones, zeros, dx = torch.ones(5), torch.zeros(5), blank(x)
    kernels.batch_norm_backward(
        x,
        "contiguous",
        None,
        "relu6",
        training=False,
        dy=torch.full_like(x, float("nan")),
        mean=zeros,
        invstd=ones,
        dx=dx,
    )
    assert dx[:, 2].isnan().all()
    assert (dx[:, [0, 1, 3, 4]] == 0).all()


def test_count_batch(kernels):
    counter = torch.tensor([41])
    kernels.count_batch(counter)
    assert counter.item() == 42


# Shapes that planes (contiguous) and columns can hold; the last one's planes are short.
HELD_SHAPES = ((5, 3, 300), (2, 8, 521), (33, 8, 49), (3, 40, 64), (19, 16, 1), (70, 16, 14))
# Few multiprocessors and little shared memory: small tensors need several blocks, and several launches.
SMALL_DEVICES = (
    device_limits(multiprocessors=4, shared=100 << 10, max_cluster=8),
    device_limits(multiprocessors=4, shared=64 << 10, max_cluster=8),
    device_limits(multiprocessors=7, shared=48 << 10, max_cluster=8),
)


# One of each kind.
HELD_SELECTION = (("contiguous", (3, 4, 300)), ("contiguous", (17, 8, 7)), ("channels_last", (2, 32, 33)))


def held_cases():
    turns = itertools.count()
    for path, shape, layout in itertools.product(ON_CHIP, HELD_SHAPES, FORMATS):
        turn = next(turns)
        yield pytest.param(path, shape, layout, turn, id=f"{path}-{shape}-{layout}".replace(" ", ""))


@pytest.mark.parametrize(("path", "shape", "layout", "first_turn"), list(held_cases()))
def test_held_on_chip(kernels, path, shape, layout, first_turn):
    """Whether the plan finds room or not, the result is the same; that it does, other tests see to."""
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16), 3 * first_turn):
        kernels.set_schedule(*SCHEDULES[turn % len(SCHEDULES)])
        kernels.set_limits(SMALL_DEVICES[turn % len(SMALL_DEVICES)])
        choices = {
            "affine": (turn % 5 != 0, turn % 4 != 0), "aligned": turn % 6 != 5, "path": path, "narrow": turn % 7 == 0
        }  # fmt: skip
        activation = ACTIVATIONS[turn % 7]
        case = Case(
            shape, dtype, layout, activation, turn, residual=turn % 2 == 1,
            pre_activation="leaky_relu" if turn % 8 == 3 else None, **choices,
        )  # fmt: skip
        needs = ((True,) * 4, (True, False, True, False), (False, True, False, True))
        momentum = None if turn % 3 == 1 else 0.3
        run_batch_norm(kernels, case, training=turn % 5 > 0, momentum=momentum, needs=needs[turn % 4 % 3])
        divisors = [g for g in range(1, shape[1] + 1) if shape[1] % g == 0 and shape[1] // g * shape[2] > 3]
        case = Case(shape, dtype, layout, activation, turn, groups=divisors[turn % len(divisors)], **choices)
        run_group_norm(kernels, case, needs=((True,) * 3, (True, False, True))[turn % 2])


def test_every_path_of_the_plan_was_launched(kernels):
    """The tests above; alone, a selection of them."""
    prepare(kernels, 1)
    kernels.clear_launches()
    for aligned, layout, shape in itertools.product((True, False), FORMATS, ((2, 8, 36), (2, 3, 264))):
        case = Case(shape, torch.float16, layout, "relu6", 60, aligned=aligned, path="two_kernels")
        run_batch_norm(kernels, case)
    run_batch_norm(kernels, Case((2, 8, 36), torch.float32, "contiguous", "relu", 61), training=False)
    for path, (layout, shape) in itertools.product(
        ON_CHIP, (("contiguous", (4, 8, 300)), ("channels_last", (2, 32, 65)))
    ):
        kernels.set_limits(SMALL_DEVICES[0])
        case = Case(shape, torch.float16, layout, "relu6", 62, groups=2, path=path)
        run_batch_norm(kernels, case, momentum=None)
        run_group_norm(kernels, case)
    assert set(kernels.launches()) == PATHS


def test_a_path_can_be_forced(kernels):
    kernels.set_limits(device_limits())
    kernels.clear_launches()
    batch_norm_forward(kernels, randn(2, 3, 265).float(), "contiguous", path=PATH_NAMES.index("two_kernels"))
    assert set(kernels.launches()) == {"plane_stats", "finish_stats", "plane_apply"}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(3, 4, 49), (5, 2, 300), (3, 200, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_under_every_schedule(kernels, dtype, shape, layout):
    results = []
    for schedule in SCHEDULES:
        kernels.set_schedule(*schedule)
        results.append(run_batch_norm(kernels, Case(shape, dtype, layout, "relu6", 70)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def batch_norm_forward(kernels, x, layout, activation=None, **fields):
    c = x.shape[1]
    wide = statistics_type(x.dtype)
    data = in_layout(x, layout)
    y, mean, invstd = blank(data), torch.empty(c, dtype=wide), torch.empty(c, dtype=wide)
    defaults = {"training": True, "momentum": 0.1, "eps": EPS, "y": y, "mean": mean, "invstd": invstd}
    kernels.batch_norm_forward(data, layout, activation, **(defaults | fields))
    return as_ncs(y, layout), mean, invstd


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("s", [49, 300])
@pytest.mark.parametrize("device", [device_limits(), SMALL_L2])
@pytest.mark.parametrize(("mean", "sigma"), [(1e6, 1.0), (100, 0.01), (0, 1e30), (1e30, 1e29), (-3e4, 3e-1)])
def test_variance_does_not_cancel_or_overflow(kernels, mean, sigma, s, layout, device):
    prepare(kernels, 1)
    kernels.set_limits(device)
    x = (mean + sigma * randn(7, 3, s)).float()
    _, actual_mean, invstd = batch_norm_forward(kernels, x, layout)
    mean64, var64 = reference.batch_statistics(x.double())
    torch.testing.assert_close(actual_mean, mean64.float(), rtol=1e-6, atol=1e-6 * sigma)
    torch.testing.assert_close(invstd, (var64 + EPS).rsqrt().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("s", [49, 300])
def test_nan_and_infinity_stay_in_their_channel(kernels, s, layout):
    prepare(kernels, 0)
    x = randn(3, 4, s).float()
    x[0, 0, 5] = float("nan")
    x[2, 1, s - 1] = float("inf")
    x[:, 2] = 7
    y, _, _ = batch_norm_forward(kernels, x, layout, "relu6")
    assert y[:, :2].isnan().all()
    assert (y[:, 2] == 0).all()
    assert y[:, 3].isfinite().all()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("s", [8, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinks(kernels, dtype, s, layout):
    """z is x here: ReLU6's gradient by what z is as an element of dtype, NaN lets dy pass, -0 stays."""
    prepare(kernels, 1)
    nan, inf = float("nan"), float("inf")
    tiny, half = torch.finfo(dtype).tiny, {torch.bfloat16: 2**-6, torch.float16: 2**-9}.get(dtype, 0)
    bias = torch.tensor(
        [0.0, -0.0, 6.0, 6 - half, 6 - 1.5 * half - 1e-3, nan, 7.0, -1.0, tiny, inf], dtype=statistics_type(dtype)
    )
    kept = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    c = bias.numel()
    ones, zeros = torch.ones_like(bias), torch.zeros_like(bias)
    x = torch.zeros(2, c, s, dtype=dtype)
    data, dy = in_layout(x, layout), in_layout(torch.full_like(x, 3), layout)
    dx, dresidual = blank(data), blank(data)
    kernels.batch_norm_backward(
        data, layout, "relu6", training=False, dy=dy, residual=in_layout(-x, layout), bias=bias, mean=zeros,
        invstd=ones, dx=dx, dresidual=dresidual,
    )  # fmt: skip
    for gradient in (dx, dresidual):
        assert torch.equal(as_ncs(gradient, layout), torch.where(kept[:, None], 3.0, 0.0).to(dtype).expand(2, c, s))
    y, _, _ = batch_norm_forward(
        kernels, x, layout, "relu6", training=False, bias=bias, running_mean=zeros, running_var=ones - EPS, eps=EPS
    )
    expected = reference.FORWARD["relu6"](bias).to(dtype)
    torch.testing.assert_close(y, expected[:, None].expand(2, c, s), rtol=0, atol=0, equal_nan=True)
    # An infinite dy over the dead region.
    dy.fill_(inf)
    kernels.batch_norm_backward(data, layout, "relu6", training=False, dy=dy, bias=bias, mean=zeros, invstd=ones, dx=dx)
    assert torch.equal(as_ncs(dx, layout), torch.where(kept[:, None], inf, 0.0).to(dtype).expand(2, c, s))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0)])
def test_empty(kernels, shape, layout):
    case = Case(shape, torch.float32, layout, "relu", 80)
    n, c, _ = shape
    running = [torch.full((c,), 0.5), torch.full((c,), 2.0)]
    counter = torch.tensor([4])
    _, mean, invstd = batch_norm_forward(
        kernels, case.x64.float(), layout, running_mean=running[0], running_var=running[1], num_batches_tracked=counter
    )
    assert counter.item() == 5
    assert (running[0] == 0.5).all()
    assert (running[1] == 2).all()
    case.set_dy(case.x64)
    dweight, dbias = torch.ones(c), torch.ones(c)
    kernels.batch_norm_backward(
        case.x, layout, None, training=True, dy=case.dy, mean=mean, invstd=invstd, dx=blank(case.x), dweight=dweight,
        dbias=dbias,
    )  # fmt: skip
    assert not dweight.any()
    assert not dbias.any()
    case.groups = 3
    mean, rstd = torch.ones(n, 3), torch.ones(n, 3)
    kernels.group_norm_forward(case.x, layout, None, 3, eps=EPS, y=blank(case.x), mean=mean, rstd=rstd)
    assert not mean.any()
    assert not rstd.any()
    dweight, dbias = torch.ones(c), torch.ones(c)
    kernels.group_norm_backward(
        case.x, layout, None, 3, dy=case.dy, mean=mean, rstd=rstd, dx=blank(case.x), dweight=dweight, dbias=dbias
    )
    assert not dweight.any()
    assert not dbias.any()


# --- Sanitizers, mutations, nvcc -------------------------------------------------------------------------------------

# (file, what is there, what is put there)
MUTATIONS = {
    "missing barrier before a tile's columns are combined": (
        "stats.cu",
        "  __syncthreads();\n  auto* partials",
        "  auto* partials",
    ),
    "missing barrier in block_sum": ("block_reduce.cuh", "  __syncthreads();\n  // Every warp", "  // Every warp"),
    "one slot too many": ("elements.cuh", "view.rows * pass.slots_per_row)", "view.rows * pass.slots_per_row + 1)"),
    "one row too few": ("elements.cuh", "row < c.end; row += step", "row + 1 < c.end; row += step"),
    "elements before a plane": ("elements.cuh", "max(-inside, int64_t(0))", "int64_t(0)"),
    "mask of an unrounded z": ("elements.cuh", "kSix = 6 - 0x1p-6f", "kSix = 6"),
    "count of another row group": ("elements.cuh", "/ pass.row_groups : 0", "/ pass.row_groups + 1 : 0"),
    "another element's residual in the backward": (
        "elements.cuh",
        "  if (s.residual) z += to_accumulator(residual.values[v]);\n  return activate_backward",
        "  if (s.residual) z += to_accumulator(residual.values[0]);\n  return activate_backward",
    ),
    "a wait that leaves copies in flight": (
        "on_chip_forward.cu",
        "async_wait<0>();\n  // A",
        "async_wait<1>();\n  // A",
    ),
    "missing barrier before other warps sum the rows": (
        "on_chip_backward.cu",
        "  async_wait<0>();\n  __syncthreads();",
        "  async_wait<0>();",
    ),
    "a barrier of the block instead of the cluster's": (
        "on_chip.cuh",
        "Exchange::cluster) {\n      cluster_sync();",
        "Exchange::cluster) {\n      __syncthreads();",
    ),
    "a block that exits while others read from it": (
        "on_chip.cuh",
        "if (units.exchange == Exchange::cluster) cluster_sync();",
        "",
    ),
    "a barrier of the block instead of the grid's": ("on_chip.cuh", "grid_sync(units.barrier);", "__syncthreads();"),
    "barriers that are not cleared": ("on_chip_forward.cu", "barriers[i] = 0;", "barriers[i] = 1;"),
    "the first block's values for all of them": ("on_chip.cuh", "all[rank * stride + i]", "all[i]"),
    "the channel of another row": ("on_chip.cuh", "s.pass.view.rows + row :", "s.pass.view.rows :"),
}


def selection(kernels):
    """A call of every kernel, small."""
    for turn, (aligned, layout, shape) in enumerate(
        itertools.product((True, False), FORMATS, ((2, 8, 36), (19, 3, 5), (2, 3, 265)))
    ):
        prepare(kernels, turn)
        dtype = DTYPES[turn % 4]
        run_batch_norm(kernels, Case(shape, dtype, layout, "relu6", turn, residual=True, aligned=aligned))
        run_group_norm(kernels, Case(shape, dtype, layout, "silu", turn, groups=1, aligned=aligned))
    kernels.set_limits(SMALL_L2)
    run_batch_norm(kernels, Case((2, 3, 265), torch.bfloat16, "contiguous", "relu6", 90, residual=True))
    for layout, s in itertools.product(FORMATS, (8, 264)):
        test_kinks(kernels, torch.bfloat16, s, layout)
    for turn, (path, (layout, shape)) in enumerate(itertools.product(ON_CHIP, HELD_SELECTION)):
        kernels.set_schedule(*SCHEDULES[turn % len(SCHEDULES)])
        kernels.set_limits(SMALL_DEVICES[0])
        case = Case(shape, torch.float16, layout, "relu6", turn, groups=2, residual=turn % 2 == 0, path=path)
        run_batch_norm(kernels, case)
        run_group_norm(kernels, case)


def patched(folder, file, old, new):
    """A copy of the sources with one change."""
    for part in ("csrc/kernels", "tests/emulator"):
        shutil.copytree(ROOT / part, folder / part)
    path = folder / "csrc/kernels/cuda" / file
    source = path.read_text()
    assert source.count(old) == 1, f"{file} has {source.count(old)} times {old!r}"
    path.write_text(source.replace(old, new))
    return folder


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(built, mutation, tmp_path):
    file, old, new = MUTATIONS[mutation]
    (tmp_path / "built").mkdir()
    library = rebuild(tmp_path / "built", patched(tmp_path / "source", file, old, new), built, file)
    result = run_selection(library)
    assert result.returncode != 0


def run_selection(library, **environment):
    """selection() in a process of its own; it may crash."""
    code = f"from test_cuda_kernels import Kernels, selection; selection(Kernels({str(library)!r}))"
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_the_selection_passes(built):
    result = run_selection(built[0])
    assert result.returncode == 0, result.stdout + result.stderr


def test_address_and_undefined_behaviour_sanitizers(built, tmp_path):
    flags = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    runtime = subprocess.run([*COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"{COMPILER[0]} has no AddressSanitizer")
    library, _ = build(tmp_path, flags=flags, emulator=built[1])
    result = run_selection(library, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_a_warning_or_a_spill(architecture, tmp_path):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = ["-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra"]
    registers = []
    begin = time.monotonic()
    for source in SOURCES:
        result = subprocess.run(
            [nvcc, *flags, "-Werror=all-warnings", "-c", source, "-o", tmp_path / "out.o"],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
        assert all(spill == ("0", "0") for spill in spills), result.stderr
        registers += map(int, re.findall(r"Used (\d+) registers", result.stderr))
    print(
        f"{architecture}: {len(registers)} kernels, at most {max(registers)} registers,",
        f"compiled in {time.monotonic() - begin:.0f} s",
    )
    assert 0 < len(registers) <= 250
    assert max(registers) <= 128
