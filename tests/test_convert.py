"""convert fuses what it can prove and nothing else; the numbers stay, and revert restores the very model."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import normfused
from normfused import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from normfused.convert import FusedActivation, Site

RELU6, NONE = "fused with relu6", "no activation"


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convert(model):
    """Converts; returns {path: outcome, or the reason it was left}."""
    sites = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert normfused.convert(model, report=sites) is model
    return {site.name: site.reason if site.outcome == "left" else site.outcome for site in sites}


def assert_left(model, path, reason):
    """Nothing is fused, at ``path`` for a reason that says ``reason``; its class changes all the same."""
    assert reason in convert(model)[path]
    layer = model.get_submodule(path)
    assert type(layer) is BatchNormAct2d
    assert layer.activation is None
    assert not any(isinstance(module, FusedActivation) for module in model.modules())


def x4(seed=0):
    return 3 * randn(4, 4, 6, 6, dtype=torch.float64, seed=seed)


def train(model, steps=3):
    """Outputs and gradients of some SGD steps in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return [step(model, optimizer, seed) for seed in range(steps)]


def step(model, optimizer, seed):
    x = x4(seed).requires_grad_()
    optimizer.zero_grad()
    y = model(x)
    y.square().mean().backward()
    optimizer.step()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def structure(model):
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


# Models


def conv_bn_relu6(c_in, c_out, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    def __init__(self, c, expand=2):
        super().__init__()
        self.conv = nn.Sequential(
            conv_bn_relu6(c, c * expand),
            conv_bn_relu6(c * expand, c * expand, 3, groups=c * expand),
            nn.Conv2d(c * expand, c, 1, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x):
        return x + self.conv(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn_relu6(4, 8, 3, 2), InvertedResidual(8), InvertedResidual(8))
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Siblings(nn.Module):
    """conv -> bn -> act, as attributes; what the tests below vary."""

    def __init__(self, act=None, bn=None):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = bn or nn.BatchNorm2d(4)
        self.act = act or nn.ReLU6()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet's: one ReLU, after a norm and after a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class SharedActivation(BasicBlock):
    """One ReLU, after norms alone."""

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)))


class OptionalSkip(Siblings):
    def forward(self, x, skip=None):
        x = self.bn(self.conv(x))
        if skip is None:
            skip = x
        return self.act(x) + skip


class SkipInEvaluation(Siblings):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.act(x) if self.training else self.act(x) + x


class SecondConsumer(Siblings):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return x + self.act(x)


class Functional(Siblings):
    def forward(self, x):
        return F.relu6(self.bn(self.conv(x)))


class Clamp(Siblings):
    def forward(self, x):
        return self.bn(self.conv(x)).clamp_(0, 6)


class ControlFlow(Siblings):
    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        return x if x.sum() > 0 else -x


class CalledTwice(Siblings):
    def forward(self, x):
        return self.act(self.bn(self.act(self.bn(self.conv(x)))))


class Keeps(Siblings):
    """Perceptual losses read such attributes."""

    def forward(self, x):
        self.kept = {"features": [self.bn(self.conv(x))]}
        return self.act(self.kept["features"][0])


class Alias(Siblings):
    """Reaches its activation past the registered name."""

    def __init__(self):
        super().__init__(nn.SiLU())
        self.layers = [self.conv, self.bn, self.act]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class CallsForward(Siblings):
    def forward(self, x):
        return self.act(F.batch_norm(self.conv(x), None, None, self.bn.weight, self.bn.bias, True))


class PartOfSequential(nn.Sequential):
    """Its forward is not Sequential's: the norm's output is returned too."""

    def forward(self, x):
        x = self[1](self[0](x))
        return x + self[2](x)


class InOrder(nn.Sequential):
    def forward(self, input):
        return super().forward(input) * 2


class InnerSequential(nn.Module):
    """Calls into a Sequential that it also runs whole."""

    def __init__(self, use):
        super().__init__()
        self.body = conv_bn_relu6(4, 4)
        self.use = use

    def forward(self, x):
        return self.body(x) + self.use(self.body, x)


