"""The emulator of tests/emulator runs kernels as a GPU would, and finds their mistakes."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulator"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DNORMFUSED_EMULATOR"]
SANITIZERS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
MISTAKES = [
    "barrier",
    "first_barrier",
    "out_of_bounds",
    "early_read",
    "uninitialised",
    "cluster_begin",
    "cluster_end",
    "grid",
    "last_block",
]


def compile_with(*arguments):
    result = subprocess.run([*COMPILER, *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def emulator_object(tmp_path_factory):
    """The emulator itself, without a sanitizer whichever it is linked with."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler ({COMPILER[0]}) was found")
    target = tmp_path_factory.mktemp("emulator") / "emulator.o"
    compile_with("-O2", "-c", EMULATOR / "emulator.cpp", f"-I{EMULATOR}", "-o", target)
    return target


SANITIZED = (pytest.param(name, marks=pytest.mark.thorough) for name in ("address", "thread"))


@pytest.fixture(scope="module", params=["none", *SANITIZED])
def self_test(request, emulator_object):
    """Runs self_test.cu, compiled with a sanitizer, and returns its name and the completed process."""
    flags = SANITIZERS[request.param]
    folder = emulator_object.parent
    probe = [*COMPILER, *flags, "-x", "c++", "-", "-o", folder / "probe"]
    works = subprocess.run(probe, input="int main() {}", capture_output=True, text=True).returncode == 0
    if not works or subprocess.run([folder / "probe"], capture_output=True).returncode != 0:
        pytest.skip(f"{COMPILER[0]} {' '.join(flags)} makes no program that runs")
    program = folder / request.param
    source = folder / f"{request.param}.o"
    compile_with(*flags, "-x", "c++", "-c", EMULATOR / "self_test.cu", f"-I{EMULATOR}", "-o", source)
    compile_with(*flags, source, emulator_object, "-o", program)

    def run(*arguments):
        return request.param, subprocess.run([program, *arguments], capture_output=True, text=True)

    return run


def test_right_kernels_pass_under_every_schedule(self_test):
    _, result = self_test()
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(self_test, mistake):
    sanitizer, result = self_test(mistake)
    if mistake == "last_block" and sanitizer != "thread":
        pytest.skip("wrong only where two blocks race for a moment: what ThreadSanitizer is for")
    report = result.stdout + result.stderr
    if sanitizer == "thread" and mistake not in ("out_of_bounds", "early_read", "uninitialised"):
        assert "data race" in report
    elif sanitizer == "address" and mistake in ("out_of_bounds", "cluster_end"):
        assert "AddressSanitizer: use-after-poison" in report
    else:
        # Whatever the order of the threads.
        schedules = [line.split(":")[0] for line in result.stdout.splitlines()]
        assert schedules == ["together", "warp", "warp, last first", "random 1", "random 2"]


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_the_same_source_without_a_warning(architecture, tmp_path):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = ["-std=c++20", f"-arch={architecture}", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings"]
    result = subprocess.run(
        [nvcc, *flags, "-c", EMULATOR / "self_test.cu", "-o", tmp_path / "self_test.o"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
