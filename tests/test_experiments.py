"""python -m bench experiment: what is run, written and resumed."""

import csv
import json

import pytest
import torch
from torch import nn

import normfused
from bench import experiments
from bench.__main__ import main
from bench.experiments import data, family, inference, initialisation, models, placement, record, regularisation

# Settings that make each a matter of seconds.
SMALL = {
    "placement": ["--seeds", "1", "--epochs", "2", "--width", "0.1", "--size", "8", "--batch", "8", "--limit", "16"],
    "regularisation": ["--epochs", "2", "--width", "0.1", "--size", "8", "--batch", "8", "--limit", "16"],
    "initialisation": ["--batches", "100", "--width", "8", "--size", "8"],
    "inference": ["--seeds", "1", "--epochs", "2", "--width", "4", "--size", "8", "--limit", "80"],
    "family": ["--seeds", "1", "--epochs", "2", "--width", "4", "--limit", "64"],
}
RUNS = {"placement": 2, "regularisation": 3, "initialisation": 16, "inference": 5, "family": 8}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few blocks to time, few images to try one by one."""
    monkeypatch.setattr(initialisation, "BLOCK", 2)
    monkeypatch.setattr(initialisation, "BLOCKS", 2)
    monkeypatch.setattr(inference, "TRIED", 4)
    monkeypatch.setattr(family, "ROUNDS", 1)
    monkeypatch.setitem(family.TIMED, "InstanceNorm2d", ((2, 64, 3, 3), *family.TIMED["InstanceNorm2d"][1:]))
    monkeypatch.setitem(family.TIMED, "LayerNorm", ((2, 3, 768), *family.TIMED["LayerNorm"][1:]))


def run(name, folder, *arguments):
    """Run a small experiment; returns (exit status, content of its JSON file)."""
    status = main(["experiment", name, *SMALL[name], "--out", str(folder), *arguments])
    file = folder / f"{name}.json"
    return status, json.loads(file.read_text()) if file.exists() else None


SLOW = ("family", "initialisation")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name in SLOW else ()) for name in experiments.NAMES]
)
def test_what_an_experiment_writes(name, tmp_path, capsys):
    status, content = run(name, tmp_path)
    assert status == 0
    printed = capsys.readouterr()
    trained = [entry for entry in content["runs"].values() if entry["history"]]
    assert len(trained) == RUNS[name]
    assert all(len(entry["history"]) == 2 and entry["result"] is not None for entry in trained)
    assert " s left" in printed.err
    page = (tmp_path / f"{name}.md").read_text()
    assert page.strip() == printed.out[printed.out.index("# normfused") :].strip()
    assert content["environment"]["command"] in page
    assert "scikit-learn's digits" in content["environment"]["data"]
    for claim in content["claims"]:
        row = next(line for line in page.splitlines() if line.startswith(f"| {claim['about']} |"))
        assert claim["published"] in row
        assert row.rstrip("| ").strip("*").endswith(claim["verdict"])
        assert claim["verdict"] == {True: "confirmed", False: "differs", None: "not tested"}[claim["holds"]]
    with open(tmp_path / f"{name}.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * RUNS[name]
    losses = [line["loss"] for entry in trained for line in entry["history"]]
    assert [line["loss"] for line in lines] == ["" if loss is None else str(loss) for loss in losses]
    pictures = list(tmp_path.glob("*.png"))
    assert pictures
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    if name in ("placement", "regularisation"):
        assert "Asserted: 35 norm/activation pairs" in page
        assert "17 projections" in page
    if name == "regularisation":
        weights = trained[0]["history"][0]["weights"]
        assert len(weights) == 10
        assert " ".join(f"{weight:+.4f}" for weight in weights) in printed.out
    if name == "inference":
        assert "Missing key(s) in state_dict" in page
    if name == "family":
        timed = content["runs"]["speed"]["result"]
        assert len(timed) == 6
        assert all(times["native"] > 0 < times["ours"] for times in timed.values())
        silu = timed["LayerNorm 2×3×768, silu"]
        assert f"silu {silu['ours'] / silu['native']:.2f}" in page


class Cut(BaseException):
    """What stops a run from outside."""


def histories(content):
    """Names of runs and their histories without times."""
    return {
        name: [{key: value for key, value in line.items() if key != "seconds"} for line in entry["history"]]
        for name, entry in content["runs"].items()
    }


@pytest.mark.parametrize("stop", [KeyboardInterrupt, pytest.param(Cut, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(("name", "batches"), [("placement", 7), ("inference", 5)])
def test_resumed_is_as_uninterrupted(name, batches, stop, tmp_path, monkeypatch):
    _, whole = run(name, tmp_path / "whole")
    stream, seen = data.Images.stream, []

    def cut(self, *arguments):
        for batch in stream(self, *arguments):
            seen.append(1)
            if len(seen) > batches:  # of placement the middle of an epoch
                raise stop
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(data.Images, "stream", cut)
        if stop is KeyboardInterrupt:
            assert run(name, tmp_path / "cut")[0] == 130
        else:
            with pytest.raises(Cut):
                run(name, tmp_path / "cut")
    before = json.loads((tmp_path / "cut" / f"{name}.json").read_text())
    assert 0 < sum(map(len, histories(before).values())) < sum(map(len, histories(whole).values()))
    status, resumed = run(name, tmp_path / "cut", "--resume")
    assert status == 0
    assert histories(resumed) == histories(whole)
    for a, b in zip(whole["claims"], resumed["claims"], strict=True):
        assert a == b


@pytest.mark.thorough
def test_what_is_finished_is_not_computed_again(tmp_path, monkeypatch):
    _, first = run("family", tmp_path)
    monkeypatch.setattr(data.Images, "stream", lambda *_: iter(()))
    _, second = run("family", tmp_path, "--resume")
    assert first["runs"] == second["runs"]
    with pytest.raises(StopIteration):
        run("family", tmp_path)


def test_more_seeds_go_on_and_other_options_do_not(tmp_path, capsys):
    _, one = run("placement", tmp_path)
    arguments = ["experiment", "placement", *SMALL["placement"], "--out", str(tmp_path), "--resume"]
    assert main([*arguments, "--seeds", "2"]) == 0
    two = json.loads((tmp_path / "placement.json").read_text())
    assert len(two["runs"]) == 4
    assert all(two["runs"][name] == entry for name, entry in one["runs"].items())
    with pytest.raises(SystemExit):
        main([*arguments, "--lr", "0.5"])
    assert "was made with --lr 0.003, not 0.5" in capsys.readouterr().err
    (tmp_path / "placement.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "is not what `python -m bench experiment` wrote" in capsys.readouterr().err


def test_only_the_speed(tmp_path):
    status, content = run("initialisation", tmp_path, "--speed-only")
    assert status == 0
    assert list(content["runs"]) == ["speed"]
    assert not list(tmp_path.glob("*.png"))
    assert len(content["claims"]) in (1, 2)
    for repeats in content["runs"]["speed"]["result"]["repeats"].values():
        assert len(repeats) == initialisation.REPEATS
        assert all(repeat[network] > 0 for repeat in repeats for network in initialisation.NETWORKS)


def test_time_that_batch_norm_adds():
    # The third turn is twice as slow, and what BN adds in it is no outlier: turns are compared, not their medians.
    repeat = initialisation._repeat({"without": [1, 1, 9], "native": [3, 5, 11], "normfused": [2, 2, 10]})
    assert (repeat["native"], repeat["native adds"], repeat["normfused adds"]) == (5, 2, 1)
    assert initialisation.added(repeat) == 0.5
    assert initialisation.added({"native adds": 0.0, "normfused adds": 1.0}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: experiment"),
        (["place"], "invalid choice: 'place'"),
        (["placement", "--epochs", "0"], "expected a positive integer, got '0'"),
        (["placement", "--lr", "nan"], "expected a positive number, got 'nan'"),
        (["placement", "--batches", "5"], "unrecognized arguments: --batches 5"),
        (["placement", "--data", "no/such/folder"], "no/such/folder is not a folder"),
        (["placement", "--limit", "20"], "20 images to train on are too few for a batch of 32"),
        (["family", "--limit", "20"], "20 images to train on are too few for a batch of 32"),
        (["family", "--width", "6"], "--width 6 is not a multiple of 4"),
    ],
)
def test_wrong_arguments_end_with_a_message(arguments, message, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if len(arguments) > 1 else []
    with pytest.raises(SystemExit) as ended:
        main(["experiment", *arguments, *out])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("order", placement.ORDERS)
def test_the_network_of_the_write_up(order, size):
    torch.manual_seed(0)
    model = placement.network(order, 10, 0.1)
    assert "35 norm/activation pairs" in placement.check(model, order)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    other = next(name for name in placement.ORDERS if name != order)
    with pytest.raises(AssertionError, match="0 pairs and 17 projections"):
        placement.check(model, other)
    padding = [m for m in model.modules() if isinstance(m, models.StridePad)]
    assert len(padding) == 5  # of the stem too
    model.features[2][2] = nn.Identity()
    with pytest.raises(AssertionError, match="3 of 4 strided"):
        placement.check(model, order)


@pytest.mark.parametrize(("size", "before"), [(8, 0), (7, 1)])
def test_zeros_before_a_strided_convolution_are_those_of_keras(size, before):
    """keras.applications.imagenet_utils.correct_pad: ((0, 1), (0, 1)) for even sizes, ((1, 1), (1, 1)) for odd ones."""
    padded = models.StridePad()(torch.ones(1, 1, size, size))
    assert padded.shape == (1, 1, size + 1 + before, size + 1 + before)
    assert padded[0, 0, before : before + size, before : before + size].eq(1).all()
    assert padded.sum() == size * size


def test_both_orders_start_from_the_same_weights():
    networks = []
    for order in placement.ORDERS:
        torch.manual_seed(3)
        networks.append(placement.network(order, 10, 0.1))
    first, second = (network.state_dict() for network in networks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_penalty_spares_batch_norm():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), normfused.BatchNormAct2d(2), nn.Flatten(), nn.Linear(2, 3))
    regularisation.penalty(model).backward()
    for module in (model[0], model[3]):
        for parameter in module.parameters():
            torch.testing.assert_close(parameter.grad, 2 * 0.001 * parameter.detach())
    assert model[1].weight.grad is None
    assert model[1].bias.grad is None


def test_the_best_epoch_is_the_first_of_equals():
    history = [{"epoch": n + 1, "accuracy": value} for n, value in enumerate((0.5, 0.7, 0.7, 0.6))]
    assert placement._best(history) == (0.7, 2)


def test_frozen_batch_norm_stays_in_evaluation():
    model = inference.Classifier(1, 2, 4)
    model.frozen = True
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert model.training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_every_member_of_the_family_is_checked():
    checks = family.check(1)
    for member in checks["members"].values():
        assert max(member.values()) < family.ROUNDING
    shifted = family.Member("too few", family.SHAPE, (2,), None, None)
    x = family.tensor(1)
    assert family._apart(family.normalised(x, shifted), family.FAMILY["BatchNorm"].ours()(x)) > 0.1


def test_a_claim_that_cannot_be_told_says_so():
    verdicts = [record.Claim("", "", "", holds).verdict for holds in (True, False, None)]
    assert verdicts == ["confirmed", "**differs**", "not tested"]