class Layers(nn.Module):
    """Layers in a ModuleList or ModuleDict, which have no forward."""

    def __init__(self, container):
        super().__init__()
        self.layers = container

    def forward(self, x):
        for layer in getattr(self.layers, "values", self.layers.__iter__)():
            x = layer(x)
        return x


class StarArguments(Siblings):
    def forward(self, *args):
        (x,) = args
        return super().forward(x)


def twice_the_same(norm=None, act=None):
    norm, act = norm or nn.BatchNorm2d(4), act or nn.ReLU6()
    return nn.Sequential(nn.Sequential(norm, act), nn.Sequential(norm, act))


def shared_activation_sequential(inner):
    act = nn.ReLU6()
    return nn.Sequential(nn.BatchNorm2d(4), act, nn.Sequential(inner, act))


MODELS = {
    "mobilenet": MobileNet,
    "siblings": Siblings,
    "basic_block": BasicBlock,
    "shared_activation": SharedActivation,
    "optional_skip": OptionalSkip,
    "skip_in_evaluation": SkipInEvaluation,
    "second_consumer": SecondConsumer,
    "functional": Functional,
    "clamp": Clamp,
    "control_flow": ControlFlow,
    "called_twice": CalledTwice,
    "keeps": Keeps,
    "alias": Alias,
    "calls_forward": CallsForward,
    "star_arguments": StarArguments,
    "part_of_sequential": lambda: PartOfSequential(*conv_bn_relu6(4, 4)),
    "in_order": lambda: InOrder(*conv_bn_relu6(4, 4)),
    "index": lambda: InnerSequential(lambda body, x: body[1](x)),
    "slice": lambda: InnerSequential(lambda body, x: body[:2](x)),
    "module_list": lambda: Layers(nn.ModuleList(conv_bn_relu6(4, 4))),
    "module_dict": lambda: Layers(nn.ModuleDict({"bn": nn.BatchNorm2d(4), "act": nn.ReLU6()})),
    "shared_norm": twice_the_same,
    "shared_with_sum": lambda: shared_activation_sequential(nn.Conv2d(4, 4, 1)),
    "shared_after_norms": lambda: shared_activation_sequential(nn.BatchNorm2d(4)),
    "group_norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.GroupNorm(4, 4)),
    "no_affine": lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Hardswish(), nn.Conv2d(4, 4, 1)),
    "no_tracking": lambda: Siblings(bn=nn.BatchNorm2d(4, track_running_stats=False)),
    "cumulative": lambda: Siblings(bn=nn.BatchNorm2d(4, momentum=None)),
}

every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


# The numbers


@every_model
def test_converted_model_trains_the_same(build, backend):
    torch.manual_seed(0)
    native = build().double()
    model = copy.deepcopy(native)
    convert(model)
    assert_close(train(model), train(native))
    assert_close(model.state_dict(), native.state_dict())
    assert_close(model.eval()(x4()), native.eval()(x4()))


@every_model
def test_revert_restores_the_very_model(build):
    torch.manual_seed(0)
    model = build().double()
    train(model, 1)
    before, attributes = structure(model), [sorted(vars(module)) for module in model.modules()]
    y = model.eval()(x4())
    convert(model)
    assert normfused.revert(model) is model
    assert structure(model) == before
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(x4()), y)


@every_model
def test_state_dict_loads_both_ways(build):
    native, model = build(), build()
    convert(model)
    assert list(model.state_dict()) == list(native.state_dict())
    model.load_state_dict(native.state_dict(), strict=True)
    native.load_state_dict(model.state_dict(), strict=True)


