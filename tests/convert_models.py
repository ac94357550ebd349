"""Models that convert meets, and what the tests of convert and revert share."""

import copy
import itertools
import linecache
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import nn

import normfused
from normfused import BatchNormAct2d
from normfused.convert import FusedActivation

RELU6, NONE, ADD_RELU = "fused with relu6", "no activation", "fused with add, relu"


def convert(model, example_inputs=None):
    """Converts; returns {path: outcome, or the reason it was left}."""
    sites = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert normfused.convert(model, example_inputs, report=sites) is model
    return {site.name: site.reason if site.outcome == "left" else site.outcome for site in sites}


def assert_left(model, path, reason, example_inputs=None):
    """Nothing is fused at ``path``, for a reason that says ``reason``; its class changes all the same."""
    assert reason in convert(model, example_inputs)[path]
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


def assert_same(model, native, steps=3):
    assert_close(train(model, steps), train(native, steps))
    assert_close(model.state_dict(), native.state_dict())
    assert_close(model.eval()(x4()), native.eval()(x4()))


def assert_converts(model, outcomes, example_inputs=None):
    """Converts to ``outcomes``, computes the same, and goes back to the very forward."""
    model = model.double()
    native, before, training = copy.deepcopy(model), structure(model), model.training
    assert convert(model, example_inputs) == outcomes
    assert_same(copy.deepcopy(model), copy.deepcopy(native))
    normfused.revert(model)
    assert structure(model) == before
    assert model.training == training
    assert torch.equal(model.eval()(x4()), native.eval()(x4()))


def model_with_forward(*body):
    """A module with a convolution, a BatchNorm, and a forward of these lines."""
    name = f"<forward {next(_numbers)}>"
    source = "".join(f"{line}\n" for line in ("def forward(self, x):", *(f"    {line}" for line in body)))
    # Where inspect looks for the source of what was typed into a notebook, too.
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    namespace = {"nn": nn, "torch": torch, "F": F, "operator": operator}
    exec(compile(source, name, "exec"), namespace)
    cls = type("Model", (nn.Module,), {"forward": namespace["forward"]})
    model = cls()
    model.conv, model.bn, model.function, model.in_place = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), F.silu, False
    return model


_numbers = itertools.count()


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


class Bottleneck(nn.Module):
    """torchvision's form of it: in place, one ReLU module, a downsample that need not be there."""

    def __init__(self, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if downsample else None

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class FunctionalBlock(BasicBlock):
    """The same with functions, in timm's order of things and with what does nothing in between."""

    def __init__(self):
        super().__init__()
        self.drop, self.drop_path = nn.Identity(), nn.Identity()

    def forward(self, x):
        shortcut = x
        x = F.silu(self.drop(self.bn1(self.conv1(x))), inplace=True)
        x = self.drop_path(self.bn2(self.conv2(x)))
        return F.relu(shortcut + x)


class TwoPaths(BasicBlock):
    """Both operands of the sum are normalised."""

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


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
    "bottleneck": Bottleneck,
    "bottleneck_downsample": lambda: Bottleneck(True),
    "functional_block": FunctionalBlock,
    "two_paths": TwoPaths,
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
