"""Models of torchvision, timm and transformers, and a diffusion UNet: converted they train the same, and go back.

In double precision, so that nothing hides behind rounding. The tests of a library that is not installed are skipped.
"""

import copy
import importlib
import io
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from convert_models import structure
from helpers import randn
from torch import nn

import normfused


def _torchvision(name, **kwargs):
    return lambda lib: getattr(lib.models, name)(weights=None, num_classes=3, **kwargs)


def _ssdlite(lib):
    # Without its detection part, which is no network to differentiate: features and heads.
    model = lib.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = model.backbone, model.head

        def forward(self, x):
            return torch.cat([y.flatten(1) for y in self.head(list(self.backbone(x).values())).values()], 1)

    return Network()


def _timm(name, **kwargs):
    return lambda lib: lib.create_model(name, pretrained=False, num_classes=3, **kwargs)


def _resnetv2(lib):
    return lib.models.ResNetV2(layers=(1, 1, 1, 1), channels=(128, 128, 256, 256), stem_chs=32, num_classes=3)


def _transformers(name, **config):
    return lambda lib: getattr(lib, f"{name}ForImageClassification")(getattr(lib, f"{name}Config")(**config))


_SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "num_labels": 3}
# name -> (library, how to build it, size of the input, whether it takes example inputs, number of sites by outcome)
MODELS = {
    "mobilenet_v2": ("torchvision", _torchvision("mobilenet_v2", width_mult=0.25, dropout=0.0), 64, False,
        {"fused with relu6": 35, "no activation": 17}),
    "mobilenet_v3_small": ("torchvision", _torchvision("mobilenet_v3_small", dropout=0.0), 64, False,
        {"fused with hardswish": 18, "fused with relu": 5, "no activation": 11}),
    "mnasnet0_5": ("torchvision", _torchvision("mnasnet0_5", dropout=0.0), 64, False,
        {"fused with relu": 35, "no activation": 17}),
    "resnet50": ("torchvision", _torchvision("resnet50", width_per_group=8), 64, False,
        {"fused with relu": 33, "fused with add, relu": 16, "no activation": 4}),
    "ssdlite": ("torchvision", _ssdlite, 64, False,
        {"fused with relu6": 24, "fused with hardswish": 20, "fused with relu": 11, "no activation": 15}),
    "googlenet": ("torchvision", _torchvision("googlenet", aux_logits=False, init_weights=False), 64, False,
        {"fused with relu": 57}),
    "timm_mobilenetv2_100": ("timm", _timm("mobilenetv2_100"), 64, False,
        {"fused with relu6": 35, "no activation": 17}),
    "timm_efficientnet_lite0": ("timm", _timm("efficientnet_lite0"), 64, False,
        {"fused with relu6": 33, "no activation": 16}),
    "timm_resnet18": ("timm", _timm("resnet18"), 64, False,
        {"fused with relu": 9, "fused with add, relu": 8, "no activation": 3}),
    "timm_resnet26": ("timm", _timm("resnet26"), 64, True,
        {"fused with relu": 17, "fused with add, relu": 8, "no activation": 4}),
    "timm_resnetv2_gn": ("timm", _resnetv2, 64, False,
        {"fused with relu": 13}),
    "timm_resnet_gn": ("timm", _timm("resnet50_gn", layers=(1, 1, 1, 1)), 64, False,
        {"fused with relu": 9, "no activation": 8}),
    "mobilenet_v1": ("transformers", _transformers("MobileNetV1", depth_multiplier=0.25, num_labels=3), 64, True,
        {"fused with relu6": 27}),
    "mobilenet_v1_untraced": ("transformers", _transformers("MobileNetV1", depth_multiplier=0.25, num_labels=3), 64,
        False, {"left": 27}),
    "hf_mobilenet_v2": ("transformers", _transformers("MobileNetV2", depth_multiplier=0.35, num_labels=3), 64, True,
        {"fused with relu6": 35, "no activation": 17}),
    "hf_resnet": ("transformers", _transformers("ResNet", depths=[1, 2, 1, 1], **_SMALL_RESNET), 64, False,
        {"fused with relu": 11, "no activation": 8}),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    """(model, input, example inputs, outcomes)."""
    library, build, size, needs_example, outcomes = MODELS[request.param]
    pytest.importorskip(library)
    torch.manual_seed(0)
    model = build(importlib.import_module(library)).double()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    x = randn(4, 3, size, size, dtype=torch.float64)
    return model, x, x if needs_example else None, outcomes


def _convert(model, example_inputs):
    sites = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert normfused.convert(model, example_inputs, report=sites) is model
    return Counter(site.outcome for site in sites)


def _train(model, x, steps=3):
    """Outputs, gradients and running statistics of some SGD steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = _output(model(x))
        y.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        history += [{"y": y.detach()}, gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}]
        optimizer.step()
    return history


def _output(y):
    return getattr(y, "logits", y)


def assert_close(actual, expected):
    """Every tensor of every step, by the norm of the difference; a gradient that is zero but for rounding counts as
    one of a millionth of the largest."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.keys() == theirs.keys()
        floor = 1e-6 * max((tensor.double().norm() for tensor in theirs.values()), default=0.0)
        for name, tensor in theirs.items():
            error = (ours[name].double() - tensor.double()).norm()
            assert error <= 1e-6 * max(tensor.double().norm(), floor), (name, error, tensor.norm())


def test_trains_the_same_and_goes_back(case):
    model, x, example_inputs, outcomes = case
    native, before, parameters = copy.deepcopy(model), structure(model), list(model.named_parameters())
    assert _convert(model, example_inputs) == outcomes
    assert list(model.state_dict()) == list(native.state_dict())
    for (name, ours), (theirs_name, theirs) in zip(model.named_parameters(), parameters, strict=True):
        assert (name, ours is theirs) == (theirs_name, True)

    trained = copy.deepcopy(model)
    assert_close(_train(trained, x), _train(copy.deepcopy(native), x))

    normfused.revert(model)
    assert structure(model) == before
    with torch.no_grad():
        assert torch.equal(_output(model.eval()(x)), _output(native.eval()(x)))


# timm's own layers


def test_timm_layers_keep_their_class_and_arguments():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        layers.BatchNormAct2d(4, act_layer=nn.SiLU),
        layers.GroupNormAct(4, num_groups=2, act_layer="relu"),
        layers.GroupNorm(4, num_groups=2),
        nn.SiLU(),
        layers.GroupNorm1Act(4, apply_act=False),
        layers.BatchNormAct2d(4, apply_act=False),
        nn.ReLU(),
    ).double()
    native, before = copy.deepcopy(model), structure(model)
    x = randn(2, 4, 5, 5, dtype=torch.float64)
    assert _convert(model, None) == {
        "fused with silu": 2,
        "fused with relu": 2,
        "no activation": 1,
    }
    assert all(isinstance(ours, type(theirs)) for ours, theirs in zip(model[:3], native[:3], strict=True))
    assert isinstance(model[0], normfused.BatchNormAct2d)
    assert isinstance(model[1], normfused.GroupNormAct)
    assert (model[1].num_groups, model[1].num_channels) == (2, 4)
    for twin in (model, copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert_close(_train(copy.deepcopy(twin), x), _train(copy.deepcopy(native), x))
    normfused.revert(model)
    assert structure(model) == before
    assert torch.equal(model.eval()(x), native.eval()(x))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_timm_layers_that_do_something_else_are_untouched():
    layers = pytest.importorskip("timm.layers")
    act = nn.ReLU()
    shared = layers.BatchNormAct2d(4)
    shared.act = act
    hooked = layers.BatchNormAct2d(4)
    hooked.act.register_forward_hook(lambda *_: None)
    fast = layers.GroupNormAct(4, num_groups=2)
    fast._fast_norm = True
    model = nn.Sequential(
        layers.BatchNormAct2d(4, drop_layer=nn.Dropout),
        layers.BatchNormAct2d(4, act_layer=nn.GELU),
        nn.Sequential(shared, nn.Conv2d(4, 4, 1), act),
        hooked,
        fast,
        layers.FrozenBatchNormAct2d(4),
    )
    before, sites = structure(model), []
    with pytest.warns(UserWarning, match="fused nothing"):
        normfused.convert(model, report=sites)
    assert structure(model) == before
    reasons = [site.reason for site in sites]
    for reason, expected in zip(
        reasons,
        ("a Dropout before", "its GELU is not", "used elsewhere too", "has hooks", "fast_norm", "not a class"),
        strict=True,
    ):
        assert expected in reason


# A diffusion model's UNet


class _ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the time embedding between; by modules, or by functions."""

    def __init__(self, c_in, c_out, c_time, functional):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(4, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.act = None if functional else nn.SiLU()
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        if self.act is None:
            y = self.conv1(F.silu(self.norm1(x)))
            y = y + self.time(F.silu(time))[:, :, None, None]
            y = self.conv2(F.silu(self.norm2(y)))
        else:
            y = self.conv1(self.act(self.norm1(x)))
            y = y + self.time(time)[:, :, None, None]
            y = self.conv2(self.act(self.norm2(y)))
        return self.shortcut(x) + y


class _Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(4, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3, c, h * w).transpose(2, 3).unbind(1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, c, h, w))


class _UNet(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.inlet = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([_ResBlock(8, 8, 6, functional), _ResBlock(8, 16, 6, functional)])
        self.middle, self.attention = _ResBlock(16, 16, 6, functional), _Attention(16)
        self.up = nn.ModuleList([_ResBlock(32, 8, 6, functional), _ResBlock(16, 8, 6, functional)])
        self.outlet = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, time=None):
        time = torch.linspace(0, 1, 6, dtype=x.dtype).expand(x.shape[0], 6) if time is None else time
        x, skips = self.inlet(x), []
        for block in self.down:
            x = block(x, time)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.attention(self.middle(x, time))
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], 1), time)
        return self.outlet(x)


@pytest.mark.parametrize("functional", [False, True], ids=["modules", "functions"])
@pytest.mark.parametrize("with_examples", [False, True], ids=["symbolic", "examples"])
def test_diffusion_unet(functional, with_examples):
    torch.manual_seed(0)
    model, x = _UNet(functional).double(), randn(2, 3, 8, 8, dtype=torch.float64)
    native, before = copy.deepcopy(model), structure(model)
    assert _convert(model, x if with_examples else None) == {"fused with silu": 11, "no activation": 1}
    assert_close(_train(copy.deepcopy(model), x), _train(copy.deepcopy(native), x))
    normfused.revert(model)
    assert structure(model) == before
    assert torch.equal(model.eval()(x), native.eval()(x))
