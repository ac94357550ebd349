"""PyTorch's own test inputs (OpInfo, ModuleInfo) through our functions and modules.

torch.testing._internal.common_methods_invocations and common_modules hold what PyTorch tests itself with.
How many samples there are depends on the version of torch, so only a minimum is asserted.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOATS, activate, assert_same, away_from_kinks, in_layout, interpreted, layouts, names, randn
from torch import nn

import normfused
from normfused.functional import batch_norm_act, group_norm_act, instance_norm_act, layer_norm_act

# They need expecttest.
invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
modules = pytest.importorskip("torch.testing._internal.common_modules")
utils = pytest.importorskip("torch.testing._internal.common_utils")

OPS = {op.name: op for op in invocations.op_db if not op.variant_test_name}
MODULES = {module.module_cls: module for module in modules.module_db}
FUSED = {
    nn.BatchNorm1d: normfused.BatchNormAct1d,
    nn.BatchNorm2d: normfused.BatchNormAct2d,
    nn.BatchNorm3d: normfused.BatchNormAct3d,
    nn.GroupNorm: normfused.GroupNormAct,
    nn.InstanceNorm1d: normfused.InstanceNormAct1d,
    nn.InstanceNorm2d: normfused.InstanceNormAct2d,
    nn.InstanceNorm3d: normfused.InstanceNormAct3d,
    nn.LayerNorm: normfused.LayerNormAct,
}
# Ours, native's, and how many samples there are at least.
FUNCTIONS = {
    "nn.functional.batch_norm": (batch_norm_act, F.batch_norm, 10),
    "nn.functional.group_norm": (group_norm_act, F.group_norm, 10),
    "nn.functional.instance_norm": (instance_norm_act, F.instance_norm, 8),
    "nn.functional.layer_norm": (layer_norm_act, F.layer_norm, 6),
}

functions = pytest.mark.parametrize("op_name", FUNCTIONS, ids=lambda name: name.split(".")[-1])
activations = pytest.mark.parametrize("activation", [None, "relu6"])
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=names)


def device():
    """Where the fixture ``backend`` has tensors made."""
    return str(torch.get_default_device())


def gradients(y, dy, tensors):
    """The gradient of every tensor that wants one."""
    wanted = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(y, wanted, dy, allow_unused=True)


def upstream(y, native_z, activation):
    """A gradient for ``y``, and the scale of the gradients that follow from it.

    It is 0 where z is NaN, for native's relu6 passes some of it there and blocks some, and at the kinks, where the
    last bit of z decides.
    """
    z = native_z.detach().double()
    largest = z.nan_to_num(0, 0, 0).abs().max().item() if z.numel() else 0
    keep = away_from_kinks(z, activation, 4 * torch.finfo(y.dtype).eps * largest)
    return randn(*y.shape, dtype=y.dtype).masked_fill(~keep | z.isnan(), 0), max(1.0, largest)


def all_arguments(call):
    args, kwargs = call
    return [*args, *(kwargs[name] for name in sorted(kwargs))]


def compare(ours, native, activation, call):
    """Runs ours and native's on copies of a call (args, kwargs): all that they compute or raise is equal."""
    native_call, our_call = copy.deepcopy(call), copy.deepcopy(call)
    try:
        native_z = native(*native_call[0], **native_call[1])
    except Exception as error:
        with pytest.raises(type(error)):
            ours(*our_call[0], **our_call[1], activation=activation)
        return
    native_y = activate(native_z, activation)
    y = ours(*our_call[0], **our_call[1], activation=activation)
    assert_same(y, native_y, "y")
    dy, scale = upstream(native_y, native_z, activation)
    native_grads = gradients(native_y, dy, all_arguments(native_call))
    for index, grads in enumerate(zip(gradients(y, dy, all_arguments(our_call)), native_grads, strict=True)):
        assert_same(*grads, f"gradient {index}", scale=scale)
    for index, pair in enumerate(zip(all_arguments(our_call), all_arguments(native_call), strict=True)):
        if isinstance(pair[1], torch.Tensor):
            assert_same(pair[0].detach(), pair[1].detach(), f"argument {index} afterwards", formats=False)


# Those that keep every value: what repeats one would change the sample.
LAYOUTS = ("as_given", "noncontiguous", "channels_last", "sliced", "permuted", "offset", "channels_last_offset")


def laid_out(x, layout):
    """``x`` as PyTorch gives it, or in one of our layouts."""
    if x.dim() < 2 or layout not in layouts(x.dim()) or x.numel() == 0:
        return x
    return in_layout(x, layout).requires_grad_(x.requires_grad)


def some_of(samples, backend, layout):
    """All; where kernels are interpreted and the layout is one of ours every fourth."""
    return list(samples)[:: 4 if interpreted(backend) and layout not in LAYOUTS[:2] else 1]


@functions
@activations
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_samples(backend, op_name, activation, dtype, layout, record_property):
    ours, native, minimum = FUNCTIONS[op_name]
    torch.manual_seed(0)
    samples = list(OPS[op_name].sample_inputs(device(), dtype, requires_grad=True))
    assert len(samples) >= minimum
    samples = some_of(samples, backend, layout)
    for sample in samples:
        if layout == "noncontiguous":
            sample = sample.noncontiguous()
        sample.input = laid_out(sample.input, layout)
        compare(ours, native, activation, ((sample.input, *sample.args), dict(sample.kwargs)))
    record_property("cases", len(samples))


