"""python -m bench passes: each call contains the passes that it is said to, and the difference is what is reported."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import cases, passes, timing
from bench.__main__ import main


class Operators(TorchDispatchMode):
    """Collects the calls of normfused's operators: (name, arguments by name)."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "normfused":
            names = [argument.name for argument in function._schema.arguments]
            self.called.append((function._opname, dict(zip(names, args, strict=False)) | (kwargs or {})))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_calls_differ_by_the_passes(layout):
    (case,) = cases.own([(2, 8, 6, 6)], ["float32"], [layout])
    found = {}
    for name, timer in passes.calls(case).items():
        with Operators() as operators:
            timer.block()
        (found[name],) = {
            (operator, arguments["training"], arguments.get("need_dx"), arguments.get("need_dweight"))
            for operator, arguments in operators.called
        }
    assert found["evaluation"] == ("batch_norm_act", False, None, None)
    assert found["training"] == ("batch_norm_act", True, None, None)
    assert found["backward of evaluation"] == ("batch_norm_act_backward", False, True, False)
    assert found["backward of training"] == ("batch_norm_act_backward", True, True, True)


def test_a_read_passes_over_every_byte_once():
    x = torch.arange(24, dtype=torch.bfloat16).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    timers = passes.machine(x)
    assert set(timers) == set(passes.MACHINE)
    words = timers["read"]._timer._globals["function"].__self__
    assert words.dtype == torch.float32
    assert words.data_ptr() == x.data_ptr()
    assert words.nbytes == x.nbytes


def test_what_is_reported_is_the_difference(tmp_path, monkeypatch, capsys):
    seconds = {
        ("large", "evaluation"): 5e-3,
        ("large", "training"): 8e-3,
        ("large", "backward of evaluation"): 10e-3,
        ("large", "backward of training"): 17e-3,
        ("tiny", "evaluation"): 1e-3,
        ("tiny", "training"): 2e-3,
        ("tiny", "backward of evaluation"): 3e-3,
        ("tiny", "backward of training"): 4e-3,
        ("machine", "read"): 1e-3,
        ("machine", "copy"): 2e-3,
        ("machine", "copy, fresh"): 3e-3,
    }

    def interleave(timers, _):
        return {name: timing.Timing(seconds[name], 0, 0, 1, 1) for name in timers}, {}

    monkeypatch.setattr(timing, "interleave", interleave)
    arguments = ["--shape", "2,8,5,5", "--dtype", "fp32", "--layout", "contiguous", "--memory", "system"]
    assert main(["passes", *arguments, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "passes.json").read_text())["rows"]
    assert row["bytes"] == 2 * 8 * 5 * 5 * 4
    expected = {"statistics": 2e-3, "forward apply": 4e-3, "reduction": 6e-3, "backward apply": 7e-3, "host": 6e-3}
    expected |= {"read": 1e-3, "copy": 2e-3, "copy, fresh": 3e-3}
    assert row["seconds"] == pytest.approx(expected)
    page = capsys.readouterr().out
    assert page.strip() == (tmp_path / "passes.md").read_text().strip()
    line = "| 2×8×5×5 | float32 | contiguous | 2 (0) | 4 (0) | 6 (0) | 7 (0) | 1 (0) | 2 (0) | 3 (0) | 6 (24%) |"
    assert line in page.splitlines()


def test_bandwidth_counts_the_tensors_of_a_pass():
    times = dict.fromkeys((*passes.PASSES, *passes.MACHINE, "host"), 0.5)
    row = {"shape": [1], "dtype": "float32", "layout": "contiguous", "bytes": 10**9, "seconds": times}
    *_, line = passes.table([row])
    rates = [cell.split("(")[1] for cell in line.split("|") if "(" in cell]
    assert rates == ["2) ", "4) ", "4) ", "6) ", "2) ", "4) ", "4) ", "20%) "]


@pytest.mark.thorough
def test_a_small_run(tmp_path):
    assert (
        main(["passes", "--shape", "2,8,6,6", "--seconds", "0.01", "--memory", "system", "--out", str(tmp_path)]) == 0
    )
    rows = json.loads((tmp_path / "passes.json").read_text())["rows"]
    assert {(row["dtype"], row["layout"]) for row in rows} == {
        (dtype, layout) for dtype in ("float32", "bfloat16") for layout in cases.LAYOUTS
    }
    assert all(row["seconds"]["host"] > 0 and row["seconds"]["read"] > 0 for row in rows)


def test_two_sizes_are_too_few(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["passes", "--shape", "96,56"])
    assert "--shape: N,C,H,W is needed here" in capsys.readouterr().err
