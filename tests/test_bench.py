"""python -m bench: what it writes, what it counts, and what the demo accepts."""

import csv
import gc
import io
import json
import math
import sys
import types

import pytest
import torch

import normfused
from bench import cases, check, memory, ops, providers, report, timing, training
from bench.__main__ import main

MIB = 1 << 20


def run_ops(folder, *arguments):
    """Run ``python -m bench ops`` on small cases; returns (exit status, content of ops.json)."""
    status = main(["ops", "--seconds", "0.05", "--out", str(folder), *arguments])
    return status, json.loads((folder / "ops.json").read_text())


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ops")
    shapes = ("--batch", "2", "--shape", "8,6", "5,7", "--providers", "eager", "normfused")
    return folder, *run_ops(folder, *shapes)


def test_every_case_is_measured_in_every_layout_dtype_and_mode(small_run):
    _, status, content = small_run
    assert status == 0
    ours = [row for row in content["rows"] if row["provider"] == "normfused"]
    assert [row["failure"] for row in content["rows"]] == [None] * len(content["rows"])
    keys = {(tuple(row["shape"]), row["layout"], row["dtype"], row["mode"]) for row in ours}
    assert len(ours) == len(keys) == 2 * 2 * 2 * 2
    assert {row["mode"] for row in ours} == {"forward", "forward+backward"}
    assert {row["provider"] for row in content["rows"]} == {"eager", "normfused", "copy_fresh", "copy_mapped"}


def test_ratios_bandwidths_and_copies_follow_from_the_medians(small_run):
    _, _, content = small_run
    for found in report.by_case(content["rows"]).values():
        ours, eager, mapped = found["normfused"], found["eager"], found["copy_mapped"]
        assert ours["ratio"] == {"eager": pytest.approx(eager["median_s"] / ours["median_s"])}
        assert eager["ratio"] == {"normfused": pytest.approx(ours["median_s"] / eager["median_s"])}
        assert ours["copies"] == pytest.approx(ours["median_s"] / mapped["median_s"])
        assert ours["gb_per_s"] == pytest.approx(ours["floor_bytes"] / ours["median_s"] / 1e9)
        assert ours["fraction"] == pytest.approx(ours["gb_per_s"] / mapped["gb_per_s"])
        assert ours["q25_s"] <= ours["median_s"] <= ours["q75_s"]
        assert ours["rounds"] >= 5


