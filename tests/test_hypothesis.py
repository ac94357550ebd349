"""Random calls of every operator, forward and backward, against float64.

50 for each family and dtype, 300 with --all; ``--hypothesis-profile=deep`` makes it 5,000, and new ones every time. A
failure is shrunk, and printed with the command that repeats it.
"""

import inspect
import math

import pytest
import torch
from helpers import ACTIVATIONS, FLOATS, examples, in_layout, interpreted, layouts, names, randn
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from test_accuracy import check_batch_norm, check_group_norm

import normfused
from normfused.functional import batch_norm_act, group_norm_act

CHANNELS = (1, 2, 3, 5, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)
SPATIAL = (1, 2, 3, 7, 49, 1023, 1024, 1025)
BATCHES = (1, 2, 3, 5, 8)
# Values of x, as (name, whether float16 and bfloat16 can tell them from a constant).
VALUES = (
    *("normal", "constant", "zeros", "mean/sigma 1e2", "mean/sigma 1e4", "mean/sigma 1e6"),
    *("denormal", "huge", "one inf", "one -inf", "one nan"),
)
MOST_ELEMENTS, MOST_INTERPRETED = 1 << 14, 1 << 10


def values(kind, shape, dtype, seed):
    x = randn(*shape, seed=seed)
    largest = 6e4 if dtype == torch.float16 else 1e30
    if kind in ("constant", "zeros"):
        x = torch.full(shape, 3.14 if kind == "constant" else 0.0)
    elif kind.startswith("mean/sigma"):
        x = x + min(float(kind.split()[1]), largest / 2)
    elif kind == "denormal":
        x = x * torch.finfo(dtype).tiny / 8 if dtype != torch.float64 else x.double() * 1e-310
    elif kind == "huge":
        x = x.clamp(-1, 1) * largest
    elif kind.startswith("one"):
        x.view(-1)[seed % x.numel()] = float(kind.split()[1])
    return x.to(dtype)


def factors(size, parts):
    """``size`` as a product of ``parts`` numbers, the larger ones last."""
    shape = []
    for left in range(parts, 1, -1):
        divisor = next(d for d in range(math.isqrt(size) if left > 1 else size, 0, -1) if size % d == 0)
        shape.append(divisor)
        size //= divisor
    return (*shape, size) if parts else ()


@st.composite
def shapes(draw, most, channels=CHANNELS):
    c = draw(st.sampled_from([c for c in channels if 2 * c <= most]))
    s = draw(st.sampled_from([s for s in SPATIAL if 2 * c * s <= most]))
    n = draw(st.sampled_from([n for n in BATCHES if n * c * s <= most]))
    dims = draw(st.integers(0 if s == 1 else 1, 3))
    return (n, c, *factors(s, dims))


def parameters(shape, parameter_dtype, has_weight, has_bias, seed):
    weight = randn(shape[1], dtype=parameter_dtype, seed=seed + 1).requires_grad_() if has_weight else None
    bias = randn(shape[1], dtype=parameter_dtype, seed=seed + 2).requires_grad_() if has_bias else None
    return weight, bias


def layout_of(shape, layout):
    """``layout``, or what is left of it in a shape that cannot have it, or would lose its variance."""
    possible = layouts(len(shape))
    lost = (layout == "expanded" and shape[-1] == shape[0] * math.prod(shape[2:])) or (
        layout == "expanded_sample" and math.prod(shape[2:]) == 1
    )
    return layout if layout in possible and not lost else "contiguous"


