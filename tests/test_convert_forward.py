"""Functional activations and residual sums: convert leaves them out of a forward exactly where a trace shows them."""

import copy
import linecache
import pickle
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from convert_models import (
    ADD_RELU,
    NONE,
    RELU6,
    BasicBlock,
    Bottleneck,
    Functional,
    FunctionalBlock,
    Siblings,
    assert_close,
    assert_converts,
    assert_left,
    assert_same,
    convert,
    model_with_forward,
    structure,
    train,
    x4,
)
from torch import nn

import normfused

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="finding a call in the source takes Python 3.11")


# Functional activations


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("F.relu(self.bn(x))", "relu"),
        ("F.relu(self.bn(x), inplace=True)", "relu"),
        ("F.relu(self.bn(x), self.in_place)", "relu"),
        ("torch.relu(self.bn(x))", "relu"),
        ("torch.relu_(self.bn(x))", "relu"),
        ("self.bn(x).relu()", "relu"),
        ("self.bn(x).relu_()", "relu"),
        ("F.relu6(self.bn(x))", "relu6"),
        ("nn.functional.relu6(self.bn(x), True)", "relu6"),
        ("F.hardtanh(self.bn(x), 0, 6)", "relu6"),
        ("F.hardtanh(self.bn(x), min_val=0.0, max_val=6.0)", "relu6"),
        ("F.hardtanh_(self.bn(x), 0.0, 6.0)", "relu6"),
        ("F.silu(self.bn(x), inplace=True)", "silu"),
        ("F.hardswish(self.bn(x))", "hardswish"),
        ("torch.sigmoid(self.bn(x))", "sigmoid"),
        ("self.bn(x).sigmoid_()", "sigmoid"),
        ("F.leaky_relu(self.bn(x))", "leaky_relu"),
        ("F.leaky_relu(self.bn(x), 0.01, True)", "leaky_relu"),
        ("self.function(self.bn(x))", "silu"),
        ("2 * F.relu(self.bn(x)) + 1", "relu"),
        ("F.hardtanh(self.bn(x))", None),
        ("F.leaky_relu(self.bn(x), 0.1)", None),
        ("F.gelu(self.bn(x))", None),
        ("F.relu(self.bn(x) * 1.5)", None),
    ],
)
def test_functional_activations(expression, name):
    model = model_with_forward(f"return {expression}")
    assert_converts(model, {"bn": f"fused with {name}" if name else NONE})


def test_statements_across_lines_and_branches():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.bn2, self.wide = nn.BatchNorm2d(4), nn.BatchNorm2d(4), True

        def forward(self, x, scale: float = 1.0, *, bias=None):
            "Docstrings, defaults and keyword arguments stay."
            out = F.relu6(
                self.bn1(
                    x,
                ),
                inplace=True,
            )
            if self.training:
                out = F.silu(self.bn2(out))
            else:
                out = F.silu(self.bn2(out)) * 1.0
            return out * scale if bias is None else out + bias

    forward = Model.forward
    model = Model().double()
    assert_converts(copy.deepcopy(model), {"bn1": RELU6, "bn2": "fused with silu"})
    native = copy.deepcopy(model)
    convert(model)
    twin = type(model).forward
    for name in ("__doc__", "__defaults__", "__kwdefaults__", "__annotations__", "__name__", "__qualname__"):
        assert getattr(twin, name) == getattr(forward, name)
    assert_close(model(x4(), 2.0, bias=1.0), native(x4(), 2.0, bias=1.0))


def test_private_names_super_and_enclosing_variables():
    scale = 3.0

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.__conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.relu6(self.bn(self.__conv(x))) * scale

    class Derived(Base):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.silu(self.norm(super().forward(x)))

    assert_converts(Base(), {"bn": RELU6})
    # Base.forward is called by another: it shows in the trace, but is not what Derived runs.
    assert_left(Derived().double(), "bn", "no line of the forward's own shows")
    model = Derived().double()
    native = copy.deepcopy(model)
    assert convert(model)["norm"] == "fused with silu"
    assert_same(model, native)


def test_activation_after_every_layer_of_a_loop():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            for name in ("bn1", "bn2", "bn3"):
                x = F.relu(getattr(self, name)(x))
            return x

    assert_converts(Model(), dict.fromkeys(("bn1", "bn2", "bn3"), "fused with relu"))


def test_activation_in_a_loop_that_also_serves_others_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            for name in ("bn", "conv"):
                x = F.relu(getattr(self, name)(x))
            return x

    assert_left(Model(), "bn", "the line with the relu after it serves others too")


