"""Tensors in every layout, the tolerances, and the comparison that the tests share."""

import pytest
import torch
import torch.nn.functional as F

from normfused import native, reference

ACTIVATIONS = (None, *native.ACTIVATIONS)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Where an activation's gradient jumps.
KINKS = {
    None: (),
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "silu": (),
    "hardswish": (-3.0, 3.0),
    "sigmoid": (),
    "leaky_relu": (0.0,),
}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# (rtol, atol) against native; atol is relative to the largest value, or the ``scale`` of a call, where that is above
# 1, for z and dx are differences of larger numbers. test_accuracy.py holds the finer comparison, with float64.
TOLERANCE = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1.6e-2, 8e-3),
    torch.float16: (2e-3, 1e-3),
}

# Whether pytest was given --all: conftest.py sets it, before a test module is read.
everything = False


def examples(number):
    """How many random examples are tried: a sixth of ``number`` without --all."""
    return number if everything else max(number // 6, 1)


training_or_eval = pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))


def interpreted(backend):
    """Whether ``backend`` runs kernels on the CPU that are written for a GPU, a thousand times slower."""
    return backend == "emulated" or (backend == "triton" and not torch.accelerator.is_available())


def names(values):
    """Readable ids for dtypes, shapes, classes and activations."""
    return getattr(values, "__name__", str(values).replace("torch.", "").replace(" ", ""))


def randn(*shape, dtype=torch.float32, seed=0):
    """Normal numbers that depend on the seed alone, on whatever device is the default."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def _channels_last(t):
    return t.clone(memory_format=CHANNELS_LAST[t.dim()])


def _sliced(t):
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    wide[..., 1::2] = t
    return wide[..., 1::2]


def _channel_slice(t):
    wide = t.new_full((t.shape[0], t.shape[1] + 2, *t.shape[2:]), float("nan"))
    if t.dim() in CHANNELS_LAST:
        wide = _channels_last(wide)
    wide[:, 1:-1] = t
    return wide[:, 1:-1]


def _offset(t):
    flat = t.new_full((t.numel() + 1,), float("nan"))
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def _channels_last_offset(t):
    strides = _channels_last(t).stride()
    flat = t.new_full((t.numel() + 1,), float("nan"))
    return flat.as_strided(t.shape, strides, 1).copy_(t)


def _last_to_first(t):
    return tuple(reversed(range(t.dim())))


_LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "channel_slice": _channel_slice,
    "permuted": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(_last_to_first(t)).contiguous().permute(_last_to_first(t)),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "expanded_sample": lambda t: t[:1].expand(t.shape),
    "offset": _offset,
    "channels_last_offset": _channels_last_offset,
}


def layouts(dim):
    """Names of the layouts a tensor of ``dim`` dimensions can have, and still have a variance."""
    excluded = () if dim in CHANNELS_LAST else ("channels_last", "channels_last_offset")
    if dim == 2:
        excluded += ("expanded", "expanded_sample")
    return [name for name in _LAYOUTS if name not in excluded]


def in_layout(t, layout):
    """``t`` laid out as named, its values the same (an expanded one repeats its first values)."""
    return _LAYOUTS[layout](t.detach().clone())


def memory_format(t):
    """The memory format that an output computed from ``t`` has, by PyTorch's rule."""
    return torch._prims_common.suggest_memory_format(t)


def assert_memory_format(t, like):
    """``t`` is dense in the memory format of ``like``."""
    assert t.is_contiguous(memory_format=memory_format(like)), f"{t.stride()} for input's {like.stride()}"


def assert_same(actual, native, what="", *, formats=True, scale=1.0):
    """Values within the tolerance, equal dtype and shape, and every memory format that native's has."""
    if native is None:
        assert actual is None, what
        return
    rtol, atol = TOLERANCE.get(native.dtype, (0, 0))
    if native.is_floating_point() and native.numel():
        atol *= max(scale, native.detach().double().nan_to_num(0, 0, 0).abs().max().item())
    torch.testing.assert_close(actual, native, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}")
    for format in (torch.contiguous_format, CHANNELS_LAST.get(native.dim())) if formats else ():
        if format is not None and native.is_contiguous(memory_format=format):
            assert actual.is_contiguous(memory_format=format), f"{what}: {actual.stride()}, {native.stride()}"


def activate(z, activation):
    """``activation(z)`` by torch.nn.functional."""
    return native.activate(z, activation)


def away_from_kinks(z, activation, distance):
    """Where ``z`` is further than ``distance`` from every kink of the activation."""
    keep = torch.ones_like(z, dtype=torch.bool)
    for kink in KINKS[activation]:
        keep &= (z - kink).abs() > distance
    return keep


def native_batch_norm_act(x, rm, rv, weight, bias, training, momentum, eps, activation, residual=None):
    """What the layer means, spelt with torch.nn.functional."""
    z = F.batch_norm(x, rm, rv, weight, bias, training, momentum, eps)
    return activate(z if residual is None else z + residual, activation)


def pre_activation(x, weight, bias, residual, eps, mean=None, var=None):
    """z in float64; of the batch's own statistics unless ``mean`` and ``var`` are given."""
    x, weight, bias, residual, mean, var = (
        None if t is None else t.detach().double() for t in (x, weight, bias, residual, mean, var)
    )
    if mean is None:
        mean, var = reference.batch_statistics(x)
    return reference.batch_norm_act(x, weight, bias, residual, mean, var, eps, None)
