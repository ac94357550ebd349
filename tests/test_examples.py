"""Every script in examples/ runs, and does what it says; so does every example in docs/distributed.md."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name; skips where a package that it needs is not installed."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name, *needs):
        for package in needs:
            pytest.importorskip(package)
        return importlib.import_module(name)

    return load


def assert_learns(losses):
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["amp", "channels_last"])
def test_it_learns(example, name):
    assert_learns(example(name).main())


def test_checkpointing(example):
    results = example("checkpointing").main()
    losses, running_var = results["plain"]
    assert_learns(losses)
    for other_losses, other_var in results.values():
        assert other_losses == losses
        assert torch.equal(other_var, running_var)


@pytest.mark.thorough
def test_ddp(example):
    model, untrained = example("ddp").main(), example("data").network()
    assert not torch.equal(model[0][0].weight, untrained[0][0].weight)
    assert model[0][1].num_batches_tracked == 12


def test_ema(example):
    right, model = example("ema").main()
    assert right > 0.7
    assert type(model[0][1]) is nn.BatchNorm2d


def test_resume(example):
    losses, expected = example("resume").main()
    assert losses == pytest.approx(expected, rel=1e-3)


def test_lightning_trainer(example):
    module = example("lightning_trainer", "lightning")
    assert_learns(module.main())


def test_timm_training(example):
    losses, model = example("timm_training", "timm").main()
    assert_learns(losses)
    assert not any(type(layer).__module__.startswith("normfused") for layer in model.modules())


def test_transformers_trainer(example):
    losses, model, plain = example("transformers_trainer", "transformers", "accelerate").main()
    assert_learns(losses)
    pixels = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(plain.eval()(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_docs(block):
    exec(compile(block, "docs/distributed.md", "exec"), {})


def test_scripts_are_short():
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text().splitlines()) <= 60, script.name
