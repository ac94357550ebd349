"""torch.ops.normfused.*: opcheck, malformed calls, instruction sets, threads, symbols of the libraries."""

import itertools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import normfused
from normfused import native, ops, reference

pytestmark = pytest.mark.skipif(not ops.LOADED, reason=str(ops.WHY_NOT))

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def tensors(shape=(4, 6, 5, 5), dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=memory_format)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=memory_format)
    residual = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight, bias, mean = (torch.randn(shape[1], generator=generator, dtype=wide) for _ in range(3))
    var = torch.rand(shape[1], generator=generator, dtype=wide) + 0.5
    return x, dy, residual, weight, bias, mean, var


def batch_norm_args(x, residual, weight, bias, mean, var, training, activation="relu6"):
    counter = torch.tensor(3)
    return (
        x,
        weight,
        bias,
        residual,
        mean.clone(),
        var.clone(),
        counter if training else None,
        training,
        0.1,
        1e-5,
        activation,
        None,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck_batch_norm_act(dtype, memory_format, training, affine):
    x, dy, residual, weight, bias, mean, var = tensors(dtype=dtype, memory_format=FORMATS[memory_format])
    if not affine:
        weight = bias = residual = None
    args = batch_norm_args(x, residual, weight, bias, mean, var, training)
    torch.library.opcheck(ops.batch_norm_act, args)
    _, mean, invstd = ops.batch_norm_act(*args)
    for mask in ((True, True, True, residual is not None), (False, True, False, False), (False,) * 4):
        torch.library.opcheck(
            ops.batch_norm_act_backward,
            (dy, x, weight, bias, residual, mean, invstd, training, "relu6", None, *mask),
        )


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck_group_norm_act(dtype, memory_format, affine):
    x, dy, _, weight, bias, _, _ = tensors(dtype=dtype, memory_format=FORMATS[memory_format])
    if not affine:
        weight = bias = None
    args = (x, weight, bias, 3, 1e-5, "silu")
    torch.library.opcheck(ops.group_norm_act, args)
    _, mean, rstd = ops.group_norm_act(*args)
    torch.library.opcheck(ops.group_norm_act_backward, (dy, x, weight, bias, mean, rstd, 3, "silu", True, True, False))


# Shapes that take every path of csrc/kernels/cpu/partition.h, in both memory formats.
PATHS = (
    *((40, 33, 7, 7), (3, 40, 20, 21), (2, 3, 300, 301), (9, 31, 13, 11), (64, 20, 33, 32), (5, 3, 1, 1)),
    (1, 145, 24, 25),
    *((600, 70), (70, 2100)),
)
# The largest takes as long as all others in float64, with which every instruction set is compared.
QUICK_PATHS = [pytest.param(path, marks=pytest.mark.thorough if path[0] == 64 else ()) for path in PATHS]


@pytest.fixture
def restore_instruction_set():
    before = torch.ops.normfused.cpu_instruction_set()
    yield
    torch.ops.normfused.use_cpu_instruction_set(before)


def everything(shape, dtype, memory_format, activation):
    """Outputs of all four operators, forward and backward, training and evaluation, on fixed inputs."""
    x, dy, residual, weight, bias, mean, var = tensors(shape, dtype, memory_format)
    results = []
    for training, extra in itertools.product((True, False), (residual, None)):
        args = batch_norm_args(x, extra, weight, bias, mean, var, training, activation)
        y, batch_mean, invstd = ops.batch_norm_act(*args)
        results += [y, batch_mean, invstd, args[4], args[5]]
        results += ops.batch_norm_act_backward(
            dy,
            x,
            weight,
            bias,
            extra,
            batch_mean,
            invstd,
            training,
            activation,
            None,
            True,
            True,
            True,
            extra is not None,
        )
    for groups in {1, shape[1]} if x[0].numel() > shape[1] else {1}:
        y, group_mean, rstd = ops.group_norm_act(x, weight, bias, groups, 1e-5, activation)
        results += [y, group_mean, rstd]
        results += ops.group_norm_act_backward(
            dy, x, weight, bias, group_mean, rstd, groups, activation, True, True, True
        )
    return results


def formats_of(shape):
    return FORMATS.values() if len(shape) == 4 else (torch.contiguous_format,)


@pytest.mark.parametrize("shape", PATHS, ids=str)
def test_one_thread_and_many_are_bitwise_equal(shape):
    threads = torch.get_num_threads()
    try:
        for memory_format in formats_of(shape):
            torch.set_num_threads(1)
            one = everything(shape, torch.float32, memory_format, "relu6")
            for many in (2, 3, 5):
                torch.set_num_threads(many)
                for a, b in zip(one, everything(shape, torch.float32, memory_format, "relu6"), strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def assert_near(results, expected, dtype):
    """Within the rounding of dtype, as a share of the largest value or of 1."""
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for ours, exact in zip(results, expected, strict=True):
        scale = exact.abs().max().clamp_min(1)
        torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", QUICK_PATHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_agrees_with_the_reference(name, shape, dtype, restore_instruction_set):
    try:
        torch.ops.normfused.use_cpu_instruction_set(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    for memory_format in formats_of(shape):
        x, dy, residual, weight, bias, mean, var = tensors(shape, dtype, memory_format)
        wide = [t.double() for t in (x, dy, residual, weight, bias, mean, var)]
        for training in (True, False):
            # SiLU: smooth, so that the rounding of z cannot flip a gradient.
            args = batch_norm_args(x, residual, weight, bias, mean, var, training, "silu")
            y, batch_mean, invstd = ops.batch_norm_act(*args)
            grads = ops.batch_norm_act_backward(
                dy,
                x,
                weight,
                bias,
                residual,
                batch_mean,
                invstd,
                training,
                "silu",
                None,
                True,
                True,
                True,
                True,
            )
            x64, dy64, residual64, weight64, bias64, mean64, var64 = wide
            if training:
                statistics = reference.batch_statistics(x64)
                running = reference.running_statistics(x64, mean64, var64, 0.1)
                assert args[6] == 4
            else:
                statistics = running = (mean64, var64)
            expected = [
                reference.batch_norm_act(x64, weight64, bias64, residual64, *statistics, 1e-5, "silu"),
                *running,
                *reference.batch_norm_act_backward(
                    dy64,
                    x64,
                    weight64,
                    bias64,
                    residual64,
                    statistics[0],
                    (statistics[1] + 1e-5).rsqrt(),
                    training,
                    1e-5,
                    "silu",
                ),
            ]
            assert_near((y, args[4], args[5], *grads), expected, dtype)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", QUICK_PATHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_normalises_groups_as_the_reference(name, shape, dtype, restore_instruction_set):
    try:
        torch.ops.normfused.use_cpu_instruction_set(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    for memory_format in formats_of(shape):
        x, dy, _, weight, bias, _, _ = tensors(shape, dtype, memory_format)
        x64, dy64, weight64, bias64 = (t.double() for t in (x, dy, weight, bias))
        for groups in {1, shape[1]} if x[0].numel() > shape[1] else {1}:
            y, mean, rstd = ops.group_norm_act(x, weight, bias, groups, 1e-5, "silu")
            grads = ops.group_norm_act_backward(dy, x, weight, bias, mean, rstd, groups, "silu", True, True, True)
            expected = (
                reference.group_norm_act(x64, groups, weight64, bias64, 1e-5, "silu"),
                *reference.group_norm_act_backward(dy64, x64, weight64, bias64, groups, 1e-5, "silu"),
            )
            assert_near((y, *grads), expected, dtype)


def test_baseline_and_vector_code_agree_on_denormals_infinities_and_nan(restore_instruction_set):
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6.0, 6.0000005, torch.inf, -torch.inf, torch.nan, 1e30])
    x = special.repeat(7)[:69].view(1, 1, 3, 23)
    for dtype in DTYPES:
        results = []
        for name in INSTRUCTION_SETS:
            try:
                torch.ops.normfused.use_cpu_instruction_set(name)
            except RuntimeError:
                continue
            zero, one = torch.zeros(1), torch.ones(1)
            if dtype == torch.float64:
                zero, one = zero.double(), one.double()
            args = (x.to(dtype), None, None, None, zero, one, None, False, 0.1, 0.0)
            results.append([ops.batch_norm_act(*args, a, None)[0] for a in (None, "relu", "relu6", "hardswish")])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
                assert torch.equal(torch.signbit(a) & ~a.isnan(), torch.signbit(b) & ~b.isnan())
        torch.testing.assert_close(results[0][0], x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives_and_every_rounding_is_torchs(dtype, restore_instruction_set):
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x = values.view(1, 1, 256, 256)
    zero, one = torch.zeros(1), torch.ones(1)
    for name in INSTRUCTION_SETS:
        try:
            torch.ops.normfused.use_cpu_instruction_set(name)
        except RuntimeError:
            continue
        (y, _, _) = ops.batch_norm_act(x, None, None, None, zero, one, None, False, 0.1, 0.0, None, None)
        torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
        # A weight makes products that must be rounded: to nearest, ties to even, as torch does.
        weight = torch.tensor([1.0 + 2.0**-9])
        (y, _, _) = ops.batch_norm_act(x, weight, None, None, zero, one, None, False, 0.1, 0.0, None, None)
        torch.testing.assert_close(y, (x.float() * weight).to(dtype), rtol=0, atol=0, equal_nan=True)


def forward_arguments():
    """A call of batch_norm_act that is right."""
    x, _, _, weight, bias, mean, var = tensors()
    return dict(
        x=x,
        weight=weight,
        bias=bias,
        residual=None,
        running_mean=mean,
        running_var=var,
        num_batches_tracked=None,
        training=True,
        momentum=0.1,
        eps=1e-5,
        activation="relu6",
        pre_activation=None,
    )


def malformed_calls():
    """(what is wrong, operator, arguments): every one must raise."""
    x, dy, _, weight, bias, mean, var = tensors()
    forward = forward_arguments()
    backward = dict(
        dy=dy,
        x=x,
        weight=weight,
        bias=bias,
        residual=None,
        mean=mean,
        invstd=var,
        training=True,
        activation="relu6",
        pre_activation=None,
        need_dx=True,
        need_dweight=True,
        need_dbias=True,
        need_dresidual=False,
    )
    group = dict(x=x, weight=weight, bias=bias, num_groups=3, eps=1e-5, activation=None)
    statistics = torch.ones(4, 3)
    group_backward = dict(
        dy=dy,
        x=x,
        weight=weight,
        bias=bias,
        mean=statistics,
        rstd=statistics,
        num_groups=3,
        activation=None,
        need_dx=True,
        need_dweight=True,
        need_dbias=True,
    )
    bad_inputs = [
        torch.randn(6),
        torch.tensor(1.0),
        x.int(),
        x.bool(),
        x.to(torch.complex64),
        torch.randn(4, 7, 5, 5),
        x.to(torch.float8_e5m2),
        x.double(),
        x.to_sparse(),
        x.to("meta"),
        torch.zeros((1,) * 65),
    ]
    bad_channels = [
        torch.ones(5),
        torch.ones(7),
        torch.ones(0),
        torch.ones(()),
        torch.ones(6, 1),
        torch.ones(2, 3),
        torch.ones(6, dtype=torch.int64),
        torch.ones(6, dtype=torch.float64),
        torch.ones(6, dtype=torch.float16),
        torch.ones(6, device="meta"),
    ]
    bad_like_x = [dy[:3], dy[:, :5], dy[..., :4], dy.double(), dy.flatten(), torch.ones(()), dy.int(), dy.to("meta")]
    for name, base, arguments in (
        ("batch_norm_act", forward, {"x": bad_inputs, "residual": bad_like_x}),
        ("batch_norm_act_backward", backward, {"x": bad_inputs, "dy": bad_like_x, "residual": bad_like_x}),
        ("group_norm_act", group, {"x": bad_inputs}),
        ("group_norm_act_backward", group_backward, {"x": bad_inputs, "dy": bad_like_x}),
    ):
        channels = [a for a in base if a in ("weight", "bias", "running_mean", "running_var", "invstd")]
        if name == "batch_norm_act_backward":
            channels.append("mean")
        arguments |= {a: bad_channels for a in channels}
        arguments["activation"] = ["", "gelu", "ReLU6", "relu6 "]
        for argument, values in arguments.items():
            for value in values:
                yield f"{name} {argument}={describe(value)}", name, base | {argument: value}
    for changes in (
        dict(x=x[:1, :, :1, :1]),
        dict(x=x[:, :0], weight=None, bias=None, running_mean=None, running_var=None),
        dict(eps=0.0),
        dict(eps=-1.0),
        dict(eps=float("nan")),
        dict(running_mean=None),
        dict(running_var=None),
        dict(running_mean=torch.zeros(1).expand(6)),
        dict(running_var=torch.ones(1).expand(6)),
        dict(num_batches_tracked=torch.tensor(1.0)),
        dict(num_batches_tracked=torch.zeros(2, dtype=torch.long)),
        dict(num_batches_tracked=torch.tensor(1, device="meta")),
        dict(pre_activation="relu"),
        dict(training=False, running_mean=None),
        dict(training=False, running_var=None),
        dict(training=False, running_mean=None, running_var=None),
        dict(training=False, eps=-1.0),
        dict(training=False, eps=float("nan")),
    ):
        yield f"batch_norm_act {describe(changes)}", "batch_norm_act", forward | changes
    yield "backward pre_activation", "batch_norm_act_backward", backward | dict(pre_activation="relu")
    for training in (True, False):
        changes = dict(need_dresidual=True, training=training)
        yield f"backward {changes} without residual", "batch_norm_act_backward", backward | changes
    for groups in (0, -1, 4, 7, 2**40):
        yield f"group_norm_act groups {groups}", "group_norm_act", group | dict(num_groups=groups)
        yield f"backward groups {groups}", "group_norm_act_backward", group_backward | dict(num_groups=groups)
    for bad in (torch.ones(4), torch.ones(3, 4), torch.ones(4, 6)[:, ::2], statistics.double(), statistics.to("meta")):
        for argument in ("mean", "rstd"):
            yield f"{argument}={describe(bad)}", "group_norm_act_backward", group_backward | {argument: bad}


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{tuple(value.shape)}{value.device.type}{value.layout}"
    if isinstance(value, dict):
        return ", ".join(f"{k}={describe(v)}" for k, v in value.items())
    return repr(value)


def test_malformed_calls_raise_and_leave_the_running_statistics_alone():
    calls = 0
    for what, name, arguments in malformed_calls():
        if all(t.device.type == "meta" for t in arguments.values() if isinstance(t, torch.Tensor)):
            continue
        before = {k: v.clone() for k, v in arguments.items() if k.startswith("running") and v is not None}
        try:
            getattr(torch.ops.normfused, name)(**arguments)
        except (RuntimeError, NotImplementedError) as error:
            assert str(error), what
        else:
            pytest.fail(f"{what} did not raise")
        for key, value in before.items():
            assert arguments[key].device.type == "meta" or torch.equal(arguments[key], value), what
        calls += 1
    assert calls >= 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(5)), r"weight must have shape \(6\).* got \(5\)"),
        (
            dict(residual=torch.ones(4, 6, 5, 4)),
            r"residual must have the shape of x, \(4, 6, 5, 5\), got \(4, 6, 5, 4\)",
        ),
        (dict(activation="gelu"), "activation must be .*, got 'gelu'"),
        (dict(eps=-2.0), "eps must be positive when training, got -2"),
        (dict(x=torch.ones(1, 6)), r"more than 1 value per channel when training, got x of shape \(1, 6\)"),
        (dict(running_var=torch.ones(6).double()), "running_var must be Float .*, got Double"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.normfused.batch_norm_act(**(forward_arguments() | change))


def test_only_what_is_asked_for_is_computed():
    x, dy, residual, weight, bias, mean, _ = tensors()
    for training, mask in itertools.product((True, False), itertools.product((True, False), repeat=4)):
        grads = ops.batch_norm_act_backward(dy, x, weight, bias, residual, mean, weight, training, "relu6", None, *mask)
        everything = ops.batch_norm_act_backward(
            dy, x, weight, bias, residual, mean, weight, training, "relu6", None, True, True, True, True
        )
        for asked, grad, full in zip(mask, grads, everything, strict=True):
            assert torch.equal(grad, full) if asked else grad.numel() == 0


def library():
    (path,) = Path(normfused.__file__).parent.glob("_cpu*.so")
    return path


def test_the_operator_library_uses_only_the_stable_abi():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", library()], capture_output=True, text=True, check=True)
    undefined = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    unstable = [name for name in undefined if re.search(r"\b(c10|at|torch|caffe2)::|^_?Py", name)]
    assert not unstable


@pytest.mark.thorough
@pytest.mark.parametrize("function", [f"{f}_norm_{d}" for f in ("batch", "group") for d in ("forward", "backward")])
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_vector_code_exports_only_its_entry_point(instruction_set, function, tmp_path):
    """A shared inline function compiled for AVX-512 could be the copy that the linker keeps for every CPU."""
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("nm") is None or platform.machine() != "x86_64":
        pytest.skip("needs c++ and nm on x86-64")
    source = Path(__file__).parent.parent / "csrc/kernels/cpu" / instruction_set / f"{function}.cpp"
    target = tmp_path / "kernels.o"
    # Not optimised: what could be inlined then shows as a symbol too.
    subprocess.run([compiler, "-std=c++20", "-O0", "-fopenmp-simd", "-c", source, "-o", target], check=True)
    listing = subprocess.run(["nm", "-C", "--defined-only", target], capture_output=True, text=True, check=True)
    exported = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    # The reference to the exception handler is a datum, the same for every instruction set.
    exported = [name for _, kind, name in exported if kind in "TDBRVWu" and not name.startswith("DW.ref.")]
    assert [name.partition("(")[0] for name in exported] == [f"normfused::cpu::{instruction_set}::{function}"]


def test_activation_names_are_the_same_everywhere():
    names = set(native.ACTIVATIONS)
    assert names | {None} == set(reference.FORWARD) == set(reference.BACKWARD)
    x = torch.linspace(-8, 8, 401).view(1, 1, 401)
    for name in names:
        (y, _, _) = ops.batch_norm_act(
            x, None, None, None, torch.zeros(1), torch.ones(1), None, False, 0.1, 0.0, name, None
        )
        torch.testing.assert_close(y, native.activate(x, name), rtol=1e-6, atol=1e-7)