@every_model
def test_convert_leaves_state_and_random_numbers_alone(build):
    model = build()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    convert(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    ours = {"activation", "pre_activation", "fused_activation"}
    for name, module in model.named_modules():
        if not isinstance(module, FusedActivation):
            assert set(vars(module)) - ours == set(attributes[name])
            assert module.training == attributes[name]["training"]


def test_optimizer_and_references_built_before_convert_go_on():
    torch.manual_seed(0)
    native = MobileNet().double()
    model = copy.deepcopy(native)
    layer = model.features[0][1]
    parameters = list(model.parameters())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, native)]
    for seed in range(2):
        assert_close(step(model, optimizers[0], seed), step(native, optimizers[1], seed))
    convert(model)
    assert model.features[0][1] is layer
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for seed in range(2, 5):
        assert_close(step(model, optimizers[0], seed), step(native, optimizers[1], seed))
    assert_close(model.state_dict(), native.state_dict())


# What is fused


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.Hardtanh(0.0, 6.0, inplace=True), "relu6"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(inplace=True), "hardswish"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.01, inplace=True), "leaky_relu"),
        (nn.Hardtanh(), None),
        (nn.LeakyReLU(0.1), None),
        (nn.GELU(), None),
        (nn.PReLU(), None),
        (type("Mine", (nn.ReLU,), {})(), None),
    ],
    ids=str,
)
def test_activations(activation, name):
    model = nn.Sequential(nn.BatchNorm2d(4), activation).double()
    native = copy.deepcopy(model)
    assert convert(model) == {"0": f"fused with {name}" if name else NONE}
    assert model[0].activation == name
    assert type(model[1]) is (FusedActivation if name else type(activation))
    assert_close(model(x4()), native(x4()))
    assert normfused.revert(model)[1] is activation


@pytest.mark.parametrize(
    ("norm", "fused"),
    [
        (nn.BatchNorm1d(4), BatchNormAct1d),
        (nn.BatchNorm2d(4), BatchNormAct2d),
        (nn.BatchNorm3d(4), BatchNormAct3d),
        (nn.GroupNorm(2, 4), GroupNormAct),
    ],
    ids=("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm"),
)
def test_classes(norm, fused):
    plain = type(norm)
    model = nn.Sequential(norm, nn.SiLU())
    convert(model)
    assert model[0] is norm
    assert type(norm) is fused
    assert (norm.activation, norm.pre_activation) == ("silu", None)
    normfused.revert(model)
    assert type(norm) is plain
    assert not hasattr(norm, "activation")
    assert not hasattr(norm, "pre_activation")


def test_mobilenet_is_fused_wholly():
    outcomes = convert(MobileNet())
    assert list(outcomes.values()).count(RELU6) == 5
    assert outcomes["features.1.conv.3"] == outcomes["features.2.conv.3"] == NONE
    assert len(outcomes) == 7


@pytest.mark.parametrize(
    ("build", "outcomes"),
    [
        (Siblings, {"bn": RELU6}),
        (SharedActivation, {"bn1": "fused with relu", "bn2": "fused with relu"}),
        (MODELS["in_order"], {"1": RELU6}),
        (MODELS["shared_after_norms"], {"0": RELU6, "2.0": RELU6}),
        (MODELS["group_norm"], {"0": "fused with silu", "2": NONE}),
        (MODELS["star_arguments"], {"bn": RELU6}),
    ],
)
def test_fused(build, outcomes):
    assert convert(build()) == outcomes


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("basic_block", "bn1", "activation relu is used elsewhere too"),
        ("optional_skip", "bn", "its output has another use besides act"),
        ("skip_in_evaluation", "bn", "its output has another use besides act"),
        ("second_consumer", "bn", "its output has another use besides act"),
        ("keeps", "bn", "its output has another use besides act"),
        ("part_of_sequential", "1", "its output has another use besides 2"),
        ("functional", "bn", "functional activation (relu6), not fused yet"),
        ("clamp", "bn", "functional activation (clamp), not fused yet"),
        ("alias", "bn", "functional activation (silu), not fused yet"),
        ("control_flow", "bn", "ControlFlow.forward cannot be traced (TraceError: "),
        ("called_twice", "bn", "called more than once"),
        ("calls_forward", "bn", "CallsForward.forward does not call it"),
        ("index", "body.1", "InnerSequential.forward calls it past its parent"),
        ("slice", "body.1", "InnerSequential.forward calls it past its parent"),
        ("module_list", "layers.1", "ModuleList has no forward"),
        ("module_dict", "layers.bn", "ModuleDict has no forward"),
        ("shared_norm", "0.0", "registered 2 times"),
        ("shared_with_sum", "0", "activation 1 is used elsewhere too"),
    ],
)
def test_left(name, path, reason):
    assert_left(MODELS[name](), path, reason)


