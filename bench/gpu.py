"""``make gpu OUT=folder``: all that needs a GPU, in one go on a bare machine: build, tests, sanitizers, benchmarks.

Every part is a process of its own with a time limit, so that one that hangs or crashes leaves the others; the report is
written anew after each, so that a cut keeps what was found.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import gpu_report, report
from .providers import OURS

ROOT = Path(__file__).resolve().parent.parent
_TESTS = (
    *("-m", "pytest", "--all", "-m", "cuda", "-v", "--tb=short", "--color=no"),
    *("-o", "addopts=--strict-markers", "-p", "no:cacheprovider"),
)
_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_ERROR_EXIT = 86
# Seconds between two looks at a running part, and those that a part is given to write what it has.
_LOOK, _GRACE = 2.0, 15.0
_LINES_KEPT = 30
DEFAULT_MINUTES = 8.7


@dataclass(frozen=True)
class Section:
    """A run of ``python -m bench ops``."""

    name: str
    arguments: tuple[str, ...]


def _section(name, arguments):
    return Section(name, tuple(arguments.split()))


_TRAINING = "--mode forward backward forward+backward --seconds 0.1"
# The most important first: what does not fit into the time is left out at the end.
FIRST_SECTIONS = (
    _section("BatchNorm, bfloat16", f"--family batch_norm --batch 32 256 --dtype bf16 {_TRAINING}"),
    _section("host time", "--family tiny --seconds 1"),
    _section("GroupNorm, bfloat16", f"--family diffusion video --dtype bf16 {_TRAINING}"),
    _section(
        "launch paths, bfloat16",
        "--family batch_norm --batch 32 256 --dtype bf16 --mode forward backward --seconds 0.1 "
        "--providers path-two_kernels path-block path-cluster path-cooperative normfused",
    ),
    _section("ResNet-50, bfloat16", f"--family resnet50 --dtype bf16 {_TRAINING}"),
)
MORE_SECTIONS = (
    _section("BatchNorm, float16", f"--family batch_norm --batch 32 256 --dtype fp16 {_TRAINING}"),
    _section("BatchNorm, N = 128", f"--family batch_norm --batch 128 --dtype bf16 fp16 {_TRAINING}"),
    _section("BatchNorm, float32", f"--family batch_norm --batch 32 128 256 --dtype fp32 {_TRAINING}"),
    _section("GroupNorm, float16", f"--family diffusion video --dtype fp16 {_TRAINING}"),
    _section("ResNet-50, float16", f"--family resnet50 --batch 32 128 --dtype fp16 {_TRAINING}"),
    _section("evaluation", "--family batch_norm resnet50 diffusion --dtype bf16 --mode eval --seconds 0.1"),
    _section(
        "max-autotune",
        f"--family batch_norm diffusion --dtype bf16 --providers eager compile-max normfused {_TRAINING}",
    ),
)
# Where there is no GPU: that the machinery works.
CPU_SECTIONS = (_section("BatchNorm", "--shape 2,8,6,6 --mode forward --seconds 0.02 --providers eager normfused"),)


def cuda_home():
    """The folder of the CUDA toolkit, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent]
    for folder in (*candidates, "/usr/local/cuda"):
        if folder and (Path(folder) / "bin" / "nvcc").exists():
            return str(folder)
    return None


