"""One regression test for each bug that PyTorch or another implementation had; each test names the issues.

pytorch_n is issue or pull request n of pytorch/pytorch, and so on. Crashes on malformed calls are in test_malformed.py,
what needs several processes in test_distributed.py, what needs a GPU in test_cuda.py.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CHANNELS_LAST,
    activate,
    assert_memory_format,
    assert_same,
    interpreted,
    names,
    randn,
    training_or_eval,
)
from test_accuracy import check_batch_norm, check_group_norm
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfused import BatchNormAct1d, BatchNormAct2d, GroupNormAct, reference
from normfused.functional import batch_norm_act, group_norm_act

NAN = float("nan")
formats = pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))


def in_format(x, channels_last):
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if channels_last and x.dim() in CHANNELS_LAST else x


def batch_norm(x, momentum=1.0):
    """(y, running_mean, running_var) of training from nothing; with momentum 1, the statistics of the batch."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = torch.zeros(x.shape[1], dtype=dtype), torch.ones(x.shape[1], dtype=dtype)
    return batch_norm_act(x, mean, var, training=True, momentum=momentum, activation=None), mean, var


def assert_statistics(x):
    """Statistics and output of training on ``x`` are those that float64 finds."""
    y, mean, var = batch_norm(x)
    n = x.numel() // x.shape[1]
    exact_mean, exact_var = reference.batch_statistics(x.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), exact_var * n / (n - 1), rtol=1e-5, atol=0)
    exact = reference.batch_norm_act(x.double(), None, None, None, exact_mean, exact_var, 1e-5, None)
    sigmas = (exact_mean.abs() / exact_var.sqrt()).max()
    assert (y.double() - exact).abs().max() <= 8 * torch.finfo(x.dtype).eps * (exact.abs().max() + sigmas)


# The variance


@pytest.mark.stricter_than_native("group_norm of channels_last takes E[x²] - E[x]² for the variance")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=names)
@pytest.mark.parametrize("value", [1.0, 3.14, 100.1, 1e4])
@formats
def test_pytorch_5410_a_constant_input_does_not_become_one(backend, dtype, value, channels_last):
    x = in_format(torch.full((4, 5, 7, 9), value, dtype=dtype), channels_last)
    # Half an ulp of the mean, over sqrt(eps).
    allowed = value * torch.finfo(torch.float32).eps / 1e-5**0.5 + 1e-7
    y, _, var = batch_norm(x)
    assert y.abs().max() <= allowed
    assert var.max() <= (value * 1e-6) ** 2
    assert group_norm_act(x, 5).abs().max() <= allowed


@pytest.mark.parametrize("shape", [(64, 3), (8, 3, 33), (4, 6, 31, 33)], ids=names)
@formats
def test_pytorch_40302_mean_100_and_sigma_one_hundredth(backend, shape, channels_last):
    x = in_format(100 + 0.01 * randn(*shape), channels_last)
    y, _, var = batch_norm(x)
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(var.double(), exact, rtol=1e-3, atol=0)
    assert (y.transpose(0, 1).flatten(1).var(1) > 0.8).all()


@pytest.mark.stricter_than_native("the variance overflows: 0 or NaN")
@formats
def test_pytorch_162489_inputs_of_1e30(backend, channels_last):
    x = in_format(1e30 * randn(4, 6, 7, 9), channels_last)
    exact = x.double()
    assert_same(batch_norm(x)[0], F.batch_norm(exact, None, None, training=True).float(), "y")
    assert_same(group_norm_act(x, 2), F.group_norm(exact, 2).float(), "y")


@pytest.mark.parametrize("value", [1e-3, 1.0, 1e4, 1e8])
@formats
def test_paddle_16654_a_variance_is_never_negative(backend, value, channels_last):
    x = torch.full((8, 4, 5, 5), value)
    x[::2] = torch.nextafter(x[::2], torch.tensor(torch.inf))
    y, _, var = batch_norm(in_format(x, channels_last))
    assert (var >= 0).all()
    assert y.isfinite().all()
    assert group_norm_act(x, 2).isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 31, 33, 63, 65, 127, 129, 255, 257, 1023, 1025])
@formats
def test_flaggems_5828_masked_lanes_are_not_counted(backend, size, channels_last):
    """The values are far from 0, the value of a masked lane."""
    assert_statistics(in_format(randn(3, 2, size, 1) + 50, channels_last))
    assert_statistics(in_format(randn(size + 1, 3, 1, 1) + 50, channels_last))