def test_in_place_activation_beside_a_second_consumer_is_left():
    model = SecondConsumer(nn.ReLU6(inplace=True))
    assert_left(model, "bn", "its output has another use besides act")


def test_activation_shared_with_an_untraceable_module_is_left():
    act = nn.ReLU6()
    model = nn.Sequential(Siblings(act), ControlFlow(act))
    assert_left(model, "0.bn", "shared, and who uses it unproven: ControlFlow")


def test_activation_in_a_container_is_left():
    class Model(Siblings):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleList([nn.ReLU6()])

        def forward(self, x):
            return self.acts[0](self.bn(x))

    assert_left(Model(), "bn", "its activation acts.0 is not its sibling")


def test_broken_off_trace_still_shows_calls_past_the_parent():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn_relu6(4, 4)

        def forward(self, x):
            x = self.body(x) + self.body[1](x)
            return x if x.sum() > 0 else -x

    assert_left(Model(), "body.1", "Model.forward calls it past its parent")


def test_forward_that_changes_state_is_only_watched():
    class Model(Siblings):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.seen, self.calls = [], 0

        def forward(self, x):
            self.steps.add_(1)
            self.calls += 1
            self.seen.append(x)
            return super().forward(x + torch.rand(1) + torch.ones(1))

    model = Model()
    before = torch.get_rng_state()
    assert convert(model) == {"bn": RELU6}
    assert (model.steps.item(), model.calls, model.seen) == (0, 0, [])
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(name.startswith("_tensor_constant") for name in vars(model))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("hooked", ["bn", "act"])
def test_modules_with_hooks_keep_what_their_hooks_see(kind, hooked):
    model = Siblings(nn.SiLU()).double()
    native = copy.deepcopy(model)
    calls = {model.get_submodule(hooked): [], native.get_submodule(hooked): []}

    def hook(module, *args):
        calls[module].extend(t.detach().clone() for t in torch.utils._pytree.tree_leaves(args))

    for module in calls:
        getattr(module, f"register_{kind}_hook")(hook)
    assert "hooks" in convert(model)["bn"]
    assert_close(train(model, 1), train(native, 1))
    ours, expected = calls.values()
    assert ours
    assert_close(ours, expected)


def test_hook_on_the_sequential_around_is_no_obstacle():
    model = conv_bn_relu6(4, 4)
    model.register_forward_hook(lambda *_: None)
    assert convert(model) == {"1": RELU6}


def test_layer_whose_forward_is_replaced_on_the_instance_is_untouched():
    model = Siblings()
    native = model.bn.forward
    model.bn.forward = lambda x: native(x) + 1
    assert "replaced on the instance" in convert(model)["bn"]
    assert type(model.bn) is nn.BatchNorm2d
    assert type(model.act) is nn.ReLU6


def test_activation_whose_forward_is_replaced_on_the_instance_stays():
    model = Siblings()
    model.act.forward = lambda x: -x
    assert convert(model) == {"bn": NONE}
    assert type(model.act) is nn.ReLU6


def test_parent_with_a_call_of_its_own():
    class Model(Siblings):
        def __call__(self, x):
            return super().__call__(x) + self.bn(x)

    assert_left(Model(), "bn", "Model runs more than its forward")


def test_activation_called_by_keyword_is_left():
    class Model(Siblings):
        def forward(self, x):
            return self.act(input=self.bn(x))

    assert_left(Model(), "bn", "its activation act is used elsewhere too")


def test_parent_whose_forward_is_replaced_on_the_instance():
    model = Siblings()
    model.forward = lambda x: model.bn(x) + model.act(model.bn(x))
    assert_left(model, "bn", "Siblings runs more than its forward")


# Special modules