def test_geometric_means_and_losing_rows_follow_from_the_ratios(small_run):
    _, _, content = small_run
    ours = [row for row in content["rows"] if row["provider"] == "normfused"]
    for mean in content["geometric_means"]:
        same = ("layout", "dtype", "mode")
        fractions = [row["fraction"] for row in ours if all(row[name] == mean[name] for name in same)]
        assert mean["fraction"] == pytest.approx(math.sqrt(fractions[0] * fractions[1]))
        ratios = [row["ratio"]["eager"] for row in ours if all(row[name] == mean[name] for name in same)]
        assert mean["cases"] == len(ratios) == 2
        assert mean["eager"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
        assert mean["compile"] is None
    assert len(content["losing"]) == sum(row["ratio"]["eager"] < 1 for row in ours)


def test_the_three_files_say_the_same(small_run):
    folder, _, content = small_run
    lines = list(csv.DictReader(io.StringIO((folder / "ops.csv").read_text())))
    assert [float(line["median_s"]) for line in lines] == [row["median_s"] for row in content["rows"]]
    assert [line["provider"] for line in lines] == [row["provider"] for row in content["rows"]]
    page = (folder / "ops.md").read_text()
    assert f"{len(content['losing'])} of 16" in page
    assert content["environment"]["command"] in page
    assert content["environment"]["torch"] == torch.__version__
    lost = [(line["family"], line["shape"], line["loses_to"]) for line in lines if line["loses_to"]]
    assert len(lost) == len(content["losing"]) == page.count("| **")


def test_the_better_peer_decides_what_is_lost():
    case = cases.Case("batch_norm", (1, 1, 2, 2), "float32", "contiguous")
    seconds = {"eager": 3.0, "compile": 1.0, "normfused": 2.0}
    timings = {name: timing.summarise([value]) for name, value in seconds.items()}
    rows = ops.make_rows(case, "forward", timings, {})
    (lost,) = report.losing(rows)
    assert lost[:2] == (0.5, "compile")
    (mean,) = report.geometric_means(rows)
    assert (mean["eager"], mean["compile"]) == (pytest.approx(1.5), pytest.approx(0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--shape", "96"], "or C,HW such as 96,56, got '96'"),
        (["ops", "--shape", "0,7"], "or C,HW such as 96,56, got '0,7'"),
        (["ops", "--shape", "1,2,3"], "expected N,C,H,W"),
        (["ops", "--shape", "1,2,3,4", "96,56"], "--shape N,C,H,W does not go with --shape C,HW"),
        (["ops", "--shape", "1,2,3,4", "--batch", "8"], "does not go with"),
        (["ops", "--shape", "1,6,3,4", "--groups", "4"], "6 channels do not divide into 4 groups"),
        (["ops", "--shape", "1,6,3,4", "--groups", "3", "--residual"], "--residual is BatchNorm's"),
        (["ops", "--groups", "4"], "need --shape N,C,H,W"),
        (["compare", "no/such/file", "neither"], "is not a file that `python -m bench ops` wrote"),
        (["ops", "--batch", "-1"], "expected a positive number"),
        (["ops", "--seconds", "nan"], "expected a positive number"),
        (["ops", "--providers", "cudnn"], "invalid choice: 'cudnn'"),
        (["ops", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["ops", "--family", "tiny", "--shape", "8,8"], "--shape C,HW needs families of such shapes"),
        (["ops", "--family", "tiny", "--batch", "8"], "--batch does not apply to the tiny family"),
        (["ops", "--family", "tiny", "--mode", "forward"], "no case is left"),
        (["ops", "--family", "group_norm", "--shape", "48,8"], "48 channels do not divide into 32 groups"),
        (["demo", "--steps", "0"], "expected a positive number"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_arguments_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_provider_that_raises_becomes_a_row(tmp_path, monkeypatch):
    def broken(case, device, training):
        raise OSError("no such device")

    monkeypatch.setitem(providers.PROVIDERS, "compile", broken)
    status, content = run_ops(tmp_path, "--shape", "4,3", "--batch", "2", "--dtype", "float32", "--mode", "forward")
    assert status == 0
    failed = [row for row in content["rows"] if row["failure"]]
    assert [(row["provider"], row["failure"]) for row in failed] == [("compile", "OSError: no such device")] * 2
    assert "OSError: no such device" in (tmp_path / "ops.md").read_text()
    assert sum(row["provider"] == "normfused" and row["median_s"] > 0 for row in content["rows"]) == 2


def test_a_provider_with_wrong_numbers_becomes_a_row(tmp_path, monkeypatch):
    def wrong(case, device, training):
        layer = providers.eager(case, device, training)
        return providers.Layer(lambda x: layer.run(x) * 1.01, layer.parameters)

    monkeypatch.setitem(providers.PROVIDERS, "compile", wrong)
    _, content = run_ops(tmp_path, "--shape", "4,3", "--batch", "2", "--dtype", "float32", "--mode", "forward")
    failures = [row["failure"] for row in content["rows"] if row["provider"] == "compile"]
    assert len(failures) == 2
    assert all("y: " in failure and "elements wrong" in failure for failure in failures)


def test_a_case_for_which_there_is_no_memory_becomes_rows(tmp_path, monkeypatch):
    inputs = cases.inputs

    def too_large(case, *rest):
        if case.shape[1] == 5:
            raise RuntimeError("CUDA out of memory")
        return inputs(case, *rest)

    monkeypatch.setattr(cases, "inputs", too_large)
    small = ("--batch", "2", "--dtype", "float32", "--layout", "contiguous", "--providers", "eager", "normfused")
    status, content = run_ops(tmp_path, "--shape", "5,3", "4,3", *small)
    assert status == 0
    failures = {(row["shape"][1], row["failure"]) for row in content["rows"]}
    assert failures == {(4, None), (5, "RuntimeError: CUDA out of memory")}


def test_interruption_keeps_what_was_measured_and_resuming_measures_the_rest(tmp_path, monkeypatch):
    measure, begun = ops.measure, []

    def interrupted(case, *rest, **options):
        begun.append(case)
        if len(begun) == 2:
            raise KeyboardInterrupt
        yield from measure(case, *rest, **options)

    monkeypatch.setattr(ops, "measure", interrupted)
    small = ("--batch", "2", "--dtype", "float32", "--layout", "contiguous", "--providers", "eager", "normfused")
    status, content = run_ops(tmp_path, "--shape", "4,3", "5,3", "6,3", *small)
    assert status == 130
    first = {tuple(row["shape"]) for row in content["rows"]}
    assert first == {begun[0].shape}
    assert "Interrupted" in (tmp_path / "ops.md").read_text()

    status, resumed = run_ops(tmp_path, "--shape", "4,3", "5,3", "6,3", *small, "--resume")
    assert status == 0
    assert {case.shape for case in begun[2:]} == {(2, c, 3, 3) for c in (4, 5, 6)} - first
    assert [row["shape"][1] for row in resumed["rows"] if row["provider"] == "normfused"] == [4, 4, 5, 5, 6, 6]
    assert all(row in resumed["rows"] for row in content["rows"])


def test_resuming_elsewhere_is_refused(tmp_path, capsys):
    arguments = ("--family", "tiny", "--providers", "eager")
    _, content = run_ops(tmp_path, *arguments)
    content["environment"]["torch"] = "2.0"
    (tmp_path / "ops.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        run_ops(tmp_path, *arguments, "--resume")
    assert ended.value.code == 2
    assert "measured under other conditions (torch)" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_layer_of_ones_own_in_every_mode(tmp_path):
    modes = ("forward", "eval", "backward", "forward+backward")
    arguments = ("--residual", "--activation", "relu", "--dtype", "fp16", "bf16", "--providers", "eager", "normfused")
    _, content = run_ops(tmp_path, "--shape", "3,6,7,7", "2,3,4,5,6", *arguments, "--mode", *modes)
    ours = [row for row in content["rows"] if row["provider"] == "normfused"]
    assert [row["failure"] for row in content["rows"]] == [None] * len(content["rows"])
    assert len(ours) == 2 * 2 * 2 * 4
    assert {row["layer"] for row in ours} == {"BatchNorm + residual + relu"}
    tensors = {row["mode"]: row["floor_bytes"] // (3 * 6 * 7 * 7 * 2) for row in ours if row["shape"] == [3, 6, 7, 7]}
    assert tensors == {"forward": 3, "eval": 3, "backward": 4, "forward+backward": 7}


def test_group_norm_of_ones_own_and_providers_that_are_not_here(tmp_path):
    arguments = ("--groups", "3", "--activation", "silu", "--layout", "channels_last", "--mode", "eval", "backward")
    asked = ("eager", "triton", "path-block", "liger", "inplace_abn", "normfused")
    _, content = run_ops(tmp_path, "--shape", "2,6,5,5", *arguments, "--providers", *asked)
    failures = {row["provider"]: row["failure"] for row in content["rows"]}
    for name in ("triton", "path-block"):
        assert failures.pop(name).startswith("not on this device: ")
    assert failures.pop("liger").startswith("liger_kernel does not import")
    assert failures == {"eager": None, "normfused": None, "copy_fresh": None, "copy_mapped": None}
    page = (tmp_path / "ops.md").read_text()
    assert page.count("not on this device") == 2  # a line for both modes
    assert "GroupNorm/3 + silu" in page


@pytest.mark.parametrize("name", ["liger", "inplace_abn", "apex"])
def test_a_peer_that_is_installed(name, monkeypatch):
    class Norm(torch.nn.GroupNorm):
        def __init__(self, *sizes, eps, **options):
            channels = sizes[1] if name == "apex" else sizes[0]
            super().__init__(channels if name == "inplace_abn" else 3, channels, eps=eps)
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    package = types.ModuleType(name)
    package.LigerGroupNorm = package.InPlaceABN = package.GroupNorm = Norm
    modules = {"liger": "liger_kernel.transformers.group_norm", "apex": "apex.contrib.group_norm"}
    monkeypatch.setitem(sys.modules, modules.get(name, name), package)
    groups = None if name == "inplace_abn" else 3
    case = cases.Case("own", (2, 6, 5, 5), "float32", "channels_last", groups, "relu6" if groups is None else None)
    assert providers.applies(name, case)
    layer = providers.PROVIDERS[name](case, "cpu", True)
    x = cases.inputs(case).x
    expected = torch.nn.functional.group_norm(x, groups or 6, *layer.parameters, providers.EPS)
    torch.testing.assert_close(layer.run(x), expected.clamp(0, 6) if groups is None else expected)


@pytest.mark.parametrize(("name", "index", "where"), [("y", 0, 5), ("dx", 1, 7), ("dweight", 2, 1), ("dbias", 3, 2)])
@pytest.mark.parametrize(
    ("groups", "activation", "residual", "pre_activation"),
    [
        (None, "relu6", False, None),
        (None, "relu", True, None),
        (None, None, False, "relu6"),
        (2, None, False, None),
        (2, "silu", False, None),
    ],
)
@pytest.mark.parametrize("value", [1e3, math.nan])
def test_the_check_finds_one_wrong_element(name, index, where, groups, activation, residual, pre_activation, value):
    case = cases.Case(
        "own", (2, 4, 5, 5), "float32", "channels_last", groups, activation, residual, pre_activation=pre_activation
    )
    inputs = cases.inputs(case)
    layer = providers.eager(case, "cpu", True)
    y = layer.run(*inputs.arguments)
    gradients = torch.autograd.grad(y, providers.wanted(inputs, layer.parameters), inputs.dy)
    result = [y.detach().clone(), *(gradient.clone() for gradient in gradients)]
    assert check.check(case, inputs, layer.parameters, {"eager": result}) == {"eager": None}
    flat = result[index].permute(0, 2, 3, 1).reshape(-1) if result[index].dim() == 4 else result[index]
    flat[where] = value
    assert check.check(case, inputs, layer.parameters, {"eager": result})["eager"].startswith(f"{name}: 1 of ")


@pytest.mark.parametrize(
    ("groups", "activation", "pre_activation"), [(None, "relu6", None), (None, None, "relu6"), (2, "relu6", None)]
)
def test_the_check_of_evaluation_uses_the_running_statistics(groups, activation, pre_activation):
    case = cases.Case("own", (2, 4, 5, 5), "float32", "contiguous", groups, activation, pre_activation=pre_activation)
    inputs, statistics = cases.inputs(case), providers.statistics(case, "cpu")
    layer = providers.eager(case, "cpu", False)
    y = layer.run(inputs.x).detach()
    assert check.check(case, inputs, layer.parameters, {"eager": (y,)}, statistics) == {"eager": None}
    y.view(-1)[7] += 1e-2
    assert check.check(case, inputs, layer.parameters, {"eager": (y,)}, statistics)["eager"].startswith("y: 1 of ")


def test_only_ours_has_to_keep_the_memory_format():
    case = cases.Case("own", (2, 4, 5, 5), "float32", "channels_last")
    inputs, statistics = cases.inputs(case), providers.statistics(case, "cpu")
    layer = providers.eager(case, "cpu", False)
    y = layer.run(inputs.x).detach().contiguous()
    verdicts = check.check(case, inputs, layer.parameters, {"eager": (y,), "normfused": (y,)}, statistics)
    assert verdicts == {"eager": None, "normfused": "y is not channels_last as x is"}


def test_floor_bytes():
    case = cases.Case("batch_norm", (32, 96, 112, 112), "float32", "contiguous")
    assert case.bytes == 154_140_672
    assert case.floor_bytes("forward") == 2 * case.bytes
    assert case.floor_bytes("forward+backward") == 5 * case.bytes
    half = cases.Case("batch_norm", (32, 96, 112, 112), "bfloat16", "contiguous")
    assert 2 * half.bytes == case.bytes


def test_cases_cover_the_table():
    assert len(cases.select(["batch_norm"])) == 12 * 2 * 2
    assert len(cases.select(["group_norm"])) == 3 * 2
    assert {case.layer for case in cases.select(["pre_activation"])} == {"relu6 + BatchNorm"}
    assert [case.form for case in cases.select(["tiny"])] == ["functional", "module"]
    assert len(set(cases.select(cases.DEFAULT_FAMILIES["cpu"]))) == 48 + 6 + 2
    on_gpu = set(cases.select(["batch_norm"], batches=(32, 128, 256), device_type="cuda"))
    assert len(on_gpu) == 12 * 3 * 3 * 2
    diffusion = {case.shape for case in cases.select(["diffusion"], device_type="cuda")}
    assert {(2, 320, 64, 64), (16, 1280, 8, 8)} <= diffusion
    assert {case.shape for case in cases.select(["video"], device_type="cuda")} == {(1, 128, 20, 256, 256)}
    assert sum(case.residual for case in cases.select(["resnet50"], dtypes=["float32"], layouts=["contiguous"])) == 4


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_inputs_have_the_case_layout(layout, shape):
    case = cases.Case("own", shape, "bfloat16", layout, residual=True)
    inputs = cases.inputs(case)
    twin = inputs.clone()
    for name in ("x", "dy", "residual"):
        tensor, other = getattr(inputs, name), getattr(twin, name)
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=cases.memory_format(case))
        assert tensor.requires_grad == (name != "dy")
        assert torch.equal(other, tensor)
        assert other.stride() == tensor.stride()
        assert other.requires_grad == tensor.requires_grad
        assert other.data_ptr() != tensor.data_ptr()


def test_interleaved_timing_with_a_known_clock():
    now = 0.0

    def takes(seconds):
        def function():
            nonlocal now
            now += seconds

        return function

    functions = {"slow": takes(0.5), "fast": takes(1e-4), "broken": lambda: 1 / 0}
    timers = {name: timing.HostTimer(function, clock=lambda: now) for name, function in functions.items()}
    # Of these calls only what comes after the setup counts.
    timers["half"] = timing.HostTimer(lambda _: takes(0.25)(), takes(0.25), clock=lambda: now)
    timings, failures = timing.interleave(
        timers, 18.0, clock=lambda: now
    )  # a round takes 3: each block comes after two calls
    assert timings["slow"].median == pytest.approx(0.5)
    assert timings["fast"].median == pytest.approx(1e-4)
    assert timings["slow"].repeats == 1
    assert timings["fast"].repeats >= 20
    assert timings["half"].median == pytest.approx(0.25)
    assert timings["slow"].rounds == timings["fast"].rounds == 6
    assert failures == {"broken": "ZeroDivisionError: division by zero"}


def test_quartiles():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Timing(3.0, 2.0, 4.0, 5, 1)
    assert timing.summarise([1.0, 3.0, 2.0]).iqr == 1.0


def test_peak_memory_of_a_known_pattern():
    def pattern():
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(4 * MIB, dtype=torch.uint8)
        del first
        third = torch.empty(2 * MIB, dtype=torch.uint8)
        del second
        return third

    assert memory.peak_memory(pattern) == 6 * MIB


def test_peak_memory_counts_what_normfused_keeps():
    x = torch.randn(1, 4, MIB)

    def pattern():
        return normfused.functional.group_norm_act(x, 4)

    pattern()  # leaves its memory for the next one
    assert 16 * MIB <= memory.peak_memory(pattern) < 17 * MIB


def test_peak_memory_ignores_what_was_there_before():
    held = [torch.empty(8 * MIB, dtype=torch.uint8)]

    def pattern():
        held.clear()
        return torch.empty(MIB, dtype=torch.uint8)

    assert memory.peak_memory(pattern) == MIB
    assert memory.peak_memory(lambda: None) == 0


def cyclic_garbage(size):
    """``size`` bytes that only the garbage collector frees."""
    held = [torch.empty(size, dtype=torch.uint8)]
    held.append(held)


def test_memory_does_not_depend_on_the_garbage_collector():
    assert memory.peak_memory(lambda: cyclic_garbage(8 * MIB)) == 8 * MIB
    # What is left from before, and was counted there, is not taken off.
    assert memory.kept_memory(lambda: (gc.collect(), torch.empty(MIB, dtype=torch.uint8))) == MIB

    def pattern():
        cyclic_garbage(MIB)
        objects = [[] for _ in range(100_000)]  # the collector would run
        return objects, torch.empty(MIB, dtype=torch.uint8)

    assert memory.peak_memory(pattern) == 2 * MIB
    assert gc.isenabled()


def losses(*, first=0.0, later=0.0, steps=40):
    """2, 1.99, ...; one of the first twenty moved by ``first`` (relative), one of the later ones by ``later``."""
    values = [2 - 0.01 * step for step in range(steps)]
    values[7] *= 1 + first
    if steps > 20:
        values[30] += later
    return values


@pytest.mark.parametrize(
    ("fused", "moved", "reason"),
    [
        ({}, {"later": 1e-3}, None),
        ({"first": 9e-4}, {"later": 1e-3}, None),
        ({"first": 2e-3}, {"later": 1e-3}, "the first 20 losses differ by up to 2.0e-03"),
        ({"first": -2e-3}, {"first": 5e-3, "later": 1e-3}, "the first 20 losses"),
        ({"later": 1.9e-3}, {"later": 1e-3}, None),
        ({"later": 2.1e-3}, {"later": -1e-3}, "later losses drift by 2.1e-03, more than 2 times one ulp's 1.0e-03"),
        ({"later": math.nan}, {"later": 1e-3}, "a loss is not finite"),
        ({"later": math.inf}, {"later": math.inf}, "a loss is not finite"),
    ],
)
def test_agreement_of_losses(fused, moved, reason):
    judged = training.agreement(losses(), losses(**fused), losses(**moved))
    assert judged.accepted == (reason is None)
    if reason is not None:
        assert judged.why_not.startswith(reason)


def test_agreement_without_later_steps_judges_the_first_only():
    judged = training.agreement(*(losses(steps=20) for _ in range(3)))
    assert (judged.accepted, judged.drift) == (True, None)
    with pytest.raises(ValueError, match="as many losses"):
        training.agreement([1.0], [1.0, 2.0], [1.0])


def test_moved_by_one_ulp():
    model = torch.nn.Linear(64, 64)
    moved = training.moved_by_one_ulp(model, seed=0)
    for before, after in zip(model.parameters(), moved.parameters(), strict=True):
        up, down = (torch.nextafter(before, torch.full_like(before, end)) for end in (math.inf, -math.inf))
        assert ((after == up) | (after == down)).all()
        assert (after == up).any()
        assert (after == down).any()


def test_share_of_normalisation():
    x = torch.randn(16, 16, 32, 32, requires_grad=True)
    layer = torch.nn.Sequential(torch.nn.BatchNorm2d(16), torch.nn.ReLU6())
    assert training.normalisation_share(lambda: x.sigmoid().sum().backward()) == 0
    shares = []
    while not shares or (max(shares) < 0.5 and len(shares) < 10):  # other programs take their share of the machine
        shares.append(training.normalisation_share(lambda: layer(x).backward(torch.ones_like(x))))
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) > 0.5


@pytest.mark.thorough
def test_a_short_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    small = ("--steps", "3", "--batch", "8", "--size", "64", "--width", "0.25")
    assert main(["demo", "--out", str(tmp_path), *small]) == 0
    page = capsys.readouterr().out
    assert page.strip() == (tmp_path / "demo.md").read_text().strip()
    assert "The losses agree." in page
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["fused_layers"] == [35, 52]
    for name in ("native", "normfused"):
        model = content["models"][name]
        assert len(model["losses"]) == len(model["seconds"]) == 3
        assert 0 < model["normalisation_share"] < 1
        assert model["peak_bytes"] > 0
        assert 0 <= model["accuracy"] <= 1
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