@pytest.mark.stricter_than_native("group_norm of channels_last takes E[x²] - E[x]² for the variance")
@pytest.mark.parametrize("channels", [3, 5, 6, 7, 12, 20, 24, 48, 65, 96])
@formats
def test_flaggems_4984_apex_1768_channels_and_groups_that_are_no_powers_of_two(backend, channels, channels_last):
    x = in_format(randn(2, channels, 3, 5) + 50, channels_last)
    assert_statistics(x)
    for groups in [g for g in range(1, channels + 1) if channels % g == 0][: 2 if interpreted(backend) else None]:
        exact = F.group_norm(x.double(), groups).float()
        torch.testing.assert_close(group_norm_act(x, groups), exact, rtol=1e-4, atol=1e-4)


# float16


@formats
def test_pytorch_126525_the_sum_of_squares_overflows_float16(backend, channels_last):
    """PyTorch's own test_batchnorm_half_overflow: the values of a channel as many as there."""
    shape = (2, 4, 60, 60) if interpreted(backend) else (4, 16, 500, 500)
    x = in_format(randn(*shape[:3], 1).half().mul_(30).expand(shape), channels_last)
    y, mean, var = batch_norm(x)
    assert y.isfinite().all()
    torch.testing.assert_close(mean, x[..., 0].float().mean((0, 2)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(var, x[..., 0].float().var((0, 2), correction=0), rtol=5e-3, atol=0)
    assert group_norm_act(x, 2).isfinite().all()


@training_or_eval
def test_pytorch_147303_float16_channels_last_gradient_is_not_nan(backend, training):
    shape = (4, 3, 24, 24) if interpreted(backend) else (16, 3, 224, 224)
    x = in_format(randn(*shape).half(), True).requires_grad_()
    layer = BatchNormAct2d(3).train(training)
    layer(x).backward(randn(*shape, seed=1).half())
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


# Memory formats


@formats
@training_or_eval
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_pytorch_107199_64039_the_gradient_has_the_inputs_format_whatever_dys(backend, channels_last, training, kind):
    x, plain = (in_format(randn(4, 6, 5, 7), last).requires_grad_() for last in (channels_last, False))
    dy = in_format(randn(4, 6, 5, 7, seed=1), not channels_last)
    grads = []
    for tensor, gradient in ((x, dy), (plain, dy.contiguous())):
        if kind == "batch_norm":
            y = batch_norm_act(tensor, torch.zeros(6), torch.ones(6), training=training)
        else:
            y = group_norm_act(tensor, 2, activation="relu6")
        grads.append(torch.autograd.grad(y, tensor, gradient)[0])
    assert_memory_format(grads[0], x)
    assert_same(*grads, "dx", formats=False)


@pytest.mark.parametrize("shape", [(8, 1, 5, 7), (8, 6, 1, 1), (1, 1, 5, 7), (1, 6, 1, 1)], ids=names)
@formats
def test_pytorch_115940_strides_that_fit_both_formats(backend, shape, channels_last):
    x, dy = in_format(randn(*shape), channels_last).requires_grad_(), randn(*shape, seed=1)
    weight = randn(shape[1], seed=2).requires_grad_()
    pairs = [
        (group_norm_act(x, 1, weight, activation="silu"), F.silu(F.group_norm(x, 1, weight))),
    ]
    if x.numel() > shape[1]:
        pairs.append(
            (
                batch_norm_act(x, None, None, weight, training=True, activation="silu"),
                F.silu(F.batch_norm(x, None, None, weight, training=True)),
            )
        )
    for y, native_y in pairs:
        assert_same(y, native_y, "y")
        for grads in zip(*(torch.autograd.grad(out, (x, weight), dy) for out in (y, native_y)), strict=True):
            assert_same(*grads, "gradient")


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 3, 5, 7)], ids=names)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "eval"])
def test_pytorch_111824_group_norm_keeps_channels_last(backend, shape, mode):
    x = in_format(randn(*shape), True).requires_grad_(mode == "grad")
    layer = GroupNormAct(3, 6, activation="relu6").train(mode != "eval")
    y = layer(x)
    assert y.is_contiguous(memory_format=CHANNELS_LAST[len(shape)])
    if mode == "grad":
        y.sum().backward()
        assert x.grad.is_contiguous(memory_format=CHANNELS_LAST[len(shape)])


