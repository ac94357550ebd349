"""The Triton backend: odd sizes and their lane masks, plans, selection, compilation for GPUs that are not there."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import WHY_NOT
from helpers import everything, names, randn

import normfused
from normfused import backends, native, ops, reference
from normfused.functional import batch_norm_act, group_norm_act

pytestmark = pytest.mark.skipif(WHY_NOT["triton"] is not None, reason=str(WHY_NOT["triton"]))
if WHY_NOT["triton"] is None:
    from normfused import triton as triton_ops
    from normfused.triton import drivers, stages
    from normfused.triton import plan as plans
    from normfused.triton.plan import Extent, plan

ROOT = Path(__file__).parent.parent
OPERATORS = ("batch_norm_act", "batch_norm_act_backward", "group_norm_act", "group_norm_act_backward")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
EPS = 1e-5


# Odd sizes


def operands(shape, channels_last=False, dtype=torch.float32):
    """x, dy, residual, weight, bias, mean, var; far from 0, so that a lane too many shows."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    format = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
    x, dy, residual = (
        (randn(*shape, seed=seed) + offset).to(dtype).contiguous(memory_format=format)
        for seed, offset in ((0, 3), (1, 0.5), (2, 0))
    )
    weight, bias, mean, var = (randn(shape[1], seed=seed).to(wide) for seed in (3, 4, 5, 6))
    return x, dy, residual, weight, bias, mean, var.abs() + 0.5


def assert_near(ours, exact, what, tolerance=3e-5):
    for index, (a, e) in enumerate(zip(ours, exact, strict=True)):
        error = (a.double() - e).abs().max() / e.abs().max().clamp_min(1)
        assert error <= tolerance, f"{what}: {error} in tensor {index}"


def check_batch_norm(shape, channels_last=False, activation="silu", pre_activation=None):
    tensors = operands(shape, channels_last)
    wide = [t.double() for t in tensors]
    for training in (True, False):
        x, dy, residual, weight, bias, mean, var = tensors
        running = mean.clone(), var.clone()
        options = training, 0.1, EPS, activation, pre_activation
        y, saved, invstd = triton_ops.batch_norm_act(x, weight, bias, residual, *running, None, *options)
        grads = triton_ops.batch_norm_act_backward(
            dy, x, weight, bias, residual, saved, invstd, training, activation, pre_activation, True, True, True, True
        )
        x, dy, residual, weight, bias, mean, var = wide
        input, x = x, reference.FORWARD[pre_activation](x)
        statistics, moved = (mean, var), (mean, var)
        if training:
            statistics, moved = (
                reference.batch_statistics(x),
                reference.running_statistics(x, mean, var, 0.1),
            )
        exact = (
            reference.batch_norm_act(x, weight, bias, residual, *statistics, EPS, activation),
            *moved,
            *reference.batch_norm_act_backward(
                dy,
                input,
                weight,
                bias,
                residual,
                statistics[0],
                (statistics[1] + EPS).rsqrt(),
                training,
                EPS,
                activation,
                pre_activation,
            ),
        )
        assert_near((y, *running, *grads), exact, f"{shape} {channels_last} {training}")


def check_group_norm(shape, groups, channels_last=False, activation="silu"):
    x, dy, _, weight, bias, *_ = operands(shape, channels_last)
    y, mean, rstd = triton_ops.group_norm_act(x, weight, bias, groups, EPS, activation)
    grads = triton_ops.group_norm_act_backward(dy, x, weight, bias, mean, rstd, groups, activation, True, True, True)
    x, dy, weight, bias = (t.double() for t in (x, dy, weight, bias))
    exact = (
        reference.group_norm_act(x, groups, weight, bias, EPS, activation),
        *reference.group_norm_act_backward(dy, x, weight, bias, groups, EPS, activation),
    )
    assert_near((y, *grads), exact, f"{shape} {groups} {channels_last}")


