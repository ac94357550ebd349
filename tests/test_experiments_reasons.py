"""What the experiments rest on: why BatchNorm forgives the scale of weights, and how the family is related."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfused
from bench.experiments import family, inference

SCALES = [0.1, 3.0, 100.0]
N, C, H, W = SHAPE = family.SHAPE


def batch_norm(x, eps=1e-5, activation=None):
    return normfused.functional.batch_norm_act(x, None, None, training=True, eps=eps, activation=activation)


def loss_and_gradient(weight, x, target, eps):
    """A loss through BN(W x) + ReLU6, and its gradient for W."""
    weight = weight.detach().requires_grad_()
    y = batch_norm(F.conv2d(x, weight), eps, activation="relu6")
    loss = ((y - target) ** 2).sum()
    loss.backward()
    return y.detach(), weight.grad


@pytest.mark.parametrize("scale", SCALES)
def test_batch_norm_forgives_the_scale_of_weights(backend, scale):
    """BN(λWx) = BN(Wx) for λ > 0; and dL/dW at λW is dL/dW at W divided by λ, up to eps."""
    generator = torch.Generator().manual_seed(0)
    x, weight, target = (torch.randn(*sizes, generator=generator, dtype=torch.float64) for sizes in
                         ((4, 3, 6, 6), (5, 3, 1, 1), (4, 5, 6, 6)))  # fmt: skip
    y, gradient = loss_and_gradient(weight, x, target, 1e-12)
    scaled, scaled_gradient = loss_and_gradient(scale * weight, x, target, 1e-12)
    torch.testing.assert_close(scaled, y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=1e-8, atol=1e-8)


def test_eps_is_what_the_scale_of_weights_runs_into():
    """With eps 1e-3 and small weights the output shrinks: BN(λWx) = BN_{eps/λ²}(Wx)."""
    x = torch.randn(32, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = 0.01
    y = batch_norm(scale * x, 1e-3)
    torch.testing.assert_close(y, batch_norm(x, 1e-3 / scale**2))
    assert y.std() < 0.5 * batch_norm(x, 1e-3).std()


def test_negative_scales_flip_the_sign():
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(batch_norm(-2 * x, 1e-12), -batch_norm(x, 1e-12))


@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_of_one_group_is_layer_norm(backend, affine):
    x = family.tensor()
    ours, native = normfused.GroupNormAct(1, C, affine=affine), nn.LayerNorm((C, H, W), elementwise_affine=affine)
    if affine:
        nn.init.uniform_(ours.weight, 0.5, 2)
        nn.init.normal_(ours.bias)
        with torch.no_grad():
            for parameter, name in ((native.weight, "weight"), (native.bias, "bias")):
                parameter.copy_(getattr(ours, name).view(C, 1, 1).expand(C, H, W))
    torch.testing.assert_close(ours(x), native(x), rtol=1e-5, atol=family.ROUNDING)


def test_group_norm_of_as_many_groups_as_channels_is_instance_norm(backend):
    x = family.tensor()
    y = normfused.GroupNormAct(C, C, affine=False)(x)
    torch.testing.assert_close(y, nn.InstanceNorm2d(C)(x), rtol=1e-5, atol=family.ROUNDING)
    assert (y - nn.BatchNorm2d(C, affine=False)(x)).abs().max() > 0.5  # and not BatchNorm
    one = x[:1]
    same = normfused.GroupNormAct(C, C, affine=False)(one) - nn.BatchNorm2d(C, affine=False)(one)
    assert same.abs().max() < family.ROUNDING  # but for a batch of one image


def test_biased_variance_normalises_and_the_unbiased_one_is_kept(backend):
    x = family.tensor()
    layer = normfused.BatchNormAct2d(C, activation=None, momentum=1.0, affine=False)
    y = layer(x)
    biased, unbiased = (x.double().var((0, 2, 3), correction=correction) for correction in (0, 1))
    torch.testing.assert_close(
        y.double().var((0, 2, 3), correction=0), biased / (biased + layer.eps), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(layer.running_var.double(), unbiased, rtol=1e-5, atol=0)
    assert ((layer.running_var - biased) / biased).min() > 0.5 / (N * H * W - 1)
    torch.testing.assert_close(layer.running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_training_normalises_with_statistics_of_the_batch_not_the_moving_ones(backend):
    x, layer = family.tensor(), normfused.BatchNormAct2d(C, activation=None)
    with torch.no_grad():
        layer.running_mean.fill_(100)
        layer.running_var.fill_(100)
    torch.testing.assert_close(layer(x), normfused.BatchNormAct2d(C, activation=None)(x), rtol=0, atol=0)


def test_evaluation_folds_into_scale_and_shift(backend):
    layer = normfused.BatchNormAct2d(C, activation="relu6")
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    for seed in range(3):
        layer(family.tensor(seed))
    layer.eval()
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    shift = layer.bias - layer.running_mean * scale
    x = family.tensor(4)
    folded = F.relu6(x * scale.view(1, C, 1, 1) + shift.view(1, C, 1, 1))
    torch.testing.assert_close(layer(x), folded, rtol=1e-5, atol=family.ROUNDING)


def test_weight_and_bias_can_undo_the_normalisation(backend):
    assert max(inference.undone().values()) < 1e-4


def test_weight_and_bias_have_size_c():
    assert {tuple(p.shape) for p in normfused.BatchNormAct2d(C).parameters()} == {(C,)}
    assert {tuple(p.shape) for p in normfused.GroupNormAct(2, C).parameters()} == {(C,)}


def test_load_state_dict_is_strict_about_running_statistics():
    layer = normfused.BatchNormAct2d(C)
    layer(family.tensor())
    state = inference.without_statistics(layer.state_dict())
    assert sorted(state) == ["bias", "weight"]
    fresh = normfused.BatchNormAct2d(C)
    for missing in (("running_mean",), ("running_var",), ("running_mean", "running_var")):
        partial = {name: tensor for name, tensor in layer.state_dict().items() if name not in missing}
        with pytest.raises(RuntimeError, match=r"Missing key\(s\)") as refused:
            copy.deepcopy(fresh).load_state_dict(partial)
        assert all(name in str(refused.value) for name in missing)
    found = fresh.load_state_dict(state, strict=False)
    assert {"running_mean", "running_var"} <= set(found.missing_keys)
    assert fresh.running_mean.eq(0).all()
    assert fresh.running_var.eq(1).all()
    with pytest.raises(AssertionError, match="took a checkpoint"):
        inference.missing_keys(fresh, layer.state_dict())
