"""A pytest plugin that counts, by check and backend, what the tests of a drop-in replacement's promises prove.

``python -m pytest --all -p tests.conformance`` runs them and writes docs/conformance.md and docs/accuracy.md; every
number comes from the run. Tests marked stricter_than_native run on PyTorch's own operators too, where they are expected
to fail.
"""

import datetime
import inspect
import math
import platform
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
# The checks, in the order of the report, and the files that hold their tests.
CHECKS = {
    "PyTorch's own inputs": ("test_pytorch_samples.py",),
    "Pinned behaviour": ("test_semantics.py", "test_arguments.py", "test_memory_format.py"),
    "Known bugs of others": ("test_known_bugs.py",),
    "Accuracy against float64": ("test_accuracy.py",),
    "Random calls (Hypothesis)": ("test_hypothesis.py",),
    "Composition": ("test_composition.py", "test_modules.py", "test_transforms.py", "test_gradients.py"),
    "The operators (opcheck, instruction sets, threads)": ("test_operators.py",),
    "Repeatability": ("test_repeatability.py",),
    "Malformed calls": ("test_malformed.py",),
    "Memory and security": ("test_leaks.py", "test_memory.py", "test_security.py"),
    "CUDA": ("test_cuda.py",),
    "Several processes": ("test_distributed.py",),
}
CHECK_OF = {file: check for check, files in CHECKS.items() for file in files}
COLUMNS = {
    "extension": "C++, CPU",
    "extension on cuda": "C++, CUDA",
    "triton": "Triton, interpreted",
    "triton on cuda": "Triton, CUDA",
    "emulated": "CUDA, emulated",
    "": "no backend",
    "torch": "PyTorch's own",
}
# Quantities of docs/accuracy.md that share a row.
QUANTITIES = {"y": "y", "dx": "dx", "dweight": "dweight, dbias", "dbias": "dweight, dbias", "dresidual": "dx"}

# {check: {test: {backend: Counter}}}, and {test: why native fails it}.
_results = defaultdict(lambda: defaultdict(lambda: defaultdict(Counter)))
_reasons = {}


def _backend(item):
    return item.callspec.params.get("backend", "") if hasattr(item, "callspec") else ""


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if item.path.name not in CHECK_OF])
    items[:] = [item for item in items if item.path.name in CHECK_OF]
    for item in items:
        stricter = item.get_closest_marker("stricter_than_native")
        if stricter is not None and _backend(item) == "torch":
            item.add_marker(pytest.mark.xfail(reason=stricter.args[0], strict=False))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" or (call.when == "setup" and report.outcome != "passed"):
        counts = _results[CHECK_OF[item.path.name]][_name(item)][_backend(item)]
        cases = dict(report.user_properties).get("cases", 1)
        if hasattr(report, "wasxfail"):
            _reasons[_name(item)] = report.wasxfail
            counts["native fails" if report.outcome == "skipped" else "native passes"] += cases
        elif report.outcome == "skipped":
            counts["left out"] += 1
        else:
            counts[report.outcome] += cases
    return report


def _name(item):
    return f"{item.path.name}::{item.originalname}"


def _totals(tests):
    total = Counter()
    for by_backend in tests.values():
        for counts in by_backend.values():
            total += counts
    return total


def _cell(counts):
    """What one backend made of one test."""
    parts = []
    if counts["passed"] or counts["failed"]:
        run = counts["passed"] + counts["failed"]
        parts.append(f"{run}" if not counts["failed"] else f"**{counts['failed']} of {run} fail**")
    if counts["native fails"] or counts["native passes"]:
        parts.append(f"fails {counts['native fails']} of {counts['native fails'] + counts['native passes']}")
    return ", ".join(parts)


def _summary():
    yield ("check", "cases run", "passed", "failed", "left out", "native fails")
    for check in CHECKS:
        if check in _results:
            total = _totals(_results[check])
            run = total["passed"] + total["failed"]
            yield check, run, total["passed"], total["failed"], total["left out"], total["native fails"]


def _table(rows):
    head, *rows = rows
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    return [_row(head), _row(["---:" if right else "---" for right in numeric]), *map(_row, rows), ""]