# Every path of plan.py: one program, several, split; planes below, at and above a tile; rows that end in a tile.
BATCH_NORM_SHAPES = (
    *((2, 1), (5, 3), (65, 33), (3, 129), (200, 65)),
    *((1, 3, 2), (3, 7, 49), (9, 2, 31), (2, 3, 1023), (2, 1, 4099)),
    *((3, 33, 7, 7), (2, 5, 1, 3), (11, 9, 13, 5), (2, 2, 65, 64), (3, 3, 2, 5, 7)),
)
GROUP_NORM_SHAPES = (
    *(((2, 6), 3), ((3, 34), 2), ((5, 3), 1), ((1, 6, 2), 6)),
    *(((2, 6, 49), 2), ((3, 10, 33), 5), ((2, 3, 1025), 3), ((1, 130, 31), 2), ((1, 3, 65, 67), 1)),
    *(((2, 33, 5, 7), 3), ((2, 66, 33, 1), 1), ((2, 6, 3, 5, 3), 3)),
)


def formats_of(shape):
    return (False, True) if len(shape) in CHANNELS_LAST else (False,)


@pytest.mark.parametrize("shape", BATCH_NORM_SHAPES, ids=names)
def test_batch_norm_of_odd_sizes(shape):
    for channels_last in formats_of(shape):
        check_batch_norm(shape, channels_last)


# One program, several, split; a tile that is not full must not count the activation of what is not there.
SHAPES_OF_PRE_ACTIVATION = ((5, 3), (3, 7, 49), (3, 33, 7, 7), (2, 1, 4099), (2, 2, 65, 64))


@pytest.mark.parametrize("shape", SHAPES_OF_PRE_ACTIVATION[: None if everything else 2], ids=names)
@pytest.mark.parametrize("pre_activation", native.ACTIVATIONS)
def test_pre_activation(shape, pre_activation):
    for channels_last in formats_of(shape):
        check_batch_norm(shape, channels_last, pre_activation=pre_activation)


@pytest.mark.parametrize(("shape", "groups"), GROUP_NORM_SHAPES, ids=names)
def test_group_norm_of_odd_sizes(shape, groups):
    for channels_last in formats_of(shape):
        check_group_norm(shape, groups, channels_last)


# What is patched in a copy of stages.py, and a check that must notice. No mutant writes outside of its memory.
MUTATIONS = {
    "statistics count lanes past the end": (
        "d = tl.where(mask, d, 0.0)",
        "d = d + 0.0",
        lambda: check_batch_norm((3, 3, 7, 7)),
    ),
    "statistics count activations past the end": (
        "values = tl.where(mask, values, 0.0)",
        "values = values + 0.0",
        lambda: check_batch_norm((3, 3, 7, 7), pre_activation="sigmoid"),
    ),
    "a gradient is not that of x": (
        "gradient = activations.backward(raw, gradient, PRE_ACTIVATION)",
        "gradient = activations.backward(values, gradient, PRE_ACTIVATION)",
        lambda: check_batch_norm((5, 3), pre_activation="silu"),
    ),
    "statistics count rows past the end": (
        "counts += row_exists.to(tl.float32)",
        "counts += 1.0",
        lambda: check_batch_norm((5, 3), False),
    ),
    "gradients count lanes past the end": (
        "dz = tl.where(mask, dz, 0.0)",
        "dz = activations.backward(z, 1.0 + tl.zeros_like(z), ACTIVATION)",
        lambda: check_batch_norm((3, 3, 7, 7)),
    ),
    "a group takes in channels past its end": (
        "tl.where(exists, m2 + count * d * d, 0.0)",
        "m2 + count * d * d",
        lambda: check_group_norm((2, 6, 7), 2),
    ),
    "a split takes in partials of the next group": (
        "(i < splits * group)[:, None]",
        "(i < splits * group + 1)[:, None]",
        lambda: check_group_norm((1, 6, 9000), 2),
    ),
    "a plane reads into the next": (
        "exists = (n < N) & (s < S)",
        "exists = n < N",
        lambda: check_group_norm((2, 4, 3), 2),
    ),
    "the last row is left out": (
        "exists = row < rows",
        "exists = row < rows - 1",
        lambda: check_batch_norm((5, 3)),
    ),
    "parameter gradients miss the last sample": (
        "mask = (i < B * splits)[:, None]",
        "mask = (i < B * splits - 1)[:, None]",
        lambda: check_group_norm((2, 6, 7), 2),
    ),
}