def environment(home, scratch):
    """The environment of every part: this Python's programs and nvcc on the PATH, caches in a folder of this run."""
    folders = [str(Path(sys.executable).parent), *([f"{home}/bin"] if home else []), os.environ.get("PATH", "")]
    changed = {
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    return {**os.environ, **changed, **({"CUDA_HOME": home} if home else {})}


def outcomes_of(log):
    """{test: "passed", "failed", "error" or "skipped"} of what ``pytest -v`` printed so far, xdist's form too."""
    outcomes = {}
    for line in log.splitlines():
        match = re.match(
            r"(?:\[gw\d+\] .*?(PASSED|FAILED|ERROR|SKIPPED) (\S.*::.*)|(\S.*::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b)",
            line,
        )
        if match:
            word, test = (match[1], match[2]) if match[1] else (match[4], match[3])
            outcomes[test.strip()] = word.lower()
    return outcomes


def judge_tests(status, log):
    """(status, sentence) of a run of tests; ``status`` is its exit status, or "cut"."""
    outcomes = outcomes_of(log)
    counts = {word: sum(outcome == word for outcome in outcomes.values()) for word in _OUTCOMES}
    sentence = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no test ran"
    bad = [test for test, outcome in outcomes.items() if outcome in ("failed", "error")]
    if bad:
        return "failed", f"{sentence}: {'; '.join(bad[:10])}"
    if status == "cut":
        return "cut", f"{sentence}, then out of time"
    if status not in (0, 5):  # 5: no test was collected
        return "failed", f"{sentence}; pytest ended with status {status}"
    return ("passed" if counts["passed"] else "skipped"), sentence


_OUTCOMES = ("passed", "failed", "error", "skipped")


def judge_sanitizer(status, log):
    """The same for tests under compute-sanitizer: "refused" where it did not work on this machine."""
    verdict, sentence = judge_tests(0 if status == _ERROR_EXIT else status, log)
    unsupported = re.search(r"Error: (Device not supported|Failed to initialize).*", log)
    found = sum(map(int, re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)))
    if found and not unsupported and verdict != "skipped":
        first = re.search(r"(?m)^=+ ((?:Invalid|Uninit|Error|Race|Barrier|Program hit).*)", log)
        return "failed", f"{found} errors; {first[1] if first else ''}"
    # Where it cannot get at the GPU the tests are skipped, and it found nothing because it looked at nothing.
    if unsupported or verdict == "skipped" or (not outcomes_of(log) and status != "cut"):
        return "refused", unsupported[0] if unsupported else "it ran no test"
    return verdict, sentence


def judge_benchmark(status, log, rows):
    """The same for a benchmark: it fails where a provider of ours has wrong numbers or raises, memory apart."""
    failed = [row for row in rows if row["failure"] is not None]
    sentence = f"{len(rows) - len(failed)} rows" + (f", {len(failed)} failed" if failed else "")
    ours = [row for row in failed if row["provider"] in OURS and "out of memory" not in row["failure"]]
    if ours:
        return "failed", f"{sentence}; {ours[0]['provider']}, {report.label(ours[0])}: {ours[0]['failure']}"
    if status in ("cut", 130):
        return "cut", sentence
    if status != 0:
        return "failed", f"{sentence}; {_ended('')(status, log)[1]}"
    return "passed", sentence


