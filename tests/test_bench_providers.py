"""python -m bench ops: oneDNN as a peer, several numbers of threads, families with another activation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, check, onednn, ops, providers, report, timing
from bench.__main__ import main

needs_onednn = pytest.mark.skipif(onednn.version() is None, reason="libdnnl2 is not installed")


def run_ops(folder, *arguments):
    assert main(["ops", "--seconds", "0.02", "--out", str(folder), *arguments]) == 0
    return json.loads((folder / "ops.json").read_text())


@needs_onednn
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 16, 9, 9), (2, 5, 3, 4, 6)])
def test_onednn_computes_batch_norm_and_relu(shape, layout, dtype, training):
    case = cases.Case("own", shape, dtype, layout, activation="relu")
    inputs = cases.inputs(case)
    layer = providers.onednn(case, "cpu", training)
    with torch.set_grad_enabled(training):
        y = layer.run(inputs.x)
    results = (y.detach(),)
    if training:
        results += torch.autograd.grad(y, providers.wanted(inputs, layer.parameters), inputs.dy)
    statistics = None if training else providers.statistics(case, "cpu")
    assert check.check(case, inputs, layer.parameters, {"onednn": results}, statistics) == {"onednn": None}


@needs_onednn
def test_onednn_takes_part_where_it_has_the_layer(tmp_path):
    assert "onednn" in providers.defaults("cpu")
    assert "onednn" not in providers.defaults("cuda")
    chosen = ("--family", "batch_norm", "--shape", "8,5", "--batch", "2", "--mode", "forward", "--layout", "contiguous")
    chosen = (*chosen, "--providers", "eager", "onednn", "normfused", "--dtype", "float32")
    content = run_ops(tmp_path / "relu", *chosen, "--activation", "relu")
    assert {row["layer"] for row in content["rows"]} == {"BatchNorm + relu"}
    ours = next(row for row in content["rows"] if row["provider"] == "normfused")
    assert set(ours["ratio"]) == {"eager", "onednn"}
    assert content["environment"]["packages"]["onednn"] == onednn.version()
    content = run_ops(tmp_path / "relu6", *chosen)
    assert "onednn" not in {row["provider"] for row in content["rows"]}


def test_onednn_that_is_missing_is_a_row_that_says_so(tmp_path, monkeypatch):
    def missing():
        raise OSError("libdnnl.so.2: cannot open shared object file")

    monkeypatch.setattr(onednn, "_library", missing)
    assert onednn.version() is None
    assert "onednn" not in providers.defaults("cpu")
    arguments = ("--shape", "2,4,3,3", "--activation", "relu", "--mode", "forward", "--layout", "contiguous")
    content = run_ops(tmp_path, *arguments, "--providers", "onednn", "normfused")
    (failure,) = [row["failure"] for row in content["rows"] if row["provider"] == "onednn"]
    assert "apt-get install libdnnl2" in failure


@pytest.mark.thorough
def test_several_numbers_of_threads_are_measured_side_by_side(tmp_path):
    seen, before = set(), torch.get_num_threads()
    eager = providers.eager

    def watched(case, device, training):
        layer = eager(case, device, training)

        def run(*arguments):
            seen.add(torch.get_num_threads())
            return layer.run(*arguments)

        return providers.Layer(run, layer.parameters)

    arguments = ("--shape", "2,4,9,9", "--layout", "contiguous", "--threads", "1", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(providers.PROVIDERS, "eager", watched)
        content = run_ops(tmp_path, *arguments, "--providers", "eager", "normfused")
    torch.set_num_threads(before)
    assert seen == {1, 2}
    rows = {(row["mode"], row["provider"], row["threads"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 2 * 4 * 2
    for (mode, provider, threads), row in rows.items():
        one = rows[mode, provider, 1]
        assert row["scaling"] == pytest.approx(one["median_s"] / row["median_s"])
        if provider == "normfused":
            assert row["ratio"]["eager"] == pytest.approx(rows[mode, "eager", threads]["median_s"] / row["median_s"])
    page = (tmp_path / "ops.md").read_text()
    assert "| threads | scaling |" in page
    assert {mean["threads"] for mean in content["geometric_means"]} == {1, 2}
    assert report.label(rows["forward", "eager", 2]).endswith("forward threads=2")


def test_one_number_of_threads_needs_no_column(tmp_path):
    content = run_ops(tmp_path, "--shape", "2,4,3,3", "--mode", "forward", "--providers", "eager", "normfused")
    assert {row["threads"] for row in content["rows"]} == {torch.get_num_threads()}
    assert {row["scaling"] for row in content["rows"]} == {None}
    assert "threads |" not in (tmp_path / "ops.md").read_text()


def test_the_sizes_of_work_span_8_to_800_megabytes():
    sizes = [case.bytes / 1e6 for case in cases.select(["work"], dtypes=["float32"], layouts=["contiguous"])]
    assert sizes == sorted(sizes)
    assert 8 < sizes[0] < 9
    assert 790 < sizes[-1] < 800


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_fresh_tensor_is_like_x_in_pages_of_its_own(layout):
    x = cases.inputs(cases.Case("own", (2, 3, 4, 5), "bfloat16", layout)).x.detach()
    fresh = timing.fresh_like(x)
    assert (fresh.shape, fresh.dtype, fresh.stride()) == (x.shape, x.dtype, x.stride())
    assert torch.equal(fresh.copy_(x), x)
    assert fresh.data_ptr() % 4096 == 0


def test_fresh_copies_are_counted():
    case = cases.Case("own", (2, 3, 4, 5), "float32", "contiguous")
    seconds = {"normfused": 6.0, "copy_fresh": 3.0, "copy_mapped": 2.0}
    timings = {name: timing.summarise([value]) for name, value in seconds.items()}
    ours = next(row for row in ops.make_rows(case, "forward", timings, {}) if row["provider"] == "normfused")
    assert (ours["fresh_copies"], ours["copies"]) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "tiny", "--activation", "relu"], "--activation does not apply to the tiny family"),
        (["--threads", "0"], "expected a positive number"),
    ],
)
def test_wrong_arguments_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ops", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


_FAULTS = """
import resource, sys, torch
from bench import allocator
allocator.use(sys.argv[1])
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in (3, 40):
    for _ in range(20):  # until malloc has been through the holes that imports left
        before = faults()
        torch.ones(size << 18)
        found = faults() - before
    print(found >= (size << 20) / resource.getpagesize() / 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("policy", "new_pages"), [("fresh", "True"), pytest.param("kept", "False", marks=pytest.mark.thorough)]
)
def test_where_the_memory_of_results_comes_from(policy, new_pages):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", _FAULTS, policy]
    environment = os.environ | {"PYTHONPATH": str(root)}
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [new_pages] * 2


def test_the_memory_of_results_is_a_condition_of_a_run(tmp_path, capsys):
    arguments = ("--family", "tiny", "--providers", "eager")
    content = run_ops(tmp_path, *arguments)
    assert content["environment"]["memory"] == "system"
    content["environment"]["memory"] = "kept"
    (tmp_path / "ops.json").write_text(json.dumps(content))
    assert "--memory kept" in report.markdown(content["rows"], content["environment"])
    with pytest.raises(SystemExit):
        run_ops(tmp_path, *arguments, "--resume")
    assert "measured under other conditions (memory)" in capsys.readouterr().err
