"""Random forwards: whatever convert makes of them, they compute what they computed."""

import copy
import random
import sys

import pytest
import torch
from convert_models import convert, model_with_forward, x4
from helpers import examples
from torch import nn

import normfused

_STATEMENTS = [
    "{v} = self.conv{i}({u})",
    "{v} = self.bn{i}({u})",
    "{v} = self.bn{i}(self.conv{j}({u}))",
    "{v} = self.act{i}({u})",
    "{v} = self.act0(self.bn{i}({u}))",
    "{v} = F.relu(self.bn{i}(self.conv{j}({u})))",
    "{v} = F.silu(self.bn{i}({u}), inplace=True)",
    "{v} = F.relu6({u})",
    "F.relu_({u})",
    "{v} = {u}.relu_()",
    "{v} = F.relu(self.bn{i}(self.conv{j}({u})) + {w})",
    "{v} = self.act{i}({u} + {w})",
    "{v} = {u} + {w}",
    "{v} += {u}",
    "{v} += self.bn{i}({u})",
    "{v} = {u}",
    "{v} = {u}[:]",
    "{v} = self.same({u})",
    "{v} = {v} * 0.5 if self.training else F.relu({u})",
    "{v} = {u}.clamp(0, 6)",
]
# The shapes that convert is for, so that random programs hold many of them.
_BLOCKS = [
    ["{v} = self.bn{i}(self.conv{j}({u}))", "{v} += {w}", "{v} = self.act{i}({v})"],
    ["{v} = self.bn{i}(self.conv{j}({u}))", "{v} = F.relu({v} + {w})"],
    ["{v} = self.bn{i}(self.conv{j}({u}))", "{w} = {w} * 1.5", "{v} = self.act{i}({w} + {v})"],
    ["{v} = self.bn{i}({u})", "{v} = self.same({v})", "{v} = F.relu6({v})"],
]


def _program(seed):
    draw = random.Random(seed)
    # Where the shape is looked at, only an example shows anything.
    body = ["a = b = c = x * 1.0", *(["assert x.shape[1] == 4"] if seed % 2 else [])]
    for _ in range(draw.randint(2, 6)):
        names = {name: draw.choice("abc") for name in "uvw"}
        numbers = {name: draw.randint(0, 2) for name in "ij"}
        statements = draw.choice(_BLOCKS) if draw.random() < 0.4 else [draw.choice(_STATEMENTS)]
        body += [statement.format(**names, **numbers) for statement in statements]
    return [*body, draw.choice(["return a", "return a + b", "return a, b, c"])]


def _model(body):
    model = model_with_forward(*body)
    for i, activation in enumerate((nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish())):
        setattr(model, f"conv{i}", nn.Conv2d(4, 4, 1))
        setattr(model, f"bn{i}", nn.BatchNorm2d(4))
        setattr(model, f"act{i}", activation)
    model.same = nn.Identity()
    return model.double()


def _run(model):
    """Outputs and statistics in both modes, and gradients, or None where the program has none."""
    results = []
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            results.append(model(x4()))
    results.append(list(model.buffers()))
    try:
        y = model.train()(x4().requires_grad_())
        sum(t.square().mean() for t in (y if isinstance(y, tuple) else (y,))).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    except RuntimeError:  # In-place operations that autograd refuses.
        results.append(None)
    return results


@pytest.mark.skipif(sys.version_info < (3, 11), reason="finding a call in the source takes Python 3.11")
@pytest.mark.parametrize("part", range(4))
def test_random_forwards(part):
    fused = sums = 0
    for seed in range(100 * part, 100 * part + examples(100)):
        torch.manual_seed(seed)
        body = _program(seed)
        native = _model(body)
        for example_inputs in (None, x4()):
            model = copy.deepcopy(native)
            outcomes = convert(model, example_inputs)
            fused += sum(outcome.startswith("fused") for outcome in outcomes.values())
            sums += sum("add" in outcome for outcome in outcomes.values())
            ours, theirs = _run(copy.deepcopy(model)), _run(copy.deepcopy(native))
            if theirs[-1] is None or ours[-1] is None:
                # Where native has no gradients ours may: the operation in its way is gone. Never the reverse.
                assert theirs[-1] is None, body
                ours[-1] = theirs[-1]
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, msg=lambda m, body=body: f"{body}\n{m}")
            normfused.revert(model)
            assert torch.equal(_first(model.eval()(x4())), _first(native.eval()(x4())))
    assert fused > examples(30)
    assert sums > examples(3) - 1


def _first(y):
    return y[0] if isinstance(y, tuple) else y