@pytest.mark.skipif(
    not getattr(WHY_NOT["triton"] or triton_ops, "INTERPRETED", False), reason="memory is checked on GPUs"
)
@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_mask_is_noticed(name, tmp_path, monkeypatch):
    right, wrong, check = MUTATIONS[name]
    check()
    source = Path(stages.__file__).read_text()
    assert right in source
    (tmp_path / "mutant.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("normfused.triton.mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    for kernel in [kernel for kernel in vars(drivers) if kernel.endswith("_kernel")]:
        monkeypatch.setattr(drivers, kernel, getattr(mutant, kernel))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.thorough
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_64_bit_offsets_give_the_same_bits(memory_format, monkeypatch):
    def everything():
        x, dy, residual, weight, bias, mean, var = operands((3, 9, 40, 41))
        x, dy = x.contiguous(memory_format=memory_format), dy.contiguous(memory_format=memory_format)
        y, saved, invstd = triton_ops.batch_norm_act(
            x, weight, bias, residual, mean, var, None, True, 0.1, EPS, "silu", None
        )
        grads = triton_ops.batch_norm_act_backward(
            dy, x, weight, bias, residual, saved, invstd, True, "silu", None, True, True, True, True
        )
        group = triton_ops.group_norm_act(x, weight, bias, 3, EPS, "silu")
        group_grads = triton_ops.group_norm_act_backward(dy, x, weight, bias, *group[1:], 3, "silu", True, True, True)
        return (y, saved, invstd, mean, var, *grads, *group, *group_grads)

    narrow = everything()
    again = everything()
    monkeypatch.setattr(plans, "MAX_NARROW", 0)
    assert plan(Extent(1, 3, 9, 1640, 9, False)).wide
    for a, b, c in zip(narrow, again, everything(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# Plans: pure Python


def rows_of(extent, p):
    """(n, s) of every row that the tiles of a plan hold, as stages._rows finds them, by split."""
    _, N, _, S, *_ = extent
    block = p.block_n * p.block_s
    for split in range(p.splits):
        for t in range(split * p.split_tiles, min((split + 1) * p.split_tiles, p.tiles)):
            for i in range(block):
                if p.channels_last:
                    row = t * block + i
                    if row < N * S:
                        yield divmod(row, S)
                else:
                    planes = -(-S // p.block_s)
                    n, s = t // planes * p.block_n + i // p.block_s, t % planes * p.block_s + i % p.block_s
                    if n < N and s < S:
                        yield n, s


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("S", [1, 3, 49, 196, 1025, 5000])
@pytest.mark.parametrize("N", [1, 2, 7, 33])
def test_plans_cover_every_row_once(N, S, channels_last):
    for B, C, G in ((1, 1, 1), (1, 3, 3), (1, 300, 300), (2, 6, 2), (2, 640, 32), (1, 130, 1)):
        extent = Extent(B, 1 if B > 1 or G != C else N, C, S, G, channels_last)
        for p in (plan(extent), plan(extent).divided(plans.APPLY_TILES)):
            assert sorted(rows_of(extent, p)) == list(itertools.product(range(extent.N), range(S)))
            assert p.block_n * p.block_s * p.block_c <= plans.TILE
            assert (p.blocks - 1) * p.channels < C <= p.blocks * p.channels
            assert p.channels <= p.block_c


def compiled_for(p):
    return p.channels_last, p.block_n, p.block_s, p.block_c, p.fused, p.wide


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("C", "S"), [(64, 12544), (144, 3136), (192, 784), (384, 196), (960, 49), (1280, 1)])
def test_a_batch_size_does_not_compile_again(C, S, channels_last):
    plans_of = [plan(Extent(1, N, C, S, C, channels_last)) for N in range(2, 257)]
    assert len({compiled_for(p) for p in plans_of if not p.fused}) <= 1
    assert len({compiled_for(p) for p in plans_of if p.fused}) <= 1
    # From one program to a split reduction at most once on the way up.
    assert [p.fused for p in plans_of] == sorted((p.fused for p in plans_of), reverse=True)


def test_few_channels_fill_a_gpu():
    for channels_last in (False, True):
        for C, S in ((3, 224 * 224), (32, 112 * 112), (64, 56 * 56)):
            p = plan(Extent(1, 32, C, S, C, channels_last))
            assert not p.fused
            assert 256 <= p.blocks * p.splits <= 2 * plans.PROGRAMS
        p = plan(Extent(1, 1, 128, 20 * 256 * 256, 32, channels_last))
        assert p.blocks * p.splits >= 256


@pytest.mark.parametrize(
    "extent",
    [
        (1, 2, 100_000, 4, 100_000),
        (1, 131_072, 3, 5, 3),
        (131_072, 1, 4, 2, 2),
        (70_000, 1, 70_000, 1, 1),
        (1, 2**20, 64, 2**10, 64),
        (1024, 1, 128, 2**20, 32),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_grids_are_one_dimensional_and_in_range(extent, channels_last):
    extent = Extent(*extent, channels_last)
    for p in (plan(extent), plan(extent).divided(plans.APPLY_TILES)):
        (programs,) = drivers.programs(extent, p)
        assert 0 < programs < 2**31


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_are_64_bit_where_32_do_not_suffice(channels_last):
    for numel in (2**31 - 8, 2**31, 2**31 + 8, 2**33):
        assert plan(Extent(1, 1, 8, numel // 8, 8, channels_last)).wide
    assert not plan(Extent(1, 64, 64, 2**16, 64, channels_last)).wide
    # A sample of GroupNorm starts at a 64-bit offset anyway.
    assert not plan(Extent(2**10, 1, 64, 2**18, 32, channels_last)).wide


@pytest.mark.parametrize(("shape", "groups"), [((5, 66_000, 1), None), ((66_000, 2, 1), None), ((66_000, 2), 1)])
def test_more_channels_and_samples_than_a_grid_has_rows(shape, groups, monkeypatch):
    # Tiles of a size that the interpreter gets through.
    monkeypatch.setattr(plans, "TILE", 2**16)
    monkeypatch.setattr(plans, "CHANNELS", 2**12)
    if groups is None:
        check_batch_norm(shape)
        return
    # One program for each sample is more than the interpreter gets through: its arithmetic alone.
    (programs,) = drivers.programs(extent := Extent(*shape[:1], 1, shape[1], 1, groups, False), plan(extent))
    assert programs == shape[0]


# Operators


@pytest.mark.skipif(not ops.LOADED, reason=str(ops.WHY_NOT))
@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_are_those_of_the_extension(name):
    def arguments(operator):
        text = str(operator._schema).split("(", 1)[1]
        # The extension names what it returns; torch.library numbers the aliases and makes every int a SymInt.
        text = re.sub(r"Tensor (y|mean|invstd|rstd|d\w+)(?=[,)])(?=[^>]*$)", "Tensor", text)
        return re.sub(r"\(\w+!\)", "(!)", text).replace("SymInt", "int")

    assert arguments(getattr(triton_ops, name)) == arguments(getattr(ops, name))


@pytest.mark.thorough
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_batch_norm_act(training, memory_format):
    x, dy, residual, weight, bias, mean, var = operands((3, 5, 4, 3))
    x = x.contiguous(memory_format=memory_format)
    counter = torch.tensor(3) if training else None
    args = (x, weight, bias, residual, mean, var, counter, training, None, EPS, "relu6", None)
    torch.library.opcheck(triton_ops.batch_norm_act, args)
    _, mean, invstd = triton_ops.batch_norm_act(*args)
    for mask in ((True, True, True, True), (False, True, False, False)):
        torch.library.opcheck(
            triton_ops.batch_norm_act_backward,
            (dy, x, weight, bias, residual, mean, invstd, training, "relu6", None, *mask),
        )


@pytest.mark.thorough
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck_group_norm_act(memory_format):
    x, dy, _, weight, bias, *_ = operands((3, 6, 4, 3))
    x = x.contiguous(memory_format=memory_format)
    args = (x, weight, bias, 3, EPS, "silu")
    torch.library.opcheck(triton_ops.group_norm_act, args)
    _, mean, rstd = triton_ops.group_norm_act(*args)
    torch.library.opcheck(
        triton_ops.group_norm_act_backward, (dy, x, weight, bias, mean, rstd, 3, "silu", True, True, False)
    )


@pytest.mark.skipif(not ops.LOADED, reason=str(ops.WHY_NOT))
def test_malformed_calls_raise_and_leave_the_running_statistics_alone():
    from test_operators import malformed_calls

    calls = 0
    for what, name, arguments in malformed_calls():
        tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
        if all(t.is_meta for t in tensors) or arguments["x"].is_meta or arguments.get("pre_activation") == "relu":
            continue  # What has a pre-activation is malformed for the CPU's kernels alone.
        before = {k: v.clone() for k, v in arguments.items() if k.startswith("running") and v is not None}
        try:
            getattr(triton_ops, name)(**arguments)
        except (RuntimeError, NotImplementedError) as error:
            assert str(error), what
        else:
            pytest.fail(f"{what} did not raise")
        for key, value in before.items():
            assert arguments[key].is_meta or torch.equal(arguments[key], value), what
        calls += 1
    assert calls >= 200


def test_only_what_is_asked_for_is_computed():
    x, dy, residual, weight, bias, mean, var = operands((3, 5, 4, 3))

    def gradients(mask, training):
        return triton_ops.batch_norm_act_backward(
            dy, x, weight, bias, residual, mean, var, training, "relu6", None, *mask
        )

    for training in (True, False):
        everything = gradients((True,) * 4, training)
        for mask in itertools.product((True, False), repeat=4):
            for asked, grad, full in zip(mask, gradients(mask, training), everything, strict=True):
                assert torch.equal(grad, full) if asked else grad.numel() == 0


# Selection


class OnDevice:
    """What choose() looks at of a tensor."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.is_cpu = self.device.type == "cpu"


@pytest.fixture
def undecided(monkeypatch):
    """No decision taken yet, and Triton compiling for "cuda"."""
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(backends, "_refused", {})
    monkeypatch.setattr(backends, "_why_not_triton", lambda device_type: None)
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    return monkeypatch


def test_triton_serves_what_the_extension_does_not(undecided):
    why_not = backends._why_not_extension("cuda")
    assert why_not
    with pytest.warns(UserWarning, match=f"cuda are served by normfused's Triton kernels: {re.escape(why_not)}"):
        assert backends.choose(OnDevice("cuda")) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(OnDevice("cuda:1")) == "triton"


def test_torch_serves_what_triton_does_not_either(undecided):
    undecided.setattr(backends, "_why_not_triton", lambda device_type: "triton is not installed; pip install triton")
    with pytest.warns(UserWarning, match=r"PyTorch's own operators.*; triton is not installed; pip install triton"):
        assert backends.choose(OnDevice("cuda")) == "torch"
    with pytest.warns(UserWarning, match="no kernels for mps"):
        assert backends.choose(OnDevice("mps")) == "torch"


def test_interpreted_kernels_serve_only_whom_asks_for_them(undecided):
    undecided.setattr(triton_ops, "INTERPRETED", True)
    undecided.setattr(ops, "LOADED", False)
    undecided.setattr(ops, "WHY_NOT", "the C++ core is not built; build it")
    with pytest.warns(UserWarning, match="TRITON_INTERPRET is set.*unset it"):
        assert backends.choose(OnDevice("cuda")) == "torch"
    with pytest.warns(UserWarning, match="own operators, at their speed: the C.. core is not built; build it"):
        assert backends.choose(OnDevice("cpu")) == "torch"
    with normfused.use_backend("triton"):
        assert backends.choose(OnDevice("cpu")) == "triton"


def test_an_override_that_cannot_be_honoured_raises(undecided):
    undecided.setattr(backends, "_why_not_triton", lambda device_type: "there is no driver")
    with (
        normfused.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"for a tensor on cuda.*there is no driver"),
    ):
        backends.choose(OnDevice("cuda"))
    undecided.setattr(backends, "OPERATORS", {"extension": ops})
    undecided.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install triton"), normfused.use_backend("triton"):
        pass
    with pytest.raises(ValueError, match="'extension', 'triton', 'torch', got 'cudnn'"), normfused.use_backend("cudnn"):
        pass


def test_info_says_what_triton_does():
    info = normfused.info()
    assert info["triton"]["installed"]
    assert info["triton"]["used"] == ("triton" in info["backend"].values())
    assert info["triton"]["used"] or info["triton"]["why_not"]
    with normfused.use_backend("triton"):
        assert normfused.info()["triton"]["used"]


def test_the_operators_are_tritons_own(monkeypatch):
    """What use_backend names is what runs."""
    called = []

    class Recorder:
        INTERPRETED = triton_ops.INTERPRETED

        def __getattr__(self, name):
            called.append(name)
            return getattr(triton_ops, name)

    monkeypatch.setitem(backends.OPERATORS, "triton", Recorder())
    x = randn(3, 4, 5).requires_grad_()
    with normfused.use_backend("triton"):
        batch_norm_act(x, None, None, training=True).sum().backward()
        group_norm_act(x, 2).sum().backward()
        with torch.no_grad():
            batch_norm_act(x, torch.zeros(4), torch.ones(4))
    assert called == [*OPERATORS, "batch_norm_act"]


# Without the interpreter


def run_without_interpreter(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="Triton compiles here")
@pytest.mark.thorough
def test_without_a_gpu_or_the_interpreter():
    """The import leaves triton and CUDA alone; asking for Triton on the CPU says what it takes."""
    result = run_without_interpreter(
        "-c",
        "import sys, torch, normfused\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "info = normfused.info()['triton']\n"
        "assert info['installed'] and not info['used'] and 'no GPU' in info['why_not'], info\n"
        "with normfused.use_backend('triton'):\n"
        "    try: normfused.BatchNormAct2d(3)(torch.ones(2, 3, 4, 4))\n"
        "    except RuntimeError as error: print(error)\n",
    )
    assert result.returncode == 0, result.stderr
    assert "for a tensor on cpu" in result.stdout
    assert "TRITON_INTERPRET=1" in result.stdout


TRACE = """
import torch, normfused
from normfused import backends, triton as triton_ops
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    # No GPU, but its name is all that tracing asks for.
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Driver())
backends.OPERATORS["triton"] = triton_ops
backends._decided["cpu"] = "triton"
seen = []

class Traced(Exception): pass

def record(graph, inputs):
    seen.append([str(node.target) for node in graph.graph.nodes if "triton" in str(node.target)])
    raise Traced

for layer, kernels in (
    (normfused.BatchNormAct2d(6), 1),
    (normfused.BatchNormAct2d(6).eval(), 1),
    (normfused.GroupNormAct(3, 6), 1),
    (normfused.BatchNormAct2d(6, momentum=None), 1),
):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    try: compiled(torch.randn(4, 6, 5, 5))
    except Exception as error: assert isinstance(error, Traced) or "Traced" in repr(error), error
    assert len(seen[-1]) == kernels and all("triton_kernel_wrapper" in target for target in seen[-1]), seen[-1]
# What the cache of compiled graphs is keyed with.
kernels = torch._library.triton.get_triton_kernels_for_op("normfused_triton::batch_norm_act")
found = {kernel.__name__ for kernel in kernels}
assert found == {"forward_kernel", "stats_kernel", "stats_finish_kernel", "apply_kernel"}, found
print(len(seen), "graphs")
"""


@pytest.mark.thorough
def test_compile_sees_the_kernels():
    """fullgraph, traced with the operators that a GPU gets: torch.compile finds the kernels inside of them."""
    result = run_without_interpreter("-c", TRACE)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 graphs" in result.stdout
    assert "assuming every input is mutated" not in result.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("target", [("cuda", "80"), ("cuda", "90"), ("hip", "gfx942")], ids="".join)
def test_every_kernel_compiles_for(target, tmp_path):
    """Offline: Triton brings its own assembler."""
    result = run_without_interpreter("tests/triton_targets.py", *target, TRITON_CACHE_DIR=str(tmp_path))
    if "0 compatible backends" in result.stderr:
        pytest.skip(f"this triton does not compile for {target[0]}")
    assert result.returncode == 0, result.stderr[-3000:]
    facts = [json.loads(line) for line in result.stdout.splitlines()]
    assert {fact["kernel"] for fact in facts} == {name for name in vars(stages) if name.endswith("_kernel")}
    for fact in facts:
        assert fact["binary"] > 0
        assert fact["shared"] <= 16 * 1024
        # 4 blocks a multiprocessor or more. Exponentials in float64 take what they need.
        assert fact["dtype"] == "float64" or (fact.get("registers", 0) <= 128 and fact.get("spilled", 0) == 0)
    # 16 bytes at a time where the planes allow.
    aligned = [f for f in facts if f["dtype"] == "bfloat16" and f["extent"] in ("contiguous", "channels_last")]
    assert all(f["wide_loads"] for f in aligned if not f["kernel"].endswith(("finish_kernel", "gradients_kernel")))
