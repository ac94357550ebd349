"""revert restores the very model, also from copies, and converting again changes nothing."""

import copy
import io
import pickle

import pytest
import torch
from convert_models import (
    MobileNet,
    SharedActivation,
    Siblings,
    assert_close,
    convert,
    shared_activation_sequential,
    structure,
    x4,
)
from torch import nn

import normfused
from normfused import BatchNormAct2d, GroupNormAct

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