@pytest.mark.parametrize(
    "use", [lambda x: x.mean(), lambda x: x.clone(), lambda x: x.view(-1).sum(), lambda x: x[0, 0]]
)
def test_functional_activation_beside_a_second_use_is_left(use):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(x)
            return F.relu(y) + use(y)

    assert_left(Model(), "bn", "its output has another use besides relu")


def test_asking_for_the_shape_is_no_use():
    body = "y = self.bn(x)", "n, c = y.shape[0], y.size(1)", "return F.relu(y).reshape(n, c, -1)"
    assert_converts(model_with_forward(*body), {"bn": "fused with relu"})


def _activate(x):
    return F.relu6(x)


class _Helpers(Siblings):
    def act6(self, x):
        return F.relu6(x)


class _ByMethod(_Helpers):
    def forward(self, x):
        return self.act6(self.bn(x))


class _ByFunction(Siblings):
    def forward(self, x):
        return _activate(self.bn(x))


class _ByLambda(Siblings):
    def forward(self, x):
        return (lambda y: F.relu6(y))(self.bn(x))


class _ByLocalName(Siblings):
    def forward(self, x):
        act = F.relu6
        return act(self.bn(x))


class _Computed(Siblings):
    def forward(self, x):
        return F.relu6(self.bn(x), inplace=bool(self.conv))


class _Decorated(Siblings):
    @torch.no_grad()
    def forward(self, x):
        return F.relu6(self.bn(x))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (_ByMethod, "no line of the forward's own shows relu6"),
        (_ByFunction, "no line of the forward's own shows relu6"),
        (_ByLambda, "no line of the forward's own shows relu6"),
        (_ByLocalName, "called in a way that is not understood"),
        (_Computed, "arguments in line"),
        (_Decorated, "no line of the forward's own shows relu6"),
    ],
)
def test_functional_activation_that_is_left(cls, reason):
    assert_left(cls(), "bn", reason)


def test_forward_that_asks_for_a_type():
    """A symbolic value is no torch.Tensor: both answers are tried."""
    act = ["if isinstance(x, torch.Tensor):", "    return F.relu(self.bn(x))", "return F.relu(self.bn(x[0]))"]
    assert_converts(model_with_forward(*act), {"bn": "fused with relu"})
    none = ["if not isinstance(x, torch.Tensor):", "    return F.relu(self.bn(x[0]))", "return self.bn(x)"]
    model = model_with_forward(*none).double()
    native = copy.deepcopy(model)
    assert_left(model, "bn", "what follows depends on the mode or on optional arguments")
    assert_same(model, native)


def test_layer_that_another_method_calls_is_left():
    """Called from outside, that method would apply the activation twice."""

    class Model(Functional):
        def features(self, x):
            return F.relu6(self.bn(x))

    class Initialised(Functional):
        def zero_init(self):
            nn.init.zeros_(self.bn.weight)

    assert_left(Model(), "bn", "Model.features calls it too")
    assert convert(Initialised()) == {"bn": RELU6}


def test_forward_without_source_is_left():
    model = model_with_forward("return F.relu6(self.bn(x))")
    del linecache.cache[type(model).forward.__code__.co_filename]
    assert_left(model, "bn", "Model.forward has no source to read")


def test_forward_whose_source_has_changed_is_left():
    model = model_with_forward("return F.relu6(self.bn(x))")
    lines = linecache.cache[type(model).forward.__code__.co_filename][2]
    lines[1] = lines[1].replace("relu6(self.bn(x))", "relu6(self.bn(x)*1)")
    assert_left(model, "bn", "Model.forward is not what its source says")


# Sums


@pytest.mark.parametrize(
    ("model", "outcomes"),
    [
        (BasicBlock, {"bn1": "fused with relu", "bn2": ADD_RELU}),
        (Bottleneck, {"bn1": "fused with relu", "bn2": ADD_RELU}),
        (lambda: Bottleneck(True), {"bn1": "fused with relu", "bn2": ADD_RELU, "downsample.1": NONE}),
        (FunctionalBlock, {"bn1": "fused with silu", "bn2": ADD_RELU}),
    ],
)
def test_residual_blocks(model, outcomes):
    assert_converts(model(), outcomes)
    assert_converts(model(), outcomes, x4())