def test_classes_that_are_not_touched():
    class Mine(nn.BatchNorm2d):
        pass

    parametrized = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    norms = [Mine(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d(), parametrized, nn.InstanceNorm2d(4)]
    model = nn.Sequential(*(nn.Sequential(norm, nn.ReLU6()) for norm in norms))
    before = structure(model)
    reasons = list(convert(model).values())
    assert len(reasons) == 4
    assert all("is not a class that is fused" in reason for reason in reasons)
    assert structure(model) == before
    assert structure(normfused.revert(model)) == before


def test_lazy_layer_once_it_is_known():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU6()).double()
    model(x4())
    assert convert(model) == {"0": RELU6}


def test_model_that_is_a_layer():
    norm = nn.BatchNorm2d(4)
    with pytest.warns(UserWarning, match="fused nothing: of the model's 1 normalisation layers"):
        assert normfused.convert(norm) is norm
    assert type(norm) is BatchNormAct2d
    assert norm.activation is None
    assert normfused.revert(norm) is norm
    assert type(norm) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_untouched():
    model = nn.Sequential(torch.jit.script(conv_bn_relu6(4, 4)), nn.BatchNorm2d(4), nn.ReLU6()).double()
    outcomes = convert(model)
    assert "is not a class that is fused" in outcomes["0.1"]
    assert outcomes["1"] == RELU6
    model(x4()).sum().backward()
    with pytest.warns(UserWarning, match="fused nothing"):
        normfused.convert(model[0])


def test_compiled_model_is_compiled_anew():
    model = Siblings().double()
    compiled = torch.compile(model, backend="eager")
    native = copy.deepcopy(model)
    for convert_or_revert in (lambda m: m, convert, normfused.revert):
        convert_or_revert(compiled)
        assert_close(compiled(x4()), native(x4()))
    assert convert(compiled) == {"_orig_mod.bn": RELU6}


def test_torch_wrapper_is_not_traced():
    model = nn.DataParallel(Siblings())
    assert convert(model) == {"module.bn": RELU6}
    assert "DataParallel.forward is PyTorch's own" in convert(nn.DataParallel(nn.BatchNorm2d(4)))["module"]


def test_meta_device_and_evaluation_mode():
    with torch.device("meta"):
        model = MobileNet().eval()
    assert list(convert(model).values()).count(RELU6) == 5
    assert not any(module.training for module in model.modules())
    assert not any(module.training for module in normfused.revert(model).modules())


def test_mode_set_while_converted_reaches_the_activation():
    model = Siblings()
    convert(model)
    normfused.revert(model.eval())
    assert not model.act.training


def test_model_without_normalisation_warns():
    with pytest.warns(UserWarning, match="fused nothing: of the model's 0 normalisation") as record:
        normfused.convert(nn.Linear(2, 2))
    assert len(record) == 1
    assert record[0].filename == __file__


@pytest.mark.parametrize("function", [normfused.convert, normfused.revert])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        function({})


# Copies, repetition, parts


def test_converting_again_changes_nothing(recwarn):
    model = MobileNet()
    first, before = convert(model), structure(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    sites = []
    normfused.convert(model, report=sites)
    assert {site.name: site.outcome for site in sites} == first
    assert {site.reason for site in sites} == {"already converted"}
    assert structure(model) == before
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert not recwarn.list


def test_reverting_twice_or_an_unconverted_model_changes_nothing():
    model = MobileNet()
    before = structure(model)
    assert structure(normfused.revert(model)) == before
    convert(model)
    assert structure(normfused.revert(normfused.revert(model))) == before


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("build", [MobileNet, SharedActivation])
def test_copies_of_a_converted_model_revert(build, duplicate):
    model = build().double().eval()
    native = copy.deepcopy(model)
    convert(model)
    before = structure(model)
    twin = duplicate(model)
    assert_close(twin(x4()), native(x4()))
    normfused.revert(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in native.modules()]
    assert list(twin.state_dict()) == list(native.state_dict())
    assert structure(model) == before
    assert torch.equal(twin(x4(1)), native(x4(1)))


def test_activation_used_outside_the_converted_part_goes_on_there():
    act = nn.SiLU()
    model = nn.Sequential(nn.BatchNorm2d(4), act, Siblings(act)).double()
    native = copy.deepcopy(model)
    assert convert(model[2]) == {"bn": "fused with silu"}
    assert model[1] is act
    assert_close(model(x4()), native(x4()))
    normfused.revert(model)
    assert model[2].act is act


def test_reverting_a_part_keeps_the_numbers():
    model = shared_activation_sequential(nn.BatchNorm2d(4)).double()
    native = copy.deepcopy(model)
    convert(model)
    normfused.revert(model[2])
    assert str(model[2][0]) == str(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6()))
    assert_close(model(x4()), native(x4()))
    normfused.revert(model)
    assert not any(isinstance(module, BatchNormAct2d) for module in model.modules())
    assert_close(model(x4()), native(x4()))