def batch_norm(
    dtype, shape, kind, layout, dy_layout, residual_layout, activation, training, weight, bias, tracks, wide, seed
):
    """One call of batch_norm_act and its backward: within the rule of test_accuracy.py, or the error that is due."""
    parameter_dtype = torch.float32 if wide and dtype in (torch.float16, torch.bfloat16) else dtype
    x = in_layout(values(kind, shape, dtype, seed), layout_of(shape, layout)).requires_grad_()
    affine = parameters(shape, parameter_dtype, weight, bias, seed)
    if training and x.numel() == shape[1]:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            batch_norm_act(x, None, None, *affine, training=True, activation=activation)
        return
    residual = None
    if residual_layout is not None:
        residual = in_layout(randn(*shape, dtype=dtype, seed=seed + 3), layout_of(shape, residual_layout))
        residual = residual.requires_grad_()
    dy_layout = layout_of(shape, dy_layout)
    check_batch_norm(x, *affine, residual, activation, training, dy_layout, tracks or not training)


def group_norm(dtype, shape, groups, kind, layout, dy_layout, activation, weight, bias, wide, seed):
    """The same for group_norm_act; ``groups`` chooses among the divisors of C."""
    parameter_dtype = torch.float32 if wide and dtype in (torch.float16, torch.bfloat16) else dtype
    divisors = [g for g in range(1, shape[1] + 1) if shape[1] % g == 0]
    num_groups = divisors[groups % len(divisors)]
    x = in_layout(values(kind, shape, dtype, seed), layout_of(shape, layout)).requires_grad_()
    affine = parameters(shape, parameter_dtype, weight, bias, seed)
    if x.numel() == num_groups:
        with pytest.raises(ValueError, match="more than 1 value per group"):
            group_norm_act(x, num_groups, *affine, activation=activation)
        return
    check_group_norm(x, num_groups, *affine, activation, layout_of(shape, dy_layout))


COMMON = dict(
    kind=st.sampled_from(VALUES),
    layout=st.sampled_from(layouts(4)),
    dy_layout=st.sampled_from(layouts(4)),
    activation=st.sampled_from(ACTIVATIONS),
    weight=st.booleans(),
    bias=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
)
BATCH_NORM = dict(
    residual_layout=st.sampled_from((None, None, *layouts(4))), training=st.booleans(), tracks=st.booleans()
)
GROUP_NORM = dict(groups=st.integers(0, 15))