def with_hook(module):
    module.register_forward_hook(lambda module, args, output: args[0])
    return module


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)), ADD_RELU),
        (lambda: nn.Sequential(nn.SiLU(), nn.Sequential(nn.Conv2d(4, 4, 1))), ADD_RELU),
        # What these put out may be x itself.
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity()), "which could wait for the sum"),
        (lambda: nn.Sequential(), "which could wait for the sum"),
        (lambda: with_hook(nn.Sequential(nn.Conv2d(4, 4, 1))), "which could wait for the sum"),
    ],
)
def test_sum_after_the_convolution_of_a_sequential(body, outcome):
    model = model_with_forward("return F.relu(self.bn(self.body(x)) + x)")
    model.body = body()
    model.double()
    native = copy.deepcopy(model)
    assert outcome in convert(model)["bn"]
    assert_same(model, native)


def test_of_two_normalised_operands_the_first_takes_the_sum():
    class Model(Bottleneck):
        def forward(self, x):
            return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)

    class Both(BasicBlock):
        def forward(self, x):
            return F.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))

    assert_converts(Model(), {"bn1": NONE, "bn2": ADD_RELU})
    assert_converts(Both(), {"bn1": ADD_RELU, "bn2": NONE})


@pytest.mark.parametrize(
    "expression",
    [
        "F.relu(self.bn(self.conv(x)) + x)",
        "F.relu(x + self.bn(self.conv(x)))",
        "F.relu(torch.add(x, self.bn(self.conv(x))))",
        "F.relu(x.add(self.bn(self.conv(x))))",
        "F.relu(self.bn(self.conv(x)).add_(x))",
        "(self.bn(self.conv(x)) + x).relu_()",
        # What PyTorch can add besides: a number, a broadcast tensor, another dtype.
        "F.relu(self.bn(self.conv(x)) + 0.5)",
        "F.relu(self.bn(self.conv(x)) + x.mean((0, 2, 3), keepdim=True))",
        "F.relu(self.bn(self.conv(x)) + x.sum())",
        "F.relu(self.bn(self.conv(x)) + x.float())",
        "F.relu(self.bn(self.conv(x[:2])) + x[:1])",
        "F.relu(self.bn(self.conv(x.mean(0, keepdim=True))) + x)",
    ],
)
@pytest.mark.parametrize("example_inputs", [None, x4()], ids=["symbolic", "examples"])
def test_sums(expression, example_inputs):
    assert_converts(model_with_forward(f"return {expression}"), {"bn": ADD_RELU}, example_inputs)


def test_operands_are_computed_in_their_order():
    model = model_with_forward(
        "order = []", "y = F.relu(order.append(1) or x + self.bn(order.append(2) or self.conv(x)))", "return y, order"
    )
    assert convert(model)["bn"] == ADD_RELU
    assert model(x4().float())[1] == [1, 2]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (["y = self.conv(x)", "y += self.bn(self.conv(x))", "return F.relu(y)"], "written in a way that is not"),
        (["return F.relu(self.conv(x).add_(self.bn(self.conv(x))))"], "written in a way that is not"),
        (["y = self.bn(self.conv(x)) + x", "return F.relu(y) + y"], NONE),
        (["y = self.bn(self.conv(x))", "return F.relu(y + y)"], NONE),
        (["return F.relu(operator.add(self.bn(self.conv(x)), x))"], "written in a way that is not"),
        (["y = self.conv(x)", "return F.relu(self.bn(y) + y)"], "its input is not the output of a convolution"),
        (["y = self.bn(x.view(x.shape))", "x = x * 2", "return F.relu(y + x)"], "its input is not the output of a"),
        (["return F.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))"], NONE),
        (["return F.relu(self.bn(self.conv(x)) - x)"], NONE),
        (["return F.gelu(self.bn(self.conv(x)) + x)"], NONE),
        (["return self.bn(self.conv(x)) + x"], NONE),
        (["return F.relu(self._modules['bn'](self.conv(x)) + x)"], "the layer is not called by its name"),
        (["bn = self.bn", "return F.relu(bn(self.conv(x)) + x)"], "the layer is not called by its name"),
    ],
)
def test_sums_that_are_left(body, reason):
    model = model_with_forward(*body).double()
    native = copy.deepcopy(model)
    assert_left(model, "bn", reason)
    assert_same(model, native)


def test_sum_of_a_group_norm_is_left():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x):
            return F.relu(self.norm(x) + x)

    assert convert(Model()) == {"norm": NONE}


def test_hooks_on_a_layer_before_a_sum():
    model = Bottleneck()
    model.bn2.register_forward_hook(lambda *_: None)
    outcomes = convert(model)
    assert "hooks" in outcomes["bn2"]
    assert "activation relu is used elsewhere too" in outcomes["bn1"]