@pytest.mark.thorough(interpreted=True)
def test_pytorch_140913_dweight_of_channels_last_group_norm_under_compile(backend):
    torch._dynamo.reset()
    batch = 1 if interpreted(backend) else 8
    x = in_format(randn(batch, 64, 64, 64).bfloat16(), True)
    dy = in_format(randn(batch, 64, 64, 64, seed=1).bfloat16(), True)
    layer = GroupNormAct(16, 64).bfloat16()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(dy)
    exact = reference.group_norm_act_backward(
        dy.double(), x.double(), layer.weight.detach().double(), layer.bias.detach().double(), 16, 1e-5, None
    )
    torch.testing.assert_close(layer.weight.grad.double(), exact[1], rtol=8e-3, atol=8e-3 * exact[1].abs().max().item())
    torch.testing.assert_close(layer.bias.grad.double(), exact[2], rtol=8e-3, atol=8e-3 * exact[2].abs().max().item())
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=names)
def test_pytorch_62594_evaluation_of_channels_last_equals_contiguous(backend, dtype):
    layer = BatchNormAct2d(64, activation=None).eval().to(dtype)
    layer.running_mean.copy_(randn(64))
    layer.running_var.copy_(randn(64, seed=1).abs() + 0.5)
    x = randn(2, 64, 10, 10, seed=2).to(dtype)
    assert torch.equal(layer(x), layer(in_format(x, True)))


# Indexing and launches


@pytest.mark.stricter_than_native("the mean of 131,072 values is off by 5e-6: less than that counts one value too many")
@pytest.mark.parametrize("batch", [65_535, 65_536, 131_072, 131_075])
@pytest.mark.parametrize("tail", [(), (1,)], ids=names)
def test_pytorch_16998_batches_of_131072(backend, batch, tail):
    if interpreted(backend) and (backend == "emulated" or batch != 131_075 or tail):
        pytest.skip("minutes, interpreted: test_cuda.py runs it on a GPU")
    x = (randn(batch, 1, *tail) + 3).requires_grad_()
    assert_statistics(x.detach())
    check_batch_norm(x, randn(1).requires_grad_(), randn(1, seed=1).requires_grad_(), None, "silu", True)


@pytest.mark.parametrize("shape", [(3, 65_535), (2, 70_001), (2, 65_537, 2)], ids=names)
def test_more_channels_than_a_grid_has_rows_in_y(backend, shape):
    if interpreted(backend):
        pytest.skip("minutes: plans are tested by themselves, and test_cuda.py runs it on a GPU")
    weight, bias = (randn(shape[1], seed=seed).requires_grad_() for seed in (1, 2))
    check_batch_norm(randn(*shape).requires_grad_(), weight, bias, None, "silu", True)
    check_group_norm(randn(*shape).requires_grad_(), shape[1], weight, bias, "silu")


def test_apex_group_norm_of_256_samples_and_640_channels_divides_by_zero(backend):
    shape, groups = ((2, 640, 2), 1) if interpreted(backend) else ((256, 640, 3), 32)
    weight, bias = (randn(640, seed=seed).requires_grad_() for seed in (1, 2))
    check_group_norm(randn(*shape).requires_grad_(), groups, weight, bias, "silu")


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("batch", [128, 129, 256, 1024])
@formats
def test_pytorch_178872_dweight_of_group_norm_for_more_than_128_samples(backend, batch, channels_last):
    if interpreted(backend) and (batch != 129 or channels_last):
        pytest.skip("one program for each sample: minutes, interpreted")
    x = in_format(randn(batch, 4, 3, 1), channels_last).requires_grad_()
    weight, bias = (randn(4, seed=seed).requires_grad_() for seed in (1, 2))
    check_group_norm(x, 2, weight, bias, "silu")


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 3, 5, 7), (2, 6, 2, 3, 2, 3)], ids=names)
def test_liger_1375_gradients_of_group_norm_in_more_than_3_dimensions(backend, shape):
    weight, bias = (randn(6, seed=seed).requires_grad_() for seed in (1, 2))
    check_group_norm(randn(*shape).requires_grad_(), 3, weight, bias, "silu")


