"""The CUDA kernels, run by the emulator, against the float64 formulas."""

import itertools

import pytest
import torch
from emulated import ACTIVATIONS, DTYPES, FORMATS, PATH_NAMES, SCHEDULES, Kernels, built
from emulated import limits as device_limits
from kernel_cases import (
    EPS,
    ON_CHIP,
    SMALL_DEVICES,
    Case,
    batch_norm_forward,
    blank,
    check_kinks,
    prepare,
    randn,
    run_batch_norm,
    run_group_norm,
)

from normfused import reference

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


# Most of what the plan chooses by itself is small enough to be held by a block.
PLAN = ("two_kernels", "two_kernels", "automatic")


@pytest.fixture(scope="module")
def kernels():
    return Kernels(built()[0])


def cases():
    """Every shape x dtype x format, the other choices taken in turn."""
    turns = itertools.count()
    for shape, dtype, layout in itertools.product(SHAPES, DTYPES, FORMATS):
        turn = next(turns)
        yield pytest.param(
            shape, dtype, layout, turn, id=f"{shape}-{dtype}-{layout}".replace("torch.", "").replace(" ", "")
        )


@pytest.mark.parametrize(("shape", "dtype", "layout", "turn"), list(cases()))
def test_batch_norm(kernels, shape, dtype, layout, turn):
    prepare(kernels, turn)
    case = Case(
        shape, dtype, layout, ACTIVATIONS[turn % 7], turn, residual=turn % 2 == 1,
        affine=(turn % 5 != 0, turn % 4 != 0), aligned=turn % 6 != 5, path=PLAN[turn % 9 // 3],
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
        affine=(turn % 5 != 0, turn % 4 != 0), aligned=turn % 6 != 5, path=PLAN[turn % 9 // 3],
    )  # fmt: skip
    needs = ((True,) * 3, (True, False, True), (False, True, False))
    run_group_norm(kernels, case, needs=needs[turn % 7 % 3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(kernels, dtype, layout, activation):
    prepare(kernels, 1)
    for shape, path in itertools.product(((2, 8, 36), (2, 3, 264)), ("two_kernels", "block")):
        run_batch_norm(kernels, Case(shape, dtype, layout, activation, 40, residual=True, path=path))
        run_group_norm(kernels, Case(shape, dtype, layout, activation, 50, groups=1, path=path))


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
@pytest.mark.parametrize("shape", [(3, 8, 49), (5, 2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_under_every_schedule(kernels, dtype, shape, layout):
    for path in ("two_kernels", *ON_CHIP):
        results = []
        for schedule in SCHEDULES:
            kernels.set_limits(SMALL_DEVICES[0])
            kernels.set_schedule(*schedule)
            results.append(run_batch_norm(kernels, Case(shape, dtype, layout, "relu6", 70, path=path)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("s", [49, 300])
@pytest.mark.parametrize("path", ["two_kernels", *ON_CHIP])
@pytest.mark.parametrize(("mean", "sigma"), [(1e6, 1.0), (100, 0.01), (0, 1e30), (1e30, 1e29), (-3e4, 3e-1)])
def test_variance_does_not_cancel_or_overflow(kernels, mean, sigma, s, layout, path):
    prepare(kernels, 1)
    kernels.set_limits(SMALL_DEVICES[0])
    x = (mean + sigma * randn(7, 8, s)).float()
    _, actual_mean, invstd = batch_norm_forward(kernels, x, layout, path=PATH_NAMES.index(path))
    mean64, var64 = reference.batch_statistics(x.double())
    torch.testing.assert_close(actual_mean, mean64.float(), rtol=1e-6, atol=1e-6 * sigma)
    torch.testing.assert_close(invstd, (var64 + EPS).rsqrt().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", ["two_kernels", *ON_CHIP])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("s", [50, 300])
def test_nan_and_infinity_stay_in_their_channel(kernels, s, layout, path):
    prepare(kernels, 0)
    kernels.set_limits(SMALL_DEVICES[0])
    x = randn(3, 4, s).float()
    x[0, 0, 5] = float("nan")
    x[2, 1, s - 1] = float("inf")
    x[:, 2] = 7
    y, _, _ = batch_norm_forward(kernels, x, layout, "relu6", path=PATH_NAMES.index(path))
    assert y[:, :2].isnan().all()
    assert (y[:, 2] == 0).all()
    assert y[:, 3].isfinite().all()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("s", [8, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinks(kernels, dtype, s, layout):
    prepare(kernels, 1)
    check_kinks(kernels, dtype, s, layout)


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