def test_hooks_on_the_module_around_go_on():
    model = Bottleneck().double()
    native, seen = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.register_forward_hook(lambda module, args, y: seen.append("after") or y * 2)
    assert convert(model)["bn2"] == ADD_RELU
    assert_close(model(x4()), native(x4()) * 2)
    assert seen == ["before", "after"]


def test_frozen_statistics_stay_frozen():
    native = Bottleneck(True).double()
    for norm in (native.bn1, native.bn2, native.downsample[1]):
        norm.eval().requires_grad_(False)
    model = copy.deepcopy(native)
    assert list(convert(model).values()).count(ADD_RELU) == 1
    assert not any(norm.training for norm in (model.bn1, model.bn2, model.downsample[1]))
    assert_close(train(model), train(native))
    assert_close(model.state_dict(), native.state_dict())
    assert model.bn2.num_batches_tracked == 0


# The class


def test_module_stays_what_it_was():
    model, plain = nn.ModuleList([Bottleneck(), Bottleneck(True)]), Bottleneck
    convert(model)
    for block in model:
        assert isinstance(block, plain)
        assert type(block).__name__ == plain.__name__
        assert type(block).__qualname__ == plain.__qualname__
        assert type(block).__module__ == plain.__module__
        assert "forward" not in vars(block)
    assert type(model[0]) is type(model[1])
    normfused.revert(model)
    assert {type(block) for block in model} == {plain}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("build", [Bottleneck, FunctionalBlock, Functional])
def test_copies(build, duplicate):
    model = build().double()
    native = copy.deepcopy(model)
    convert(model)
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert_same(copy.deepcopy(twin), copy.deepcopy(native))
    # A copy's forward is about the copy.
    twin._modules = dict(twin._modules)
    twin.bn2 = twin.bn = None
    with pytest.raises(TypeError, match="NoneType"):
        twin(x4())
    assert_close(model(x4()), native(x4()))


def test_saved_model_whose_source_has_changed_refuses_to_load(monkeypatch):
    model = Functional()
    convert(model)
    saved = pickle.dumps(model)
    normfused.revert(model)
    del model
    convert_rewrite = sys.modules["normfused.convert_rewrite"]
    monkeypatch.setattr(convert_rewrite, "_SUBCLASSES", {})
    monkeypatch.setattr(Functional, "forward", BasicBlock.forward)
    with pytest.raises(RuntimeError, match=r"Functional\.forward has changed since this converted model was saved"):
        pickle.loads(saved)


def test_class_that_copies_itself_in_its_own_way():
    class Model(Functional):
        def __reduce__(self):
            return Functional, ()

    model = Model()
    convert(model)
    assert type(copy.deepcopy(model)) is Functional


def test_traceback_shows_the_line_of_the_source():
    model = Bottleneck()
    convert(model)
    try:
        model(torch.zeros(2, 5, 3, 3))
    except RuntimeError as error:
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
    assert "out = self.conv1(x)" in lines


def test_reverting_a_layer_alone():
    model = Functional().double()
    native = copy.deepcopy(model)
    convert(model)
    model.bn = normfused.revert(model.bn)
    assert [type(m) for m in model.bn] == [nn.BatchNorm2d, nn.ReLU6]
    assert_close(model(x4()), native(x4()))


def test_reverting_a_layer_before_a_sum_alone_is_refused():
    model = Bottleneck().double()
    native = copy.deepcopy(model)
    convert(model)
    with pytest.raises(ValueError, match="the sum after BatchNormAct2d is computed for a forward outside"):
        normfused.revert(model.bn2)
    assert_close(model(x4()), native(x4()))


def test_reverting_what_was_derived_from_a_converted_class_is_refused():
    model = Bottleneck()
    convert(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(ValueError, match="Wrapped is derived from a converted class"):
        normfused.revert(model)


def test_converting_again_changes_nothing():
    model = nn.Sequential(Bottleneck(True), FunctionalBlock())
    first, before = convert(model), structure(model)
    assert convert(model) == {name: first[name] for name in first}
    assert structure(model) == before


def test_compiled_whole():
    model = nn.Sequential(Bottleneck(True), FunctionalBlock()).double()
    native = copy.deepcopy(model)
    convert(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for module in (model, native):
        module.zero_grad()
    y, expected = compiled(x4()), native(x4())
    y.square().mean().backward()
    expected.square().mean().backward()
    assert_close(y, expected)
    assert_close([p.grad for p in model.parameters()], [p.grad for p in native.parameters()])
