"""Calls of the CUDA kernels under the emulator, each checked against the float64 formulas."""

from unittest import mock

import torch
from emulated import PATH_NAMES, SCHEDULES
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
SMALL_L2 = device_limits(multiprocessors=2, l2_bytes=8192)
ON_CHIP = ("block", "cluster", "cooperative")
# Few multiprocessors and little shared memory: small tensors need several blocks, and several launches.
SMALL_DEVICES = (
    device_limits(multiprocessors=4, shared=100 << 10, max_cluster=8),
    device_limits(multiprocessors=4, shared=64 << 10, max_cluster=8),
    device_limits(multiprocessors=7, shared=48 << 10, max_cluster=8),
)


# One of each kind.
HELD_SELECTION = (("contiguous", (3, 4, 300)), ("contiguous", (17, 8, 7)), ("channels_last", (2, 32, 33)))


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


def prepare(kernels, turn):
    kernels.set_schedule(*SCHEDULES[turn % len(SCHEDULES)])
    kernels.set_limits(SMALL_L2 if turn % 3 == 0 else device_limits())


def batch_norm_forward(kernels, x, layout, activation=None, **fields):
    c = x.shape[1]
    wide = statistics_type(x.dtype)
    data = in_layout(x, layout)
    y, mean, invstd = blank(data), torch.empty(c, dtype=wide), torch.empty(c, dtype=wide)
    defaults = {"training": True, "momentum": 0.1, "eps": EPS, "y": y, "mean": mean, "invstd": invstd}
    kernels.batch_norm_forward(data, layout, activation, **(defaults | fields))
    return as_ncs(y, layout), mean, invstd


def check_kinks(kernels, dtype, s, layout):
    """z is x here: ReLU6's gradient by what z is as an element of dtype, NaN lets dy pass, -0 stays."""
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
