"""The CUDA kernels under the emulator with sanitizers and with mistakes in them, and compiled by nvcc."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulated import COMPILER, DTYPES, FORMATS, ROOT, SCHEDULES, SOURCES, build, built, rebuild
from kernel_cases import (
    HELD_SELECTION,
    ON_CHIP,
    SMALL_DEVICES,
    SMALL_L2,
    Case,
    check_kinks,
    prepare,
    run_batch_norm,
    run_group_norm,
)

# (file, the source to compile again, what is in the file, what is put there)
MUTATIONS = {
    "missing barrier before a tile's columns are combined": (
        "stats.cu",
        "stats.cu",
        "  __syncthreads();\n  auto* partials",
        "  auto* partials",
    ),
    "missing barrier in block_sum": (
        "block_reduce.cuh",
        "stats.cu",
        "  __syncthreads();\n  // Every warp",
        "  // Every warp",
    ),
    "one slot too many": (
        "elements.cuh",
        "apply.cu",
        "view.rows * pass.slots_per_row)",
        "view.rows * pass.slots_per_row + 1)",
    ),
    "one row too few": ("elements.cuh", "apply.cu", "row < c.end; row += step", "row + 1 < c.end; row += step"),
    "elements before a plane": ("elements.cuh", "apply.cu", "max(-inside, int64_t(0))", "int64_t(0)"),
    "mask of an unrounded z": ("elements.cuh", "backward_apply.cu", "kSix = 6 - 0x1p-6f", "kSix = 6"),
    "count of another row group": ("elements.cuh", "stats.cu", "/ pass.row_groups : 0", "/ pass.row_groups + 1 : 0"),
    "another element's residual in the backward": (
        "elements.cuh",
        "backward_apply.cu",
        "  if (s.residual) z += to_accumulator(residual.values[v]);\n  return activate_backward",
        "  if (s.residual) z += to_accumulator(residual.values[0]);\n  return activate_backward",
    ),
    "a wait that leaves copies in flight": (
        "on_chip_forward.cu",
        "on_chip_forward.cu",
        "async_wait<0>();\n  // A",
        "async_wait<1>();\n  // A",
    ),
    "missing barrier before other warps sum the rows": (
        "on_chip_backward.cu",
        "on_chip_backward.cu",
        "  async_wait<0>();\n  __syncthreads();",
        "  async_wait<0>();",
    ),
    "a barrier of the block instead of the cluster's": (
        "on_chip.cuh",
        "on_chip_forward.cu",
        "Exchange::cluster) {\n      cluster_sync();",
        "Exchange::cluster) {\n      __syncthreads();",
    ),
    "a block that exits while others read from it": (
        "on_chip.cuh",
        "on_chip_forward.cu",
        "if (units.exchange == Exchange::cluster) cluster_sync();",
        "",
    ),
    "a barrier of the block instead of the grid's": (
        "on_chip.cuh",
        "on_chip_forward.cu",
        "grid_sync(units.barrier);",
        "__syncthreads();",
    ),
    "barriers that are not cleared": (
        "on_chip_forward.cu",
        "on_chip_forward.cu",
        "barriers[i] = 0;",
        "barriers[i] = 1;",
    ),
    "the first block's values for all of them": (
        "on_chip.cuh",
        "on_chip_backward.cu",
        "all[rank * stride + i]",
        "all[i]",
    ),
    "the channel of another row": (
        "on_chip.cuh",
        "on_chip_backward.cu",
        "s.pass.view.rows + row :",
        "s.pass.view.rows + row / 2 :",
    ),
}


def selection(kernels):
    """A call of every kernel, small."""
    for turn, (aligned, layout, shape) in enumerate(
        itertools.product((True, False), FORMATS, ((2, 8, 36), (19, 3, 5), (2, 3, 265)))
    ):
        prepare(kernels, turn)
        choices = {"aligned": aligned, "path": "two_kernels"}
        dtype = DTYPES[turn % 4]
        run_batch_norm(kernels, Case(shape, dtype, layout, "relu6", turn, residual=True, **choices))
        run_group_norm(kernels, Case(shape, dtype, layout, "silu", turn, groups=1, **choices))
    kernels.set_limits(SMALL_L2)
    for layout, s in itertools.product(FORMATS, (8, 264)):
        check_kinks(kernels, torch.bfloat16, s, layout)
    held(kernels, ON_CHIP)


# What is read too early shows where the last warp goes first; what is taken away too early, where the first one does.
FIRST_SCHEDULE = {"two_kernels": 0, "block": 1, "cluster": 0, "cooperative": 2}


def held(kernels, paths):
    kernels.set_limits(SMALL_DEVICES[0])
    for turn, (path, (layout, shape)) in enumerate(itertools.product(paths, HELD_SELECTION)):
        # Another schedule for every shape, and for every path.
        kernels.set_schedule(*SCHEDULES[1 + (turn + FIRST_SCHEDULE[path]) % 3])
        case = Case(shape, torch.float16, layout, "relu6", turn, groups=2, residual=turn % 2 == 0, path=path)
        run_batch_norm(kernels, case)
        run_group_norm(kernels, case)


def patched(folder, file, old, new):
    """A copy of the sources with one change."""
    for part in ("csrc/kernels", "tests/emulator"):
        shutil.copytree(ROOT / part, folder / part)
    path = folder / "csrc/kernels/cuda" / file
    source = path.read_text()
    assert source.count(old) == 1, f"{file} has {source.count(old)} times {old!r}"
    path.write_text(source.replace(old, new))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation, tmp_path):
    file, source, old, new = MUTATIONS[mutation]
    (tmp_path / "built").mkdir()
    library = rebuild(tmp_path / "built", patched(tmp_path / "source", file, old, new), built(), source)
    result = run_selection(library)
    assert result.returncode != 0


def run_selection(library, function="selection", **environment):
    """A function of this file in a process of its own; it may crash."""
    code = f"import emulated, test_cuda_sanitizers as t; t.{function}(emulated.Kernels({str(library)!r}))"
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_the_selection_passes():
    result = run_selection(built()[0])
    assert result.returncode == 0, result.stdout + result.stderr


def sanitizer_runtime(name):
    """The library that a sanitized one needs to be loaded before everything else."""
    found = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{COMPILER[0]} has no {name}")
    environment = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}
    if subprocess.run([sys.executable, "-c", ""], env=environment).returncode != 0:
        pytest.skip(f"no program runs here with {name}")
    return found


@pytest.mark.thorough
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    runtime = sanitizer_runtime("libasan.so")
    library, _ = build(
        tmp_path, ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], emulator=built()[1]
    )
    result = run_selection(library, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0")
    assert result.returncode == 0, result.stdout + result.stderr


def races(kernels):
    """Every path; what is a race does not depend on sizes."""
    held(kernels, ("two_kernels", *ON_CHIP))


@pytest.mark.thorough
def test_thread_sanitizer(tmp_path):
    """A race is one whatever the schedule: the emulator tells ThreadSanitizer what orders threads and nothing else."""
    runtime = sanitizer_runtime("libtsan.so")
    library, _ = build(tmp_path, ["-O1", "-g1", "-fsanitize=thread"], emulator=built()[1])
    # torch itself is not instrumented.
    result = run_selection(library, "races", LD_PRELOAD=runtime, TSAN_OPTIONS="ignore_noninstrumented_modules=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "data race" not in result.stderr


@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_without_a_warning_or_a_spill(architecture, tmp_path):
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = ["-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra"]
    registers = []
    begin = time.monotonic()

    def compile_one(source):
        target = tmp_path / f"{source.stem}.o"
        command = [nvcc, *flags, "-Werror=all-warnings", "-c", source, "-o", target]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, SOURCES))
    for result in results:
        assert result.returncode == 0, result.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
        assert all(spill == ("0", "0") for spill in spills), result.stderr
        registers += map(int, re.findall(r"Used (\d+) registers", result.stderr))
    print(
        f"{architecture}: {len(registers)} kernels, at most {max(registers)} registers,",
        f"compiled in {time.monotonic() - begin:.0f} s",
    )
    assert 0 < len(registers) <= 250
    assert max(registers) <= 128
