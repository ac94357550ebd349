"""python -m bench model and memory: training steps of whole models."""

import csv
import gc
import json

import pytest

import normfused
from bench import model
from bench.__main__ import main
from bench.mobilenet_v2 import MobileNetV2


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setitem(model.MODELS, "mobilenet_v2", lambda classes: MobileNetV2(classes, width=0.25))
    monkeypatch.setitem(model.MODELS, "resnet50", lambda classes: MobileNetV2(classes, width=0.5))
    # Outputs of a real model are larger than what is kept by default.
    monkeypatch.setitem(normfused.recompute_activations.__wrapped__.__kwdefaults__, "min_bytes", 0)


@pytest.mark.thorough
def test_model_measures_every_variant_on_a_small_one(small_models, tmp_path):
    arguments = ["model", "--size", "32", "--batch", "2", "--steps", "2", "--layout", "contiguous"]
    variants = [name for name in model.VARIANTS if "compile" not in name]
    assert main([*arguments, "--variant", *variants, "--out", str(tmp_path)]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "model.json").read_text())["rows"]}
    assert [row["failure"] for row in rows.values()] == [None] * len(variants)
    kept = {name: row["kept_bytes"] for name, row in rows.items()}
    # The convolutions keep no output of a fused layer, checkpoints keep the inputs of blocks alone.
    assert kept["normfused-recompute"] < 0.75 * kept["normfused"] <= 0.75 * kept["native"]
    assert kept["native-checkpoint"] < kept["native"] / 2
    page = (tmp_path / "model.md").read_text()
    assert all(name in page for name in variants)


def test_model_tells_why_a_variant_failed(small_models, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(model.VARIANTS, "native-compile", model.Variant("compiled", fail))
    arguments = ["model", "--size", "32", "--batch", "2", "--steps", "1", "--layout", "contiguous"]
    assert main([*arguments, "--variant", "native", "native-compile", "--out", str(tmp_path)]) == 0
    assert "failed: RuntimeError: no compiler here" in (tmp_path / "model.md").read_text()


SMALL = ("--size", "32", "--batch", "2", "4")


@pytest.mark.thorough
def test_memory_of_both_models_in_every_variant_and_batch(small_models, tmp_path, capsys):
    assert main(["memory", *SMALL, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "memory.json").read_text())
    rows = {(row["model"], row["batch"], row["variant"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 2 * 2 * 4
    for (name, batch, variant), row in rows.items():
        assert row["failure"] is None
        assert 0 < row["kept_bytes"] < row["peak_bytes"]
        if variant != "native":
            assert row["kept_bytes"] < rows[name, batch, "native"]["kept_bytes"]
    # What is kept for the backward pass grows with the batch, and nothing else does.
    for name in ("mobilenet_v2", "resnet50"):
        one, two = (rows[name, batch, "native"]["kept_bytes"] for batch in (2, 4))
        assert 1.9 * one < two <= 2 * one
    page = (tmp_path / "memory.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert page.count("| native | ") == 4
    lines = list(csv.DictReader((tmp_path / "memory.csv").open()))
    assert [int(line["peak_bytes"]) for line in lines] == [row["peak_bytes"] for row in content["rows"]]


@pytest.mark.thorough
def test_memory_is_the_same_whenever_garbage_is_collected(small_models, tmp_path, monkeypatch):
    def rows(name):
        assert main(["memory", *SMALL, "--model", "mobilenet_v2", "--out", str(tmp_path / name)]) == 0
        return json.loads((tmp_path / name / "memory.json").read_text())["rows"]

    first = rows("first")
    # The worst moment: what `convert` left, and with it a trained model, goes while the next one is measured.
    forward = model.Training.forward
    monkeypatch.setattr(model.Training, "forward", lambda training: (gc.collect(), forward(training))[1])
    gc.disable()
    try:
        assert rows("second") == first
    finally:
        gc.enable()


@pytest.mark.thorough
def test_memory_resumes_what_is_missing(small_models, tmp_path, monkeypatch):
    arguments = ["memory", "--size", "32", "--model", "mobilenet_v2", "--out", str(tmp_path), "--variant", "native"]
    assert main([*arguments, "--batch", "2"]) == 0
    measured, training = [], model.Training

    def counted(*args):
        measured.append(args[0])
        return training(*args)

    monkeypatch.setattr(model, "Training", counted)
    assert main([*arguments, "--batch", "2", "4", "--resume"]) == 0
    assert measured == ["native"]
    assert [row["batch"] for row in json.loads((tmp_path / "memory.json").read_text())["rows"]] == [2, 4]


def test_memory_tells_why_a_variant_failed(small_models, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(model.VARIANTS, "native-checkpoint", model.Variant("checkpointed", fail))
    arguments = ["memory", "--size", "32", "--batch", "2", "--model", "resnet50", "--out", str(tmp_path)]
    assert main([*arguments, "--variant", "native-checkpoint", "normfused"]) == 0
    page = (tmp_path / "memory.md").read_text()
    assert page.count("failed: RuntimeError: out of memory") == 1
    assert page.count("| normfused | ") == 1
