"""Outputs of the CPU kernels that are too large for the caches, and are written past them."""

import math
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_memory_format, assert_same, examples, names

import normfused
from normfused.functional import batch_norm_act, group_norm_act


def last_cache():
    """Bytes that count, as in csrc/kernels/cpu/dispatch.cpp."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if size.exists() and (text := size.read_text().strip()).endswith("K"):
        return min(int(text[:-1]) << 10, 64 << 20)
    return (os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0) or 32 << 20


LAST_CACHE = last_cache()

pytestmark = [
    pytest.mark.skipif(LAST_CACHE > 96 << 20, reason="needs gigabytes where the last cache is this large"),
    pytest.mark.skipif(normfused.info()["extension"]["why_not"] is not None, reason="no C++ core"),
]

# (C, spatial sizes, channels_last): one for each way of dividing the work; rows that begin and end within a cache line.
CASES = {
    "planes": (37, (53, 61), False),
    "split_planes": (5, (211, 307), False),
    "columns": (521, (7, 7), False),
    "split_columns, wide rows": (3, (111, 113), True),
    "split_columns, panels": (963, (11, 7), True),
    "columns, channels_last": (4 * 1031, (1, 2), True),
}
THOROUGH = ("split_columns, panels", "split_planes", "split_columns, wide rows", "columns, channels_last")
SOME = [pytest.param(case, marks=pytest.mark.thorough if case in THOROUGH else ()) for case in CASES]


def inputs(channels, spatial, channels_last, dtype):
    element = torch.empty((), dtype=dtype).element_size()
    sample = channels * spatial[0] * spatial[1] * element
    # What a call touches, x and y at least, is more than is written through the caches: more by rows and in pieces.
    in_pieces = channels_last or spatial[0] * spatial[1] * element <= 2048
    limit = 3 * LAST_CACHE if in_pieces else LAST_CACHE // 3
    n = limit // 2 // sample + 2
    torch.manual_seed(n)
    # A million numbers over and over, at another place in each channel and sample: as many new ones take seconds.
    numbers, shape = torch.randn(3, 1_000_003).to(dtype), (n, channels, *spatial)
    x, residual, dy = (row.repeat(math.prod(shape) // len(row) + 1)[: math.prod(shape)].view(shape) for row in numbers)
    if channels_last:
        x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, dy))
    return x, residual, dy


def channel(t, c):
    return None if t is None else t[:, c : c + 1].double().contiguous()


def run(x, residual, dy, weight, bias):
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    with_residual = leaves[1] if residual is not None else None
    y = batch_norm_act(leaves[0], None, None, leaves[-2], leaves[-1], True, residual=with_residual)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
@pytest.mark.parametrize("case", SOME)
def test_equal_to_small_ones(case, dtype, with_residual):
    """Channel by channel, what the same channels give as a tensor that stays in the caches."""
    x, residual, dy = inputs(*CASES[case], dtype)
    residual = residual if with_residual else None
    channels, tolerance = x.shape[1], 2e-2 if dtype == torch.bfloat16 else 2e-5
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    with normfused.use_backend("extension"):
        results = run(x, residual, dy, weight, bias)
    outputs = dict(zip(("y", "dx", "dresidual") if with_residual else ("y", "dx"), results, strict=False))
    for what in ("y", "dx"):
        assert_memory_format(outputs[what], x)
    for c in torch.randperm(channels)[: examples(4)].tolist():
        parameters = (t[c : c + 1].double() for t in (weight, bias))
        expected = run(*(channel(t, c) for t in (x, residual, dy)), *parameters)
        for what, value in zip(outputs, expected, strict=False):
            wrong = (channel(outputs[what], c) - value).abs() > tolerance * (1 + value.abs())
            # A few z lie on the other side of a kink in float64.
            assert wrong.double().mean() <= 1e-3, (what, c)


@pytest.mark.parametrize("case", SOME)
def test_nothing_is_written_beside_them(case):
    """Every element of y and dx is written, whatever was in that memory before, by one thread as by two."""
    x, residual, dy = inputs(*CASES[case], torch.float32)
    weight, bias = torch.rand(x.shape[1]) + 0.5, torch.randn(x.shape[1])
    with normfused.use_backend("extension"):
        results = run(x, residual, dy, weight, bias)
        threads = torch.get_num_threads()
        for count in (1, 2):
            torch.set_num_threads(count)
            try:
                # What the cache of outputs hands out next holds NaN.
                again = [t.fill_(float("nan")) for t in run(x, residual, dy, weight, bias)]
                del again
                again = run(x, residual, dy, weight, bias)
            finally:
                torch.set_num_threads(threads)
            for a, b in zip(results, again, strict=True):
                assert torch.equal(a, b)


# The same for GroupNorm, with the number of groups; "split" has too few of them for every thread.
GROUP_CASES = {
    "groups": (37 * 8, (53, 61), False, 37),
    "small planes": (521 * 2, (7, 7), False, 521),
    "split": (5, (211, 307), False, 1),
    "rows": (963, (11, 7), True, 9),
    "rows of more than a tile": (4 * 1031, (3, 2), True, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)], ids=names)
@pytest.mark.parametrize("case", GROUP_CASES)
def test_group_norm(case, dtype):
    """Sample by sample, what the same sample gives alone, in the caches; by one thread as by two."""
    *geometry, groups = GROUP_CASES[case]
    x, _, dy = inputs(*geometry, dtype)

    def run(x, dy):
        x = x.detach().clone().requires_grad_()
        y = group_norm_act(x, groups, activation="relu6")
        return (y.detach(), *torch.autograd.grad(y, x, dy))

    with normfused.use_backend("extension"):
        results = run(x, dy)
        for n in (0, len(x) // 2, len(x) - 1):
            for result, alone in zip(results, run(x[n : n + 1], dy[n : n + 1]), strict=True):
                assert_memory_format(result, x)
                assert_same(result[n : n + 1], alone, case, formats=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            again = run(x, dy)
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