def test_reverting_a_layer_taken_out_of_its_model():
    model = Siblings().double()
    native = copy.deepcopy(model)
    convert(model)
    model.bn = normfused.revert(model.bn)
    assert isinstance(model.bn, nn.Sequential)
    assert_close(model(x4()), native(x4()))


def test_revert_of_layers_built_fused():
    model = nn.Sequential(
        BatchNormAct2d(4),
        BatchNormAct2d(4, activation=None),
        BatchNormAct2d(4, activation=None, pre_activation="relu"),
        GroupNormAct(2, 4, activation="leaky_relu"),
    ).double()
    parameters = list(model.parameters())
    y = model.eval()(x4())
    normfused.revert(model)
    plain = nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6()),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.GroupNorm(2, 4), nn.LeakyReLU()),
    )
    assert str(model) == str(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(module.training for module in model.modules())
    assert_close(model(x4()), y)


def test_revert_of_a_model_that_is_a_layer_built_fused():
    layer = BatchNormAct2d(4)
    model = normfused.revert(layer)
    assert type(model) is nn.Sequential
    assert model[0] is layer
    assert type(layer) is nn.BatchNorm2d


# The report


def test_printed_report(capsys):
    model = nn.Sequential(conv_bn_relu6(4, 4), SecondConsumer(), nn.BatchNorm2d(4))
    normfused.convert(model, report=True)
    assert capsys.readouterr().out.splitlines() == [
        "0.1: BatchNorm2d fused with relu6",
        "1.bn: BatchNorm2d left: its output has another use besides act",
        "2: BatchNorm2d no activation",
        "1 fused, 1 without an activation, 1 left",
    ]


def test_report_as_a_list(capsys):
    sites = []
    normfused.convert(conv_bn_relu6(4, 4), report=sites)
    assert sites == [Site("1", "BatchNorm2d", RELU6, "")]
    assert capsys.readouterr().out == ""


def test_fused_activation_says_what_it_was():
    model = conv_bn_relu6(4, 4)
    convert(model)
    assert str(model[2]) == "FusedActivation(ReLU6(inplace=True), computed by the normalisation before it)"
    assert len(list(model.modules())) == 4


# torch's own converter


def test_convert_sync_batchnorm_refuses_a_fused_activation():
    model = MobileNet()
    convert(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"drop the fused activation 'relu6'.*normfused\.revert"):
            nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(normfused.revert(model))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) == 7
    assert sum(isinstance(module, nn.ReLU6) for module in synced.modules()) == 5


def test_convert_sync_batchnorm_takes_a_layer_without_activation():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    convert(model)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0], nn.SyncBatchNorm)


def test_qconfig_is_absent_or_what_was_set():
    layer = BatchNormAct2d(4)
    assert not hasattr(layer, "qconfig")
    assert not hasattr(BatchNormAct2d, "qconfig")
    layer.qconfig = "mine"
    assert layer.qconfig == copy.deepcopy(layer).qconfig == "mine"
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_convert_sync_batchnorm_refuses_a_fused_activation_with_a_qconfig():
    layer = BatchNormAct2d(4)
    layer.qconfig = None
    with pytest.raises(RuntimeError, match="would drop the fused activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(layer)