def _row(cells):
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def _describe(name):
    """The first sentence of a test's documentation, or its name as a sentence."""
    file, function = name.split("::")
    documentation = inspect.getdoc(getattr(sys.modules.get(file.removesuffix(".py")), function, None)) or ""
    sentence = documentation.split("\n\n")[0].replace("\n", " ").strip()
    title = function.removeprefix("test_").replace("_", " ")
    return f"{title}: {sentence}" if sentence else title


def conformance_page(command):
    processor = platform.processor() or platform.machine()
    date = datetime.date.today().isoformat()
    lines = [
        "# Conformance",
        "",
        f"Written by `{command}` on {date}: torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {processor}.",
        "",
        "A case is one call or one parametrisation of a test. Left out are the parametrisations that a backend has no "
        "part in, or no time for. *Native fails* counts cases of tests that go beyond PyTorch's own operators "
        "(version as above), run on those.",
        "",
        *_table(list(_summary())),
        "## Where normfused differs from PyTorch's own operators",
        "",
        "It does what the test says; of PyTorch's own operators the last column says how many cases fail, and why.",
        "",
    ]
    rows = [("test", "PyTorch's own", "why")]
    for tests in _results.values():
        for name, by_backend in tests.items():
            if by_backend["torch"]["native fails"]:
                rows.append((_describe(name), _cell(by_backend["torch"]), _reasons[name]))
    lines += _table(rows)
    for check in CHECKS:
        if check not in _results:
            continue
        tests = _results[check]
        used = [backend for backend in COLUMNS if any(_cell(tests[name][backend]) for name in tests)]
        lines += [f"## {check}", ""]
        rows = [("test", *(COLUMNS[backend] for backend in used))]
        rows += [(_describe(name), *(_cell(tests[name][backend]) for backend in used)) for name in tests]
        lines += _table(rows)
    return "\n".join(lines)


def accuracy_page(worst, command):
    """``worst``: test_accuracy.WORST."""

    def number(value):
        return "wrong" if not math.isfinite(value) else f"{value:.2g}" if value < 1000 else f"{value:.1e}"

    lines = [
        "# Accuracy",
        "",
        f"Written by `{command}` on {datetime.date.today().isoformat()}, torch {torch.__version__}: the worst errors "
        "of the run against float64 on the rounded input, ours / PyTorch's own, in ulps of the largest term. What is "
        "asked of ours: forward at most twice native's error and one ulp, gradients and statistics three times and a "
        "few. *wrong*: not finite where it should be.",
        "",
    ]
    backends = dict.fromkeys(key[0] for key in worst)
    for backend in backends:
        for operator in ("batch_norm", "group_norm"):
            dtypes = list(dict.fromkeys(key[4] for key in worst if key[:2] == (backend, operator)))
            rows = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
            for (by, of, values, quantity, dtype), errors in worst.items():
                if (by, of) == (backend, operator) and backend != "torch":
                    cell = rows[values, QUANTITIES.get(quantity, "running statistics")][dtype]
                    cell[:] = max(cell[0], errors[0]), max(cell[1], errors[1])
            if not rows:
                continue
            table = [("input", "of", *(str(dtype).removeprefix("torch.") for dtype in dtypes))]
            for (values, quantity), cells in rows.items():
                shown = (" / ".join(map(number, cells[dtype])) if dtype in cells else "" for dtype in dtypes)
                table.append((values, quantity, *shown))
            lines += [f"## {operator}, {COLUMNS[backend]}", "", *_table(table)]
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config):
    for row in _summary():
        terminalreporter.write_line(
            "  ".join(f"{cell!s:<52}" if i == 0 else f"{cell!s:>12}" for i, cell in enumerate(row))
        )
    accuracy = sys.modules.get("test_accuracy")
    complete = set(_results) >= set(list(CHECKS)[:10])
    if not complete or config.getoption("keyword") or config.getoption("collectonly"):
        terminalreporter.write_line("A selection: docs/ is left as it was.")
        return
    DOCS.mkdir(exist_ok=True)
    (DOCS / "conformance.md").write_text(conformance_page("make conformance"))
    (DOCS / "accuracy.md").write_text(accuracy_page(accuracy.WORST, "make conformance"))
    terminalreporter.write_line(f"written: {DOCS / 'conformance.md'}, {DOCS / 'accuracy.md'}")
