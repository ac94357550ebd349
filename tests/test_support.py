"""README's support matrix: every cell is what the tests of its row find, on the backend of its column."""

import contextlib
import functools
from pathlib import Path

import pytest
import torch
from helpers import TOLERANCE, randn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normfused

README = Path(__file__).parent.parent / "README.md"
LAYOUTS = {"contiguous": (4, 6, 3, 3), "channels_last": (4, 6, 3, 3), "channels_last_3d": (3, 6, 2, 2, 2)}
FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
# The columns, and what a cell says where the backend's own kernel does all of the work.
COLUMNS = {"extension": "✓", "emulated": "emulator", "triton": "interpreter", "torch": "composed"}


class _Called(TorchDispatchMode):
    """Notes which operators compute."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _compare(ours, theirs, x, *others, dtype=torch.float32):
    """Same outputs and gradients; the names of the operators that ours called."""
    called = _Called()
    results = []
    for function in (ours, theirs):
        inputs = [t.detach().clone().requires_grad_() for t in (x, *others)]
        with called if function is ours else contextlib.nullcontext():
            y = function(*inputs)
            y.backward(randn(*y.shape, dtype=y.dtype, seed=7))
        results.append([y.detach(), *(t.grad for t in inputs)])
    rtol, atol = TOLERANCE[dtype]
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=4 * atol)
    return called.names


def _pair(dtype=torch.float32, dims=2, **options):
    """A BatchNormAct and its twin in torch.nn, with parameters that do something."""
    ours = getattr(normfused, f"BatchNormAct{dims}d")(6, **options).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(randn(6, seed=1) + 1)
        ours.bias.copy_(randn(6, seed=2))
    theirs = getattr(nn, f"BatchNorm{dims}d")(6, momentum=ours.momentum).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _relu6(norm):
    return lambda x: nn.functional.relu6(norm(x))


def _dtype_and_layout(dtype, layout):
    shape = LAYOUTS[layout]
    x = randn(*shape, dtype=dtype).to(memory_format=FORMATS.get(layout, torch.contiguous_format))
    ours, norm = _pair(dtype, len(shape) - 2)
    names = _compare(ours, _relu6(norm), x, dtype=dtype)
    torch.testing.assert_close(ours.running_var, norm.running_var)
    group, native = normfused.GroupNormAct(2, 6, activation="silu", dtype=dtype), nn.GroupNorm(2, 6, dtype=dtype)
    names |= _compare(group, lambda x: nn.functional.silu(native(x)), x, dtype=dtype)
    assert ours(x).is_contiguous(memory_format=FORMATS.get(layout, torch.contiguous_format))
    return names


def _each_sample_by_itself():
    x = randn(4, 6, 3, 3)
    instance, layer = nn.InstanceNorm2d(6, affine=True), nn.LayerNorm(3)
    names = _compare(
        normfused.InstanceNormAct2d(6, affine=True, activation="silu"), lambda x: nn.functional.silu(instance(x)), x
    )
    return names | _compare(normfused.LayerNormAct(3, activation="relu"), lambda x: nn.functional.relu(layer(x)), x)


def _wide_parameters():
    ours, norm = _pair()
    x = randn(4, 6, 3, 3, dtype=torch.bfloat16)
    return _compare(ours, _relu6(norm), x, dtype=torch.bfloat16)


def _evaluation():
    ours, norm = _pair()
    ours.eval(), norm.eval()
    return _compare(ours, _relu6(norm), randn(4, 6, 3, 3))


def _cumulative():
    ours, norm = _pair(momentum=None)
    names = set()
    for seed in range(2):
        names |= _compare(ours, _relu6(norm), randn(4, 6, 3, 3, seed=seed))
    torch.testing.assert_close(ours.running_mean, norm.running_mean)
    return names


def _residual():
    ours, norm = _pair(activation="relu")
    x, residual = randn(4, 6, 3, 3), randn(4, 6, 3, 3, seed=3)
    return _compare(ours, lambda x, r: nn.functional.relu(norm(x) + r), x, residual)


def _pre_activation(name, activation):
    ours, norm = _pair(activation=activation, pre_activation=name)
    before, after = (getattr(nn.functional, each or "", lambda x: x) for each in (name, activation))
    return _compare(ours, lambda x: after(norm(before(x))), randn(4, 6, 3, 3))


def _compiled():
    ours, norm = _pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = randn(4, 6, 3, 3)
    torch.testing.assert_close(compiled(x), nn.functional.relu6(norm(x)))
    return _compare(ours, _relu6(norm), x)


def _exported():
    ours, norm = _pair()
    x = randn(4, 6, 3, 3)
    program = torch.export.export(ours.eval(), (x,))
    torch.testing.assert_close(program.module()(x), nn.functional.relu6(norm.eval()(x)))
    return {str(node.target) for node in program.graph.nodes}


def _double_backward():
    ours, norm = _pair(activation="silu")
    x = randn(4, 6, 3, 3).double().requires_grad_()
    ours, norm = ours.double(), norm.double()
    called, second = _Called(), []
    for function in (ours, lambda x: nn.functional.silu(norm(x))):
        with called if function is ours else contextlib.nullcontext():
            y = function(x)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*second)
    return called.names


def _recomputed():
    ours, norm = _pair()
    conv = nn.Conv2d(6, 6, 1)

    def recomputed(x):
        with normfused.recompute_activations():
            return conv(ours(x))

    return _compare(recomputed, lambda x: conv(nn.functional.relu6(norm(x))), randn(4, 6, 3, 3))


def _transformed():
    ours, norm = _pair()
    ours.eval(), norm.eval()
    x = randn(3, 4, 6, 3, 3)
    with _Called() as called:
        y = torch.func.vmap(lambda x: ours(x))(x)
    torch.testing.assert_close(y, torch.stack([nn.functional.relu6(norm(part)) for part in x]))
    return called.names


DTYPES = ("float32", "float64", "bfloat16", "float16")
ROWS = {
    f"{dtype}, {layout}": functools.partial(_dtype_and_layout, getattr(torch, dtype), layout)
    for dtype in DTYPES
    for layout in LAYOUTS
} | {
    "InstanceNorm and LayerNorm": _each_sample_by_itself,
    "16-bit input, float32 parameters": _wide_parameters,
    "evaluation and frozen statistics": _evaluation,
    "`momentum=None` (cumulative average)": _cumulative,
    "`residual` before the activation": _residual,
    "`pre_activation`: relu or relu6, then the norm alone": functools.partial(_pre_activation, "relu6", None),
    "`pre_activation`: others, or with an activation or residual": functools.partial(_pre_activation, "silu", "relu"),
    "`torch.compile(fullgraph=True)`": _compiled,
    "`torch.export`": _exported,
    "gradient of the gradient": _double_backward,
    "`recompute_activations`": _recomputed,
    "`torch.func`, forward-mode differentiation": _transformed,
}


def _table():
    """{(row, backend): cell} of README's support matrix."""
    lines = README.read_text().partition("## What is supported")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [row for row in rows if len(row) == 1 + len(COLUMNS)]
    return {(row[0], name): cell for row in rows[2:] for name, cell in zip(COLUMNS, row[1:], strict=True)}


def test_the_matrix_has_these_rows():
    assert {row for row, _ in _table()} == set(ROWS)


@pytest.mark.thorough(interpreted=True)
@pytest.mark.parametrize("row", ROWS)
def test_cell(row, backend):
    names = ROWS[row]()
    own = any("normfused" in name for name in names)
    # What another operator of PyTorch's does before or after is composed.
    others = ("aten.relu", "aten.hardtanh", "aten.silu", "aten.native_batch", "aten.native_layer")
    composed = any(name.startswith(others) for name in names)
    if torch.get_default_device().type == "cpu":
        assert _table()[row, backend] == (COLUMNS[backend] if own and not composed else "composed")