class Run:
    """The parts of one run, its time and its report."""

    def __init__(self, out, device, minutes):
        self.start = time.monotonic()
        self.end = self.start + minutes * 60
        self.scale = max(1.0, minutes / DEFAULT_MINUTES)  # of the limits of single parts
        self.device = device
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="normfused-gpu-"))
        self.home = cuda_home()
        self.environment = environment(self.home, self.scratch)
        self.report = gpu_report.Report(self.out, device)
        self.log = (self.out / "log.txt").open("w", encoding="utf-8")
        self.children = []

    def left(self, reserve=0.0):
        """Seconds left, but for ``reserve``."""
        return self.end - time.monotonic() - reserve

    def spawn(self, name, arguments, environment=None):
        """Start a program whose output goes to a file; (process, path of the file)."""
        path = self.scratch / (re.sub(r"\W+", "_", name) + ".log")
        with path.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={**self.environment, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children.append(process)
        return process, path

    def wait(self, process, limit, look=lambda: None):
        """Exit status, or "cut" where it ran out of time; ``look`` is called every other second meanwhile."""
        until = time.monotonic() + max(limit, 0)
        while (seconds := until - time.monotonic()) > 0:
            try:
                return process.wait(min(_LOOK, seconds))
            except subprocess.TimeoutExpired:
                look()
        self.stop(process)
        return "cut"

    def stop(self, process):
        """Ask a program to end, as Ctrl-C does, then end it and what it started."""
        if process.poll() is not None:
            return
        for kind, patience in ((signal.SIGINT, min(_GRACE, max(self.left(), 1.0))), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, kind)
                process.wait(patience)
                return

    def part(self, name, arguments, limit, judge, *, environment=None, correctness=True, reserve=0.0, look=None):
        """Run one part and record its outcome; returns its status.

        Args:
            judge: (exit status or "cut", output) to (status, sentence).
            correctness: whether a failure of it fails the whole run.
            reserve: seconds to leave for what comes later.
        """
        limit = min(limit * self.scale, self.left(reserve))
        if limit < 5:
            return self.report.add(name, "cut", "no time was left for it", 0.0, correctness)
        print(f"[{time.monotonic() - self.start:4.0f} s] {name} (at most {limit:.0f} s)", flush=True)
        begin = time.monotonic()
        process, path = self.spawn(name, arguments, environment)
        return self.finish(name, process, path, limit, judge, begin, correctness, look)

    def finish(self, name, process, path, limit, judge, begin, correctness=True, look=None):
        """Wait for a part that was started, and record its outcome."""
        status = self.wait(process, limit, look or (lambda: None))
        log = path.read_text(encoding="utf-8", errors="replace")
        verdict, sentence = judge(status, log)
        self.log.write(f"===== {name}: {verdict}, {sentence}\n{_shortened(log, verdict)}\n")
        self.log.flush()
        return self.report.add(name, verdict, sentence, time.monotonic() - begin, correctness)

    def close(self):
        """End what is still running and write the report a last time."""
        for process in self.children:
            self.stop(process)
        self.report.finish(time.monotonic() - self.start)
        self.log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _shortened(log, verdict):
    lines = log.splitlines()
    kept = 400 if verdict == "failed" else _LINES_KEPT
    return "\n".join(lines if len(lines) <= kept else ["...", *lines[-kept:]])


def _python(*arguments):
    return [sys.executable, *arguments]


def _ended(sentence):
    """A judge of programs whose exit status says all."""

    def judge(status, log):
        if status == 0:
            return "passed", sentence
        lines = [line for line in log.strip().splitlines() if line.strip()]
        why = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")
        return ("cut", "out of time") if status == "cut" else ("failed", f"status {status}: {why.strip()}")

    return judge


def capability(run):
    """The compute capability of the GPU at hand, "9.0" say; None, and a part that failed, where none answers."""
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    process, path = run.spawn("capability", _python("-c", code))
    status = run.wait(process, 60)
    answer = path.read_text(errors="replace").strip().splitlines() or ["no output"]
    if status != 0:
        run.report.add("a GPU", "failed", f"none answers: {answer[-1]}", 0.0)
        return None
    return answer[-1]


def build(run, architecture):
    """Build the extension in place for one architecture; without CUDA where that fails, so that the rest runs."""
    jobs = str(os.cpu_count() or 1)
    options = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": jobs}
    command = _python("setup.py", "build_ext", "--inplace")
    if run.part("build", command, 200, _ended(f"for {architecture}"), environment=options) != "passed":
        options = {"USE_CUDA": "0", "MAX_JOBS": jobs}
        run.part("build without CUDA", command, 120, _ended("CPU kernels"), environment=options)


def warm_up(run, sections):
    """Start compiling what torch.compile is measured with, in the background: the build leaves most cores idle."""
    workers = max(1, min(12, (os.cpu_count() or 1) - 4))
    options = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    arguments = [part for section in sections for part in ("--then", *section.arguments)]
    return [
        run.spawn(f"warm {index}", _python("-m", "bench.warm", str(index), str(workers), *arguments), options)[0]
        for index in range(workers)
    ]


def run_tests(run, name, selection, limit, *files, processes=1):
    """Those of the tests that need a GPU, in several processes where pytest-xdist is installed."""
    parallel = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    # A file whose imports are missing here is one failure, and the others run.
    command = _python(*_TESTS, *files, "-k", selection, "--continue-on-collection-errors", *parallel)
    return run.part(name, command, limit, judge_tests, environment={"OMP_NUM_THREADS": "1"})


def sanitize(run, limit):
    """compute-sanitizer's tools, side by side, on a selection of tests."""
    program = shutil.which("compute-sanitizer", path=run.environment["PATH"])
    if program is None:
        return run.report.add("compute-sanitizer", "refused", "it is not installed here", 0.0, True)
    tests = _python(*_TESTS, "tests/test_cuda.py", "-k", "sanitizer and extension")
    begin = time.monotonic()
    started = []
    for tool in _TOOLS:
        # Blocks of memory of their own, so that the first byte past the end of a tensor is found.
        options = ["--tool", tool, "--error-exitcode", str(_ERROR_EXIT), "--report-api-errors", "no"]
        if tool != "initcheck":  # which has to see what PyTorch's kernels write
            options += ["--kernel-name", "kernel_substring=normfused"]
        command = [program, *options, *tests]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        started.append((f"compute-sanitizer {tool}", *run.spawn(f"sanitizer {tool}", command, environment)))
    for name, process, path in started:
        run.finish(name, process, path, limit - (time.monotonic() - begin), judge_sanitizer, begin)
    return None


def benchmarks(run, sections, reserve):
    """Benchmarks, one process after the other, while there is time."""
    for index, section in enumerate(sections):
        folder = run.scratch / f"ops_{index}_{re.sub(r'[^a-z0-9]+', '_', section.name.lower())}"
        options = ["--device", run.device, "--out", str(folder)]
        command = _python("-m", "bench", "ops", *section.arguments, *options)

        def merge(folder=folder, section=section):
            run.report.merge(section.name, folder / "ops.json")

        def judge(status, log, folder=folder, section=section):
            run.report.merge(section.name, folder / "ops.json")
            return judge_benchmark(status, log, run.report.rows_of(section.name))

        limit = run.left()
        run.part(f"benchmark: {section.name}", command, limit, judge, reserve=reserve, look=merge)


def describe(run, arguments):
    """Put the environment, as the built package sees it, into the report."""
    code = (
        "import json, sys; from bench import report; print(json.dumps(report.environment(sys.argv[2:], sys.argv[1])))"
    )
    process, path = run.spawn("environment", _python("-c", code, run.device, *arguments))
    status = run.wait(process, 60)
    answer = path.read_text(errors="replace").strip().splitlines()
    if status == 0:
        run.report.where = json.loads(answer[-1])
    served = (run.report.where or {}).get("normfused", {}).get("backend", {}).get("cuda")
    verdict = "passed" if served == "extension" else "failed"
    run.report.add("the extension serves CUDA tensors", verdict, f"the backend is {served!r}", 0.0)


def on_gpu(run, no_build, arguments):
    """Everything, in the order of importance: what there is no time for is left out at the end."""
    architecture = capability(run)
    if architecture is None:
        return
    warming = warm_up(run, (*FIRST_SECTIONS, *MORE_SECTIONS[:1]))
    if not no_build:
        build(run, architecture)
    describe(run, arguments)
    ours = "tests/test_cuda.py"
    run_tests(run, "tests of the CUDA kernels", "not (replay or repeat or triton)", 100, ours, processes=4)
    run_tests(run, "CUDA graphs, 100 replays", "replay", 45, ours)
    run_tests(run, "repeatability, 1000 times", "repeat", 60, ours)
    enough = time.monotonic() + min(30, run.left(240))
    for process in warming:
        run.wait(process, enough - time.monotonic())
    benchmarks(run, FIRST_SECTIONS, reserve=130)
    run_tests(run, "all tests on the CUDA kernels", "extension", 60, "tests", f"--ignore={ours}", processes=8)
    sanitize(run, min(55 * run.scale, run.left(10)))
    run_tests(run, "all tests on the Triton kernels", "triton", 60, "tests", processes=12)
    benchmarks(run, MORE_SECTIONS, reserve=_GRACE)


def _interrupt(*_):
    raise KeyboardInterrupt


def main(options, arguments, error):
    """``python -m bench gpu``; status 1 where a part that is about correctness failed."""
    if not (ROOT / "setup.py").exists():
        error("it needs a checkout, which it builds and tests: run python -m bench gpu in one")
    run = Run(options.out, options.device, options.minutes)
    # Ended by whoever started us: as by Ctrl-C, so that children end and the report is whole.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.device == "cuda":
            on_gpu(run, options.no_build, arguments)
        else:
            run_tests(run, "tests of the CUDA kernels", "not triton", 100, "tests/test_cuda.py")
            run.report.add("compute-sanitizer", "skipped", "it needs a GPU", 0.0)
            benchmarks(run, CPU_SECTIONS, reserve=0)
    except KeyboardInterrupt:
        run.report.interrupted = True
        print("\ninterrupted: writing what was found", file=sys.stderr)
    finally:
        run.close()
        signal.signal(signal.SIGTERM, before)
    print(run.report.summary())
    print("written: " + ", ".join(str(path) for path in run.report.paths()), file=sys.stderr)
    if run.report.interrupted:
        return 130
    return 1 if run.report.failed() else 0
