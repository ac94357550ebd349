"""The same call gives the same bits: again and again, on one thread and on two."""

import pytest
import torch
from helpers import CHANNELS_LAST, examples, interpreted, names, randn

from normfused.functional import batch_norm_act, group_norm_act

# Several tasks each, so that threads have something to race for: planes, split planes, columns, split columns.
SHAPES = ((16, 24, 5, 5), (2, 3, 110, 110), (4, 40, 17, 16), (300, 70), (1, 6, 31, 33))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step(x, dy, weight, bias):
    """Training of both layers, forward and backward: all that they compute."""
    channels = x.shape[1]
    mean, var = torch.zeros(channels), torch.ones(channels)
    y = batch_norm_act(x, mean, var, weight, bias, True)
    z = group_norm_act(y, 2 - channels % 2, weight, bias, activation="silu")
    return (y, z, mean, var, *torch.autograd.grad(z, (x, weight, bias), dy))


def operands(shape, channels_last):
    x, dy = randn(*shape), randn(*shape, seed=1)
    if channels_last and len(shape) in CHANNELS_LAST:
        x, dy = (t.contiguous(memory_format=CHANNELS_LAST[len(shape)]) for t in (x, dy))
    weight, bias = (randn(shape[1], seed=seed).requires_grad_() for seed in (2, 3))
    return x.requires_grad_(), dy, weight, bias


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_repeats_are_bitwise_equal(backend, shape, channels_last, two_threads, record_property):
    """On two threads; what they are compared with was computed on one."""
    if backend == "torch":
        pytest.skip("PyTorch's own operators: theirs to promise")
    # Interpreted, a repeat takes a second, and programs run one after another anyway.
    repeats = 2 if interpreted(backend) else examples(1000)
    if interpreted(backend):
        shape = (3, *shape[1:2], *(min(size, 9) for size in shape[2:]))
    elif channels_last:
        # As many in one of the two formats.
        repeats //= 20
    arguments = operands(shape, channels_last)
    torch.set_num_threads(1)
    first = step(*arguments)
    torch.set_num_threads(2)
    for repeat in range(repeats):
        for index, pair in enumerate(zip(first, step(*arguments), strict=True)):
            assert torch.equal(*pair), f"tensor {index} in repeat {repeat}"
    record_property("cases", repeats)


def test_a_difference_of_one_bit_is_noticed():
    first = step(*operands(SHAPES[0], False))
    x, *rest = operands(SHAPES[0], False)
    with torch.no_grad():
        x.view(-1)[17] = torch.nextafter(x.view(-1)[17], torch.tensor(torch.inf))
    assert not all(torch.equal(*pair) for pair in zip(first, step(x, *rest), strict=True))
