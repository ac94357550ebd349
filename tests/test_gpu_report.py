"""What ``make gpu`` and ``bench compare`` make of what they find; on a machine without a GPU, the run itself."""

import contextlib
import json
import sys
import time

import pytest
import torch

from bench import cases, compare, cuda, gpu, gpu_report, ops, providers, report, timing, warm
from bench.__main__ import main

MIB = 1 << 20


def rows_of(case, mode, **seconds):
    """Rows of providers and copies with known times."""
    return ops.make_rows(case, mode, {name: timing.summarise([value] * 5) for name, value in seconds.items()}, {})


def batch_norm(c=96, size=112, dtype="float32", **options):
    return cases.Case("batch_norm", (32, c, size, size), dtype, "contiguous", **options)


# The run


@pytest.mark.thorough
def test_a_run_without_a_gpu(tmp_path, capsys):
    status = main(["gpu", "--device", "cpu", "--no-build", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "report.json").read_text())
    statuses = {part["name"]: part["status"] for part in content["parts"]}
    on_gpu = torch.cuda.is_available()
    assert statuses == {
        "tests of the CUDA kernels": statuses["tests of the CUDA kernels"] if on_gpu else "skipped",
        "compute-sanitizer": "skipped",
        "benchmark: BatchNorm": "passed",
    }
    assert status == (1 if content["failed"] else 0)
    assert content["environment"]["torch"] == torch.__version__
    assert {row["section"] for row in content["rows"]} == {"BatchNorm"}
    assert all(row["failure"] is None for row in content["rows"])
    names = {path.name for path in tmp_path.iterdir()}
    assert (
        {"report.json", "report.csv", "report.md", "log.txt"}
        <= names
        <= {
            *("report.json", "report.csv", "report.md", "log.txt"),
            *("roofline.png", "layers.png"),
        }
    )
    page = (tmp_path / "report.md").read_text()
    assert "| benchmark: BatchNorm | passed | 8 rows |" in page
    assert "host time of a call no more than native's" in page
    assert "compute-sanitizer: it needs a GPU" in out
    assert len((tmp_path / "report.csv").read_text().splitlines()) == len(content["rows"]) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_that_finds_no_gpu_fails_at_once(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    (part,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (part["name"], part["status"]) == ("a GPU", "failed")
    assert part["outcome"].startswith("none answers: ")


@pytest.fixture
def run(tmp_path):
    run = gpu.Run(tmp_path / "out", "cpu", minutes=1)
    yield run
    run.close()


def script(code):
    return [sys.executable, "-u", "-c", code]


def test_a_part_that_fails_fails_the_run_and_says_why(run):
    judge = gpu._ended("done")
    assert run.part("good", script("print('hello')"), 50, judge) == "passed"
    assert run.part("slow part", script("raise SystemExit('error: no nvcc')"), 50, judge) == "failed"
    assert run.part("unimportant", script("raise SystemExit(3)"), 50, judge, correctness=False) == "failed"
    assert run.report.failed() == ["slow part"]
    assert "| slow part | failed | status 1: error: no nvcc |" in (run.out / "report.md").read_text()


@pytest.mark.thorough
def test_a_part_without_end_is_stopped_and_keeps_what_it_wrote(run):
    code = "import time\nprint('tests/test_x.py::test_a PASSED', flush=True)\nwhile True: time.sleep(0.1)"
    run.end = time.monotonic() + 10
    begin = time.monotonic()
    assert run.part("endless", script(code), 5, gpu.judge_tests) == "cut"
    assert time.monotonic() - begin < 15
    assert run.report.parts[-1]["outcome"] == "1 passed, then out of time"
    run.end = time.monotonic()
    assert run.part("too late", script("print()"), 6, gpu.judge_tests) == "cut"
    assert run.report.parts[-1]["outcome"] == "no time was left for it"
    assert not run.report.failed()


def test_rows_are_in_the_report_before_a_benchmark_ends(run, tmp_path):
    rows = rows_of(batch_norm(), "forward", eager=3.0, normfused=1.0, copy=0.5)
    where = report.environment(["ops"])
    report.write(rows[:1], where, tmp_path / "ops")
    run.report.merge("first", tmp_path / "ops" / "ops.json")
    assert len(json.loads((run.out / "report.json").read_text())["rows"]) == 1
    report.write(rows, where, tmp_path / "ops")
    run.report.merge("first", tmp_path / "ops" / "ops.json")
    run.report.merge("second", tmp_path / "nothing" / "ops.json")
    assert [row["provider"] for row in run.report.rows()] == ["eager", "normfused", "copy"]


def test_the_toolkit_is_found_and_comes_first_on_the_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.cuda_home() == str(tmp_path)
    changed = gpu.environment(str(tmp_path), tmp_path / "scratch")
    assert changed["CUDA_HOME"] == str(tmp_path)
    assert f"{tmp_path}/bin" in changed["PATH"].split(":")[:2]
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert gpu.cuda_home() == str(tmp_path.resolve())


def test_every_section_is_a_selection_of_cases():
    for section in (*gpu.FIRST_SECTIONS, *gpu.MORE_SECTIONS):
        assert warm.share(0, 1, ("--then", *section.arguments), "cuda")
    first, more = (
        {case for s in sections for case, _ in warm.share(0, 1, ("--then", *s.arguments), "cuda")}
        for sections in (gpu.FIRST_SECTIONS, gpu.MORE_SECTIONS)
    )
    # Everything that the goals are about.
    wanted = cases.select(["batch_norm"], (32, 128, 256), ["float16", "bfloat16", "float32"], device_type="cuda")
    assert set(wanted) <= first | more
    assert set(cases.select(["resnet50", "diffusion", "video"], dtypes=["bfloat16", "float16"])) <= first | more


def test_shares_of_what_is_compiled_ahead(monkeypatch):
    monkeypatch.setattr(providers, "compiled", providers.eager)
    arguments = (
        "--then",
        "--family",
        "batch_norm",
        "--dtype",
        "bf16",
        "--mode",
        "forward",
        "eval",
        "--then",
        "--family",
        "tiny",
    )
    shares = [warm.share(index, 3, arguments, "cuda") for index in range(3)]
    together = [item for share in shares for item in share]
    assert len(together) == len(set(together)) == 24 * 2 + 2
    for training in (True, False):
        warm.compile_case(cases.Case("own", (2, 4, 3, 3), "float32", "contiguous"), training, "cpu")


# What programs print


def test_outcomes_of_tests():
    log = (
        "tests/test_a.py::test_one[extension-(2, 3) x] PASSED                  [ 10%]\n"
        "tests/test_a.py::test_two FAILED\n"
        "[gw3] [ 20%] SKIPPED tests/test_b.py::test_three[a b] \n"
        "=== short test summary info ===\nFAILED tests/test_a.py::test_two - boom\n"
    )
    outcomes = gpu.outcomes_of(log)
    assert outcomes == {
        "tests/test_a.py::test_one[extension-(2, 3) x]": "passed",
        "tests/test_a.py::test_two": "failed",
        "tests/test_b.py::test_three[a b]": "skipped",
    }
    assert gpu.judge_tests(1, log) == ("failed", "1 passed, 1 failed, 1 skipped: tests/test_a.py::test_two")
    assert gpu.judge_tests("cut", log)[0] == "failed"
    passed = log.splitlines()[0]
    assert gpu.judge_tests(0, passed) == ("passed", "1 passed")
    assert gpu.judge_tests("cut", passed) == ("cut", "1 passed, then out of time")
    assert gpu.judge_tests(-11, passed) == ("failed", "1 passed; pytest ended with status -11")
    assert gpu.judge_tests(4, "ERROR: not found")[0] == "failed"
    assert gpu.judge_tests(0, log.splitlines()[2]) == ("skipped", "1 skipped")


PASSED = "tests/test_cuda.py::test_x PASSED\n"


NO_ERRORS = "========= ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("status", "log", "verdict", "sentence"),
    [
        (0, PASSED + NO_ERRORS, "passed", "1 passed"),
        (0, PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", "1 passed"),
        (
            86,
            PASSED + "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 12 errors",
            "failed",
            "12 errors; Invalid __global__ read of size 4 bytes",
        ),
        (86, PASSED + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)", "failed", "2 errors; "),
        (1, "========= Error: Device not supported\n" + NO_ERRORS, "refused", "Error: Device not supported"),
        # Without a GPU the tests are skipped, and nothing was looked at.
        (0, PASSED.replace("PASSED", "SKIPPED") + NO_ERRORS, "refused", "it ran no test"),
        (127, "no such program", "refused", "it ran no test"),
        ("cut", PASSED, "cut", "1 passed, then out of time"),
        (1, PASSED.replace("PASSED", "FAILED") + NO_ERRORS, "failed", "1 failed: tests/test_cuda.py::test_x"),
    ],
)
def test_what_a_sanitizer_says(status, log, verdict, sentence):
    assert gpu.judge_sanitizer(status, log) == (verdict, sentence)


@pytest.mark.parametrize(
    ("status", "provider", "failure", "verdict"),
    [
        (0, "normfused", None, "passed"),
        (0, "normfused", "y: 3 of 8 elements wrong, by up to 7 times the tolerance", "failed"),
        ("cut", "path-block", "RuntimeError: CUDA error", "failed"),
        (0, "compile", "y: 3 of 8 elements wrong, by up to 7 times the tolerance", "passed"),
        (0, "triton", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "passed"),
        (130, "compile", None, "cut"),
        ("cut", "compile", None, "cut"),
        (1, "compile", None, "failed"),
    ],
)
def test_what_a_benchmark_says(status, provider, failure, verdict):
    rows = ops.make_rows(
        batch_norm(), "forward", {"eager": timing.summarise([1.0])}, {provider: failure} if failure else {}
    )
    found, sentence = gpu.judge_benchmark(status, "MemoryError", rows)
    assert found == verdict
    assert sentence.startswith("1 rows, 1 failed" if failure else "1 rows")


# Goals


def goal(rows, start):
    (found,) = [goal for goal in gpu_report.goals(rows) if goal["goal"].startswith(start)]
    return found["verdict"], found["found"]


def test_goals_that_nothing_was_measured_for():
    assert {found["verdict"] for found in gpu_report.goals([])} == {"–"}


def test_goals_of_ratios():
    rows = [
        *rows_of(batch_norm(96), "forward+backward", eager=4.0, compile=2.0, normfused=1.0),
        *rows_of(batch_norm(64), "forward+backward", eager=1.0, compile=2.0, normfused=1.0),
        *rows_of(batch_norm(8, groups=4, activation="silu"), "forward+backward", eager=2.0, compile=0.9, normfused=1.0),
        *rows_of(cases.Case("tiny", cases.TINY_SHAPE, "float32", "contiguous"), "host", eager=1.1, normfused=1.0),
    ]
    assert goal(rows, "BatchNorm forward+backward, geometric mean ≥ 2.2 × eager") == ("missed", "2.00, of 2")
    assert goal(rows, "BatchNorm forward+backward, geometric mean ≥ 1.4 × torch.compile") == ("met", "2.00, of 2")
    assert goal(rows, "GroupNorm forward+backward, geometric mean ≥ 2 × eager") == ("met", "2.00, of 1")
    assert goal(rows, "GroupNorm forward+backward, geometric mean ≥ 1.3 × torch.compile") == ("missed", "0.90, of 1")
    assert goal(rows, "none slower") == ("missed", "slowest 0.90 ×; 1 of 3 miss it")
    assert goal(rows, "host time") == ("met", "lowest 1.10 ×; all 1")


def test_goals_of_bandwidth():
    large, small = batch_norm(), batch_norm(8, 28)
    assert small.bytes < 64e6 < large.bytes
    rows = [
        *rows_of(large, "forward", normfused=1.1, copy=1.0),
        *rows_of(large, "backward", normfused=2.0, copy=1.0, add=1.5),
        *rows_of(small, "forward", normfused=14e-6, copy=10e-6),
    ]
    assert goal(rows, "forward ≥ 85 %") == ("met", "lowest 91%; all 1")
    assert goal(rows, "backward ≥ 80 %") == ("missed", "lowest 75%; 1 of 1 miss it")
    assert goal(rows, "forward at most 5 µs") == ("met", "longest 4.0 µs; all 1")


def test_a_measurement_that_two_sections_share_counts_once():
    first = rows_of(batch_norm(), "forward+backward", eager=4.0, normfused=1.0)
    again = rows_of(batch_norm(), "forward+backward", eager=2.0, normfused=1.0)
    rows = [{**row, "section": name} for name, part in (("a", first), ("b", again)) for row in part]
    assert goal(rows, "BatchNorm forward+backward, geometric mean ≥ 2.2 × eager") == ("met", "4.00, of 1")


def test_the_part_of_the_copys_bandwidth():
    def fraction(case, mode, **seconds):
        return {row["provider"]: row["fraction"] for row in rows_of(case, mode, **seconds)}

    plain, residual = batch_norm(), batch_norm(activation="relu", residual=True)
    assert fraction(plain, "forward", normfused=2.0, copy=1.0) == {"normfused": 0.5, "copy": 1.0}
    assert fraction(plain, "backward", normfused=3.0, copy=1.0, add=1.5) == {"normfused": 0.5, "copy": 1, "add": 1}
    assert fraction(plain, "backward", normfused=3.0, copy=1.0)["normfused"] == 0.5
    assert fraction(plain, "forward+backward", normfused=5.0, copy=1.0, add=1.5)["normfused"] == 0.5
    assert fraction(residual, "forward+backward", normfused=7.0, copy=1.0, add=1.5)["normfused"] == 0.5


# Kernel times by CUDA graphs, with a GPU that only counts


@pytest.mark.parametrize(
    ("tensor_bytes", "expected"), [(4 * MIB, 50), (1000 * MIB, 2), (50 * MIB, 4), (16, cuda.MOST_BUFFERS)]
)
def test_buffers_exceed_l2(tensor_bytes, expected):
    assert cuda.buffers(tensor_bytes, 50 * MIB) == expected


@pytest.fixture
def counting_gpu(monkeypatch):
    """torch.cuda as far as bench.cuda uses it: graphs do not run again, a replay takes a millisecond."""
    log = {"captured": 0, "replays": 0}

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            log["replays"] += 1

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = log["replays"]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return float(end.at - self.at)

    @contextlib.contextmanager
    def capture(graph, stream):
        log["captured"] += 1
        yield

    class Properties:
        L2_cache_size = 4096

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda: None,
        "get_device_properties": lambda device: Properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


@pytest.mark.parametrize("residual", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("mode", [mode for mode in cases.MODES if mode != "host"])
def test_graph_timing(counting_gpu, mode, residual):
    case = cases.Case("own", (2, 8, 8, 8), "float32", "contiguous", activation="relu", residual=residual)
    inputs = cases.inputs(case)
    layers = {
        "eager": providers.eager(case, "cpu", mode != "eval"),
        "normfused": providers.fused(case, "cpu", mode != "eval"),
    }
    rotation = cuda.Rotation(inputs)
    assert len(rotation.inputs) == 4  # of 4 KiB each, four times L2
    timers = rotation.timers(layers, mode) | rotation.copies(mode)
    assert ("add" in timers) == (residual or mode in ("backward", "forward+backward"))
    timings, failures = timing.interleave(timers, 1e-3)
    assert not failures
    assert counting_gpu["captured"] == len(timers)
    for found in timings.values():
        assert found.median == pytest.approx(1e-3 / 4)
        assert (found.buffers, found.repeats) == (4, 4)
    rows = ops.make_rows(case, mode, timings, {})
    assert {row["buffers"] for row in rows} == {4}


def test_graph_timing_runs_every_buffer_and_reports_what_fails(counting_gpu):
    case = cases.Case("own", (2, 8, 8, 8), "float32", "contiguous")
    rotation = cuda.Rotation(cases.inputs(case))
    seen = []

    def layer(x):
        seen.append(x.data_ptr())
        return x * 1

    def broken(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    layers = {"ours": providers.Layer(layer, ()), "broken": providers.Layer(broken, ())}
    timings, failures = timing.interleave(rotation.timers(layers, "forward"), 1e-3)
    assert set(timings) == {"ours"}
    assert seen[-4:] == [one.x.data_ptr() for one in rotation.inputs]
    assert len(set(seen)) == 4
    assert failures == {"broken": "RuntimeError: CUDA error: an illegal memory access was encountered"}


# Two runs


def runs(seconds, spread=0.0, copy=1.0, provider="normfused", failure=None):
    case = batch_norm()
    timings = {
        provider: timing.Timing(seconds, seconds * (1 - spread), seconds * (1 + spread), 9, 1),
        "copy_mapped": timing.summarise([copy] * 9),
    }
    if failure:
        del timings[provider]
    return ops.make_rows(case, "forward", timings, {provider: failure} if failure else {})


@pytest.mark.parametrize(
    ("old", "new", "options", "verdict"),
    [
        (runs(1.0), runs(1.04), {}, "same"),
        (runs(1.0), runs(1.06), {}, "slower"),
        (runs(1.0), runs(0.9), {}, "faster"),
        (runs(1.0), runs(1.06), {"threshold": 0.1}, "same"),
        (runs(1.0, spread=0.2), runs(1.4, spread=0.2), {}, "same"),  # three standard deviations are 53 %
        (runs(1.0, spread=0.2), runs(1.6, spread=0.2), {}, "slower"),
        (runs(1.0), runs(2.0, copy=2.0), {"unit": "copies"}, "same"),
        (runs(1.0), runs(1.0, copy=0.5), {"unit": "copies"}, "slower"),
        (runs(1.0), runs(1.0, failure="it broke"), {}, "fails now"),
        (runs(1.0, failure="it broke"), runs(1.0), {}, "works now"),
        (runs(1.0), [], {}, "not measured"),
    ],
)
def test_changes_between_two_runs(old, new, options, verdict):
    (change,) = compare.compare(old, new, **options)
    assert change.verdict == verdict


def test_compare_ends_with_a_status(tmp_path, capsys):
    paths = []
    for name, rows in (
        ("old", runs(1.0)),
        ("slower", runs(1.2)),
        ("broken", runs(1.0, failure="it broke")),
        ("other", []),
    ):
        report.write(rows, report.environment(["ops"]), tmp_path / name)
        paths.append(str(tmp_path / name / "ops.json"))
    old, slower, broken, other = paths
    assert main(["compare", old, old]) == 0
    assert main(["compare", slower, old]) == 0
    capsys.readouterr()
    assert main(["compare", old, slower]) == 1
    page = capsys.readouterr().out
    assert "1 slower." in page
    measurement = "batch_norm module BatchNorm + relu6 32×96×112×112 float32 contiguous forward"
    assert f"| slower | normfused | {measurement} | +20.0 % | ± 5.0 % |" in page
    assert main(["compare", old, slower, "--threshold", "0.3"]) == 0
    assert main(["compare", old, broken]) == 1
    with pytest.raises(SystemExit) as ended:
        main(["compare", old, other])
    assert ended.value.code == 2
