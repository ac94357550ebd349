"""The benchmarks as a wheel installs them, and a run that is interrupted as a person does it."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ONE = ("--dtype", "float32", "--layout", "contiguous")
SMALL = ("--seconds", "0.02", "--providers", "eager", "normfused")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The pure-Python wheel of this tree."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("normfused", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(out), "."]
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = out.glob("normfused-*.whl")
    return found


def test_the_wheel_holds_the_benchmarks_below_normfused(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"normfused"}
    sources = {f"normfused/bench/{path.name}" for path in (ROOT / "bench").iterdir() if path.suffix in (".py", ".html")}
    assert sources <= names
    assert "normfused-bench = normfused.bench.__main__:main" in points


@pytest.mark.thorough
def test_the_installed_command_runs_without_a_checkout(wheel, tmp_path):
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    # An editable install's finder would find the tree that the tests run in.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from normfused.bench.__main__ import main; sys.exit(main())"
    )

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    measured = run("ops", "--family", "tiny", *SMALL, "--out", "out")
    assert measured.returncode == 0, measured.stderr
    content = json.loads((tmp_path / "out/ops.json").read_text())
    assert content["environment"]["command"].startswith("normfused-bench ops --family tiny")
    assert content["environment"]["commit"] is None
    assert {row["failure"] for row in content["rows"]} == {None}
    reported = run("report", "out/ops.json", "--out", "page.html")
    assert reported.returncode == 0, reported.stderr
    assert "normfused: measurements" in (tmp_path / "page.html").read_text()
    refused = run("gpu")
    assert refused.returncode == 2
    assert "needs a checkout" in refused.stderr
    assert "usage: normfused-bench" in run("--help").stdout


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.thorough
@pytest.mark.parametrize("command", ["ops", "memory"])
def test_ctrl_c_keeps_what_was_measured_and_resuming_goes_on(command, tmp_path):
    options = {
        "ops": ["--batch", "1", "--shape", "8,4", "9,4", "10,4", "11,4", "12,4", *SMALL, *ONE],
        "memory": ["--batch", "2", "3", "4", "--size", "32", "--model", "mobilenet_v2", "--variant", "native"],
    }[command]
    arguments = [sys.executable, "-m", "bench", command, *options, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    written, deadline = tmp_path / f"{command}.json", time.monotonic() + 120
    while not written.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    page, progress = process.communicate(timeout=120)
    assert process.returncode == 130, progress
    assert "interrupted: " in progress
    assert "Interrupted: only what was measured until then." in page
    kept = json.loads(written.read_text())
    assert kept["environment"]["interrupted"]
    assert kept["rows"]
    assert {row["failure"] for row in kept["rows"]} == {None}

    done = subprocess.run([*arguments, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(written.read_text())
    rows = content["rows"]
    assert "interrupted" not in content["environment"]
    assert [row for row in rows if row in kept["rows"]] == kept["rows"]
    assert len(rows) == (5 * 2 * 4 if command == "ops" else 3) > len(kept["rows"])