@functions
@activations
def test_op_samples_without_gradients(backend, op_name, activation):
    ours, native, minimum = FUNCTIONS[op_name]
    count = 0
    torch.manual_seed(0)
    for sample in OPS[op_name].sample_inputs(device(), torch.float32, requires_grad=False):
        args, our_args = (sample.input, *sample.args), copy.deepcopy((sample.input, *sample.args))
        native_y = activate(native(*args, **sample.kwargs), activation)
        assert_same(ours(*our_args, **sample.kwargs, activation=activation), native_y, "y")
        for argument, native_argument in zip(our_args, args, strict=True):
            if isinstance(native_argument, torch.Tensor):
                assert_same(argument, native_argument, "argument afterwards", formats=False)
        count += 1
    assert count >= minimum


@activations
def test_op_error_inputs(backend, activation):
    op = OPS["nn.functional.group_norm"]
    torch.manual_seed(0)
    errors = list(op.error_inputs(device()))
    assert len(errors) >= 2
    for error in errors:
        sample = error.sample_input
        if "HxW" in error.error_regex and backend == "extension":
            # From torch 2.14 on native refuses an empty group; here it is as empty as any other input.
            continue
        with pytest.raises(error.error_type):
            group_norm_act(sample.input, *sample.args, **sample.kwargs, activation=activation)


def module_pair(module_cls, constructor_input, activation, dtype, training):
    """(native, ours) with the same random parameters and running statistics."""
    args, kwargs = constructor_input.args, constructor_input.kwargs
    native = module_cls(*args, **kwargs, dtype=dtype)
    ours = FUSED[module_cls](*args, **kwargs, dtype=dtype, activation=activation)
    for index, (name, tensor) in enumerate(native.state_dict().items()):
        if tensor.is_floating_point():
            values = randn(*tensor.shape, dtype=dtype, seed=index)
            tensor.copy_(values.abs() + 0.5 if name == "running_var" else values)
    ours.load_state_dict(native.state_dict(), strict=True)
    return native.train(training), ours.train(training)


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("module_cls", FUSED, ids=lambda module: module.__name__)
@activations
@dtypes
@pytest.mark.parametrize("training", [True, False], ids=("train", "eval"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_module_inputs(backend, module_cls, activation, dtype, training, layout, record_property):
    if module_cls is nn.LayerNorm and dtype.itemsize == 2:
        pytest.skip(
            "native adds the gradients of a batch in 16 bits; test_instance_layer_norm.py compares with float64"
        )
    # Native's InstanceNorm is always contiguous, ours keeps the memory format.
    formats = not issubclass(module_cls, nn.modules.instancenorm._InstanceNorm)
    info = MODULES[module_cls]
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device=device(), dtype=dtype, requires_grad=True, training=training)
    assert len(inputs) >= 6
    inputs = some_of(inputs, backend, layout)
    record_property("cases", len(inputs))
    for module_input in inputs:
        native, ours = module_pair(module_cls, module_input.constructor_input, activation, dtype, training)
        forward_input = module_input.forward_input
        x = forward_input.args[0]
        if layout == "noncontiguous":
            x = utils.noncontiguous_like(x).detach().requires_grad_(x.requires_grad)
        args = laid_out(x, layout), *forward_input.args[1:]
        our_args = copy.deepcopy(args)
        native_z = native(*args)
        native_y = activate(native_z, activation)
        y = ours(*our_args)
        assert_same(y, native_y, module_input.desc, formats=formats)
        dy, scale = upstream(native_y, native_z, activation)
        wanted = (*our_args, *ours.parameters()), (*args, *native.parameters())
        grads, native_grads = gradients(y, dy, wanted[0]), gradients(native_y, dy, wanted[1])
        for grad, native_grad in zip(grads, native_grads, strict=True):
            assert_same(grad, native_grad, f"{module_input.desc}: gradient", formats=formats, scale=scale)
        for name, buffer in native.named_buffers():
            assert_same(ours.get_buffer(name), buffer, f"{module_input.desc}: {name}")


# Of the others PyTorch has no erroneous inputs.
@pytest.mark.parametrize(
    "module_cls", [m for m in FUSED if MODULES[m].module_error_inputs_func], ids=lambda module: module.__name__
)
def test_module_error_inputs(backend, module_cls):
    info = MODULES[module_cls]
    errors = info.module_error_inputs_func(
        info, device=device(), dtype=torch.float32, requires_grad=False, training=True
    )
    assert len(errors) >= 2
    for error in errors:
        constructor_input = error.module_error_input.constructor_input
        forward_input = error.module_error_input.forward_input
        if error.error_on == modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type):
                FUSED[module_cls](*constructor_input.args, **constructor_input.kwargs)
            continue
        module = FUSED[module_cls](*constructor_input.args, **constructor_input.kwargs)
        with pytest.raises(error.error_type):
            module(*forward_input.args, **forward_input.kwargs)
