"""Example inputs prove what symbolic traces cannot, and no more than they show."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from convert_models import (
    ADD_RELU,
    RELU6,
    Siblings,
    assert_converts,
    assert_left,
    assert_same,
    convert,
    model_with_forward,
    x4,
)
from torch import nn

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="finding a call in the source takes Python 3.11")


class _LooksAtShapes(Siblings):
    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError(f"expected 4 channels, got {x.shape[1]}")
        return F.silu(self.act(self.bn(self.conv(x))))


class _Derives(Siblings):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if y.sum() > 1e30:
            return y
        return self.act(y)


class _DerivesBelow(Siblings):
    """The value is read by a child and decides here."""

    class Big(nn.Module):
        def forward(self, x):
            return x.sum().item() > 1e30

    def __init__(self):
        super().__init__()
        self.big = self.Big()

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if self.big(x) else self.act(y)


class _Draws(Siblings):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if random.random() < 0.5 else self.act(y)


class _DrawsFromNumPy(Siblings):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if np.random.random() < 0.5 else self.act(y)


class _DrawsTensor(Siblings):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y if torch.rand(()) < 0.5 else self.act(y)


class _Output:
    def __init__(self, features, y):
        self.features, self.y = features, y


class _Packs(Siblings):
    """Its output is an object that torch does not know."""

    def forward(self, x):
        if x.shape[1] != 4:
            raise ValueError
        y = self.bn(self.conv(x))
        return _Output([y], self.act(y))


def test_example_inputs_prove_what_symbolic_tracing_cannot():
    model = _LooksAtShapes().double()
    assert "cannot be traced" in convert(copy.deepcopy(model))["bn"]
    assert_converts(model, {"bn": RELU6}, x4())
    assert_converts(_LooksAtShapes(), {"bn": RELU6}, (x4(),))
    assert_converts(_LooksAtShapes(), {"bn": RELU6}, {"x": x4()})


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (_Derives, "what it does depends on a tensor's value (__bool__)"),
        (_DerivesBelow, "what it does depends on a tensor's value (item)"),
        (_Draws, "what it does depends on random numbers in Python"),
        (_DrawsFromNumPy, "what it does depends on random numbers in Python"),
        (_DrawsTensor, "it reads a tensor's value (__bool__)"),
        (_Packs, "its output has another use besides act"),
    ],
)
def test_example_inputs_do_not_prove_what_another_input_might_refute(cls, reason):
    assert_left(cls().double(), "bn", reason, x4())


@pytest.mark.parametrize("in_place", ["s += x", "s.add_(x)"])
def test_sum_in_place_that_only_an_example_shows_is_left(in_place):
    """After it, "y" holds the sum as well."""
    body = "assert x.shape[1] == 4", "y = self.bn(self.conv(x))", "s = y", in_place, "return F.relu(y)"
    model = model_with_forward(*body).double()
    native = copy.deepcopy(model)
    assert_left(model, "bn", "a sum in place follows it", x4())
    assert_same(model, native)


def test_sum_that_only_an_example_shows():
    body = "assert x.shape[1] == 4", "return F.relu(self.bn(self.conv(x)) + x)"
    assert_converts(model_with_forward(*body), {"bn": ADD_RELU}, x4())


def test_example_inputs_that_fail_prove_nothing():
    assert_left(
        _LooksAtShapes().double(), "bn", "the example inputs fail in training (ValueError: expected 4", x4()[:, :3]
    )


def test_model_that_cannot_be_copied():
    model = _LooksAtShapes().double()
    model.kept = model.conv.weight * 1
    assert_left(model, "bn", "the model cannot be copied to try it out (RuntimeError: Only Tensors created", x4())


def test_example_inputs_that_do_not_reach_a_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = _LooksAtShapes(), _LooksAtShapes()

        def forward(self, x):
            return self.used(x)

    outcomes = convert(Model().double(), x4())
    assert outcomes["used.bn"] == RELU6
    assert "the example inputs do not reach it in training" in outcomes["unused.bn"]


def test_example_inputs_leave_model_inputs_hooks_and_random_numbers_alone():
    class Model(_LooksAtShapes):
        calls = 0

        def forward(self, x):
            self.calls += 1
            torch.rand(1), random.random(), np.random.random()
            return super().forward(x.add_(1))

    model, x, seen = Model().double().eval(), x4(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    random.seed(0), np.random.seed(0)
    expected = random.random(), np.random.random()
    random.seed(0), np.random.seed(0)
    convert(model, x)
    assert (random.random(), np.random.random()) == expected
    assert torch.equal(x, x4())
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.calls, seen, model.training, model.bn.training) == (0, [], False, False)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