def explore(check, dtype, backend, **strategies):
    """Runs ``check`` on the examples that the profile asks for, and few where kernels are interpreted."""
    slow = interpreted(backend)
    ran = 0

    def run(**arguments):
        nonlocal ran
        ran += 1
        call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        note(
            "PYTHONPATH=tests python -c 'import torch, normfused, test_hypothesis as t\n"
            f"with normfused.use_backend({backend!r}): t.{check.__name__}({dtype}, {call})'"
        )
        check(dtype, **arguments)

    # given() reads the names of the arguments from the signature.
    run.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in strategies]
    )
    deep = settings.get_current_profile_name() == "deep"
    chosen = settings(
        max_examples=(100 if slow else 5000) if deep else examples(12 if slow else 300),
        derandomize=not deep,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    chosen(given(**strategies)(run))()
    return ran


def sizes(backend):
    return MOST_INTERPRETED if interpreted(backend) else MOST_ELEMENTS


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_batch_norm(backend, dtype, record_property):
    if backend == "torch":
        pytest.skip("native's error is what the others are measured with")
    ran = explore(batch_norm, dtype, backend, shape=shapes(sizes(backend)), **COMMON, **BATCH_NORM)
    record_property("cases", ran)
    assert ran >= examples(12 if interpreted(backend) else 300)


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
def test_group_norm(backend, dtype, record_property):
    if backend == "torch":
        pytest.skip("native's error is what the others are measured with")
    ran = explore(group_norm, dtype, backend, shape=shapes(sizes(backend)), **COMMON, **GROUP_NORM)
    record_property("cases", ran)
    assert ran >= examples(12 if interpreted(backend) else 300)


# What it found: the call, as it was printed, and what was wrong.
FOUND = {
    "the mean's rounding, through z and hardswish, in dbias": lambda dtype: batch_norm(
        dtype, shape=(1, 31, 2), kind="mean/sigma 1e2", layout="contiguous", dy_layout="contiguous",
        activation="hardswish", weight=False, bias=True, wide=False, seed=1, residual_layout=None, training=True,
        tracks=False,
    ),
    "the mean's rounding, where the terms of dx cancel": lambda dtype: group_norm(
        dtype, shape=(1, 1, 2), kind="mean/sigma 1e4", layout="contiguous", dy_layout="contiguous", activation=None,
        weight=False, bias=False, wide=False, seed=606, groups=0,
    ),
    "an infinity in one channel, and the rule for the other": lambda dtype: batch_norm(
        dtype, shape=(1, 2, 2), kind="one inf", layout="contiguous", dy_layout="contiguous", activation=None,
        weight=False, bias=False, wide=False, seed=3, residual_layout=None, training=True, tracks=False,
    ),
    "an infinity in one group, and the rule for the other": lambda dtype: group_norm(
        dtype, shape=(2, 1), kind="one inf", layout="contiguous", dy_layout="contiguous", activation=None,
        weight=False, bias=False, wide=False, seed=0, groups=0,
    ),
    "products below the smallest normal number, in dweight of a batch": lambda dtype: batch_norm(
        dtype, shape=(8, 1, 1024), kind="denormal", layout="contiguous", dy_layout="contiguous", activation="relu",
        weight=True, bias=False, wide=False, seed=1, residual_layout="contiguous", training=True, tracks=False,
    ),
    "products below the smallest normal number, in dweight of groups": lambda dtype: group_norm(
        dtype, shape=(3, 1, 3), kind="denormal", layout="contiguous", dy_layout="contiguous", activation="silu",
        weight=True, bias=True, wide=False, seed=0, groups=0,
    ),
    "the same, of two values": lambda dtype: group_norm(
        dtype, shape=(2, 1, 2), kind="denormal", layout="contiguous", dy_layout="contiguous", activation="leaky_relu",
        weight=True, bias=True, wide=False, seed=3, groups=0,
    ),
    "z rounded to 16 bits in the tail of sigmoid": lambda dtype: batch_norm(
        dtype, shape=(1, 5, 7), kind="mean/sigma 1e2", layout="contiguous", dy_layout="contiguous",
        activation="sigmoid", weight=True, bias=False, wide=True, seed=672, residual_layout="contiguous",
        training=False, tracks=False,
    ),
    "the difference of sigmoid and 1": lambda dtype: batch_norm(
        dtype, shape=(2, 3, 7), kind="mean/sigma 1e2", layout="contiguous", dy_layout="contiguous",
        activation="sigmoid", weight=True, bias=False, wide=False, seed=3, residual_layout="contiguous",
        training=False, tracks=False,
    ),
    "neighbours that are alike, as a sample of the mean": lambda dtype: group_norm(
        dtype, shape=(2, 64, 49), kind="normal", layout="expanded", dy_layout="contiguous", activation=None,
        weight=False, bias=False, wide=False, seed=1, groups=0,
    ),
    "two of fourteen rows, as a sample of the mean": lambda dtype: batch_norm(
        dtype, shape=(2, 64, 1, 7), kind="normal", layout="channels_last", dy_layout="contiguous", activation=None,
        weight=False, bias=False, wide=False, seed=373, residual_layout=None, training=True, tracks=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("what", FOUND)
def test_what_the_deep_profile_found(backend, what, dtype):
    if backend == "torch":
        pytest.skip("native's error is what the others are measured with")
    FOUND[what](dtype)


def test_a_failure_is_shrunk_and_printed_with_a_command():
    def wrong(dtype, shape, training):
        assert shape[1] < 33 or not training

    strategies = dict(shape=shapes(MOST_ELEMENTS), training=st.booleans())
    with normfused.use_backend("torch"), pytest.raises(AssertionError) as failure:
        explore(wrong, torch.float32, "torch", **strategies)
    printed = "\n".join(failure.value.__notes__)
    assert "shape=(1, 33)" in printed
    assert "t.wrong(torch.float32, " in printed
    assert "test_hypothesis as t" in printed