def memory_available():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.large
@pytest.mark.parametrize("numel", [2**31 - 8, 2**31, 2**31 + 8, 128 * 16128 * 1200, 2**32 + 8], ids=str)
@pytest.mark.parametrize("kind", ["batch_norm", "group_norm"])
def test_apex_1845_pytorch_181555_more_elements_than_32_bits_count(backend, numel, kind):
    """A pattern that repeats along the elements, so that what is right is known without a copy of them."""
    if interpreted(backend):
        pytest.skip("hours, interpreted")
    if not os.path.exists("/proc/meminfo") or memory_available() < 5 * numel:
        pytest.skip(f"needs {5 * numel >> 30} GiB of memory")
    pattern = randn(8).bfloat16()
    x = pattern.repeat(numel // 8).view(1, 8, -1) if kind == "group_norm" else pattern.repeat(numel // 8).view(8, 1, -1)
    y = group_norm_act(x, 1) if kind == "group_norm" else batch_norm(x)[0]
    exact = F.group_norm(pattern.double().view(1, 1, 8), 1).flatten()
    for start in (0, numel // 16 * 8 - 8, numel - 64):
        torch.testing.assert_close(y.view(-1)[start : start + 64].double(), exact.repeat(8), rtol=8e-3, atol=1e-2)


# Gradients


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@training_or_eval
def test_inplace_abn_155_a_sum_right_after_the_layer(backend, reduction, training):
    ours, native = BatchNormAct2d(3, activation="leaky_relu").train(training), nn.BatchNorm2d(3).train(training)
    grads = []
    for module in (ours, native):
        x = randn(4, 3, 5, 5).requires_grad_()
        y = module(x) if module is ours else F.leaky_relu(module(x))
        getattr(y, reduction)().backward()
        grads.append((x.grad, module.weight.grad, module.bias.grad))
    for pair in zip(*grads, strict=True):
        assert_same(*pair, "gradient")


@pytest.mark.parametrize("value", [0.0, 6.0])
@pytest.mark.parametrize("count", [1, 8, 67])
@pytest.mark.parametrize("compiled", [False, True])
def test_pytorch_184574_relu6_is_not_clamp_at_its_kinks(backend, value, count, compiled):
    """clamp's gradient is 1 at exactly 0 and 6, relu6's is 0."""
    torch._dynamo.reset()
    function = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager") if compiled else batch_norm_act
    x = torch.full((count, 1), value, requires_grad=True)
    function(x, torch.zeros(1), torch.ones(1), eps=0.0, activation="relu6").sum().backward()
    assert torch.equal(x.grad, torch.zeros(count, 1))
    torch._dynamo.reset()


@pytest.mark.stricter_than_native("relu6's gradient at NaN is 0 in CPU vector blocks and 1 in scalar tails")
@pytest.mark.parametrize("count", [1, 8, 67])
def test_pytorch_185472_relu6_is_not_clamp_at_nan(backend, count):
    """clamp's gradient is 0 at NaN; here a NaN passes what comes in."""
    x = torch.full((count, 1), NAN, requires_grad=True)
    batch_norm_act(x, torch.zeros(1), torch.ones(1), eps=0.0, activation="relu6").sum().backward()
    assert torch.equal(x.grad, torch.ones(count, 1))


@pytest.mark.stricter_than_native("batch_norm may find a mean that is not the constant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=names)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 64), (1, 3, 128), (128, 3), (2, 3, 4, 4), (16, 3, 1, 1)], ids=names)
@formats
def test_one_gradient_for_all_values_of_a_constant_channel_gives_exactly_0(backend, shape, dtype, channels_last):
    """dz * scale - scale * mean(dz) keeps one product's rounding error, where the multiplication is fused."""
    x = in_format(torch.full(shape, 3.14, dtype=dtype), channels_last).requires_grad_()
    weight = randn(3, seed=1, dtype=dtype)
    y = batch_norm_act(x, None, None, weight, training=True, activation=None)
    (dx,) = torch.autograd.grad(y, x, torch.full(shape, 0.75, dtype=dtype))  # sums of which are exact
    assert dx.eq(0).all(), dx


@pytest.mark.stricter_than_native("sigmoid's gradient is y * (1 - y), and y rounds to 1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=names)
def test_the_gradient_of_a_saturated_sigmoid_is_not_0(backend, dtype):
    z = torch.tensor([-30.0, -17, 0, 12, 17, 30, 80], dtype=dtype)
    x = torch.zeros(2, len(z), dtype=dtype, requires_grad=True)
    statistics = torch.zeros(len(z), dtype=dtype), torch.ones(len(z), dtype=dtype)
    y = batch_norm_act(x, *statistics, None, z, eps=0.0, activation="sigmoid")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    e = (-z.double().abs()).exp()
    torch.testing.assert_close(
        dx.double(), (e / (1 + e).square()).expand(2, -1), rtol=8 * torch.finfo(dtype).eps, atol=0
    )


# dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names)
@training_or_eval
def test_pytorch_61924_no_parameters_under_autocast(backend, dtype, training):
    ours, native = BatchNormAct2d(6, affine=False).train(training), nn.BatchNorm2d(6, affine=False).train(training)
    conv = nn.Conv2d(3, 6, 3)
    results = []
    for module in (ours, native):
        x = randn(4, 3, 8, 8).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = module(conv(x))
            y = y if module is ours else F.relu6(y)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        results.append((y, x.grad))
    for what, *pair in zip(("y", "dx"), *results, strict=True):
        torch.testing.assert_close(*pair, rtol=2e-2, atol=2e-2 * pair[1].abs().max().item(), msg=what)
    assert_same(ours.running_var, native.running_var, "running_var")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=names)
@pytest.mark.parametrize("parameters", ["float32", "of x"])
def test_inplace_abn_86_120_150_16_bit_input(backend, dtype, parameters):
    ours, native = BatchNormAct2d(3, activation=None), nn.BatchNorm2d(3)
    if parameters == "of x":
        ours, native = ours.to(dtype), native.to(dtype)
    results = []
    for module in (ours, native):
        x = randn(4, 3, 5, 5).to(dtype).requires_grad_()
        y = module(x)
        y.backward(randn(4, 3, 5, 5, seed=1).to(dtype))
        results.append((y, x.grad, module.weight.grad, module.bias.grad, *module.buffers()))
    for pair in zip(*results, strict=True):
        assert_same(*pair, "16-bit", scale=8.0)


# The state


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=names)
def test_pytorch_1381_one_value_leaves_no_nan_in_running_var(backend, shape):
    layer = BatchNormAct1d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(randn(*shape))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_pytorch_70444_the_counter_is_incremented_in_place(backend, momentum):
    """A CUDA graph replays writes to addresses: a new counter would stay at 1."""
    layer = BatchNormAct2d(3, momentum=momentum)
    before = [(id(buffer), buffer.data_ptr()) for buffer in layer.buffers()]
    for step in range(3):
        layer(randn(4, 3, 5, 5, seed=step))
    assert [(id(buffer), buffer.data_ptr()) for buffer in layer.buffers()] == before
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.stricter_than_native("batch_norm updates the running statistics without telling autograd (#73050)")
def test_pytorch_73050_autograd_knows_that_the_running_statistics_changed(backend):
    layer, factor = BatchNormAct2d(3), randn(3).requires_grad_()
    for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
        product = (buffer * factor).sum()
        layer(randn(4, 3, 5, 5))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("training", [True, False])
def test_pytorch_73050_the_schema_declares_what_is_written(training):
    """opcheck (test_operators.py) proves that nothing else is."""
    schema = torch.ops.normfused.batch_norm_act.default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.stricter_than_native("batch_norm saves the running buffers themselves (#175024)")
def test_pytorch_175024_22095_two_evaluations_before_a_backward_that_sees_new_buffers(backend):
    """DistributedDataParallel broadcasts the buffers, in place, before every forward."""
    layer, x = BatchNormAct2d(3).eval(), randn(4, 3, 5, 5).requires_grad_()
    y = layer(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with torch.no_grad():
        layer.running_mean.copy_(randn(3))
        layer.running_var.copy_(randn(3, seed=1).abs() + 0.5)
    layer(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_pytorch_96136_checkpointing_counts_a_batch_once(backend, reentrant):
    """A checkpointed segment runs forward twice; the batch is in the statistics after the first (native: twice)."""
    ours, native = BatchNormAct2d(3), nn.BatchNorm2d(3)
    x = randn(4, 3, 5, 5).requires_grad_()
    activate(checkpoint(ours, x, use_reentrant=reentrant), None).sum().backward()
    native(x)
    assert ours.num_batches_tracked == 1
    assert_same(ours.running_mean, native.running_mean, "running_mean")
    assert_same(ours.running_var, native.running_var, "running_var")
