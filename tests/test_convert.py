"""convert fuses what it can prove and nothing else, and the numbers stay."""

import copy
import pickle

import pytest
import torch
from convert_models import (
    MODELS,
    NONE,
    RELU6,
    ControlFlow,
    MobileNet,
    SecondConsumer,
    SharedActivation,
    Siblings,
    assert_close,
    assert_left,
    conv_bn_relu6,
    convert,
    every_model,
    step,
    structure,
    train,
    x4,
)
from torch import nn

import normfused
from normfused import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, GroupNormAct
from normfused.convert import FusedActivation, Site

# The numbers


@pytest.mark.thorough(interpreted=True)
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
    ours = {"activation", "pre_activation", "fused_from"}
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
        ("optional_skip", "bn", "its output has another use besides act"),
        ("skip_in_evaluation", "bn", "its output has another use besides act"),
        ("second_consumer", "bn", "its output has another use besides act"),
        ("keeps", "bn", "its output has another use besides act"),
        ("part_of_sequential", "1", "its output has another use besides 2"),
        ("clamp", "bn", "followed by clamp, which is no activation: its gradient is 1 at the very bounds"),
        ("alias", "bn", "of Alias.forward is called in a way that is not understood"),
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
