"""The CUDA kernels on the CPU: compiled with the emulator into a library, and called by ctypes."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SOURCES = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish", "sigmoid", "leaky_relu")
FORMATS = ("contiguous", "channels_last")
PATH_NAMES = ("automatic", "empty", "one_kernel", "two_kernels", "block", "cluster", "cooperative")
SCHEDULES = ((0, 0), (1, 0), (1, 1), (2, 1))


def structure(name, **fields):
    return type(name, (Structure,), {"_fields_": list(fields.items())})


def pointers(*names):
    return dict.fromkeys(names, c_void_p)


Extent = structure("Extent", N=c_int64, C=c_int64, S=c_int64, format=c_int)
HEAD = {"dtype": c_int, "activation": c_int, "extent": Extent}
BatchNormForward = structure(
    "BatchNormForward",
    **HEAD,
    training=c_bool,
    momentum=c_double,
    eps=c_double,
    **pointers("x", "residual", "weight", "bias", "running_mean", "running_var", "y", "mean", "invstd", "workspace"),
    **pointers("num_batches_tracked"),
    cumulative=c_bool,
    narrow_parameters=c_bool,
    narrow_running=c_bool,
    path=c_int,
    pre_activation=c_int,
)
BatchNormBackward = structure(
    "BatchNormBackward",
    **HEAD,
    training=c_bool,
    **pointers("dy", "x", "residual", "weight", "bias", "mean", "invstd"),
    **pointers("dx", "dweight", "dbias", "dresidual", "workspace"),
    narrow_parameters=c_bool,
    path=c_int,
    pre_activation=c_int,
)
GroupNormForward = structure(
    "GroupNormForward",
    **HEAD,
    groups=c_int64,
    eps=c_double,
    **pointers("x", "weight", "bias", "y", "mean", "rstd", "workspace"),
    narrow_parameters=c_bool,
    path=c_int,
)
GroupNormBackward = structure(
    "GroupNormBackward",
    **HEAD,
    groups=c_int64,
    **pointers("dy", "x", "weight", "bias", "mean", "rstd", "dx", "dweight", "dbias", "workspace"),
    narrow_parameters=c_bool,
    path=c_int,
)
DeviceLimits = structure(
    "DeviceLimits",
    compute_capability=c_int,
    multiprocessors=c_int,
    threads_per_multiprocessor=c_int,
    blocks_per_multiprocessor=c_int,
    shared_per_block=c_size_t,
    shared_per_multiprocessor=c_size_t,
    shared_reserved_per_block=c_size_t,
    max_cluster=c_int,
    l2_bytes=c_size_t,
    max_grid_x=c_int64,
    max_grid_y=c_int64,
)


def limits(compute_capability=90, multiprocessors=132, shared=227 << 10, l2_bytes=50 << 20, max_cluster=8):
    return DeviceLimits(
        compute_capability,
        multiprocessors,
        2048,
        32,
        shared,
        shared + 1024,
        1024,
        max_cluster,
        l2_bytes,
        2**31 - 1,
        65535,
    )


def compile_with(*arguments):
    result = subprocess.run([*COMPILER, *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def compiler_or_skip():
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler ({COMPILER[0]}) was found")


def compile_one(folder, root, flags, source):
    target = folder / f"{source.stem}.o"
    include = f"-I{root / 'tests/emulator'}"
    compile_with(*flags, "-DNORMFUSED_EMULATOR", include, "-x", "c++", "-c", source, "-o", target)
    return target


def build_folder():
    """Of what is compiled for all tests: what it is made of is in its name, so that nothing in it is ever too old."""
    made_of = hashlib.sha256(f"{torch.__version__} {sys.version}".encode())
    made_of.update(subprocess.run([*COMPILER, "--version"], capture_output=True).stdout)
    sources = [*Path(__file__).parent.glob("emulated*.py")]
    for folder in ("csrc/kernels", "csrc/torch", "tests/emulator"):
        sources += (path for path in (ROOT / folder).rglob("*") if path.is_file())
    for path in sorted(sources):
        made_of.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return ROOT / "build/emulator" / made_of.hexdigest()[:16]


def once(name, make):
    """What ``make(folder)`` builds in a folder of this name, by the first process that asks for it, in this run of the
    tests or an earlier one: the others wait."""
    import fcntl  # not on Windows, where conftest.py is read too

    parent = build_folder()
    for other in parent.parent.glob("*"):
        if other != parent:
            shutil.rmtree(other, ignore_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / name
    with (parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = Path(tempfile.mkdtemp(dir=parent))
            make(unfinished)
            unfinished.rename(folder)
    return folder


@functools.cache
def built():
    """The library of the kernels, and the emulator's object."""
    compiler_or_skip()
    folder = once("kernels", build)
    return folder / "libkernels.so", folder / "emulator.o"


def build(folder, flags=("-O1",), emulator=None):
    """Compiles the kernels into a library in ``folder``; returns its path and the emulator's object."""
    if emulator is None:
        # Never with a sanitizer.
        emulator = compile_one(folder, ROOT, ["-O2"], ROOT / "tests/emulator/emulator.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [*SOURCES, ROOT / "tests/emulator/kernels.cpp"]
        objects = list(pool.map(lambda source: compile_one(folder, ROOT, flags, source), sources))
    library = folder / "libkernels.so"
    compile_with(*flags, "-shared", *objects, emulator, "-o", library)
    return library, emulator


def rebuild(folder, root, built, source):
    """A library in ``folder`` that differs from ``built`` in one source, which is compiled from under ``root``."""
    changed = compile_one(folder, root, ["-O0"], root / "csrc/kernels/cuda" / source)
    kept = [path for path in built[0].parent.glob("*.o") if path.name != changed.name]
    library = folder / "libkernels.so"
    compile_with("-shared", changed, *kept, "-o", library)
    return library


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


class Kernels:
    """The entry points over torch tensors seen as (N, C, S)."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.status_message.restype = self.library.launch_names.restype = c_char_p
        self.library.count_batch.argtypes = [c_void_p]
        self.library.set_schedule.argtypes = [c_int, c_uint64]

    def set_schedule(self, schedule, seed=0):
        self.library.set_schedule(schedule, seed)

    def set_limits(self, device):
        self.library.set_limits(byref(device))

    def launches(self):
        return self.library.launch_names().decode().split()

    def clear_launches(self):
        self.library.clear_launches()

    def _check(self, status):
        assert status == 0, self.library.status_message(status).decode()

    def count_batch(self, num_batches_tracked):
        self._check(self.library.count_batch(num_batches_tracked.data_ptr()))

    @staticmethod
    def _head(x, layout, activation):
        n, c, s = x.shape if layout == "contiguous" else (x.shape[0], x.shape[2], x.shape[1])
        extent = Extent(n, c, s, FORMATS.index(layout))
        return {"dtype": DTYPES.index(x.dtype), "activation": ACTIVATIONS.index(activation), "extent": extent}

    def _run(self, name, make, head, **fields):
        args = make(**head, **{k: pointer(t) if t is None or torch.is_tensor(t) else t for k, t in fields.items()})
        size = c_int64()
        self._check(getattr(self.library, f"{name}_workspace")(byref(args), byref(size)))
        # Exactly as large as asked for, between guards, and full of NaN.
        n = size.value
        memory = torch.full((n + 128,), 0xFF, dtype=torch.uint8)
        args.workspace = memory.data_ptr() + 64
        self._check(getattr(self.library, name)(byref(args)))
        assert (memory[:64] == 0xFF).all(), "wrote before the workspace"
        assert (memory[64 + n :] == 0xFF).all(), "wrote past the workspace"

    def batch_norm_forward(self, x, layout, activation, pre_activation=None, **fields):
        head = self._head(x, layout, activation) | {"pre_activation": ACTIVATIONS.index(pre_activation)}
        self._run("batch_norm_forward", BatchNormForward, head, x=x, **fields)

    def batch_norm_backward(self, x, layout, activation, pre_activation=None, **fields):
        head = self._head(x, layout, activation) | {"pre_activation": ACTIVATIONS.index(pre_activation)}
        self._run("batch_norm_backward", BatchNormBackward, head, x=x, **fields)

    def group_norm_forward(self, x, layout, activation, groups, **fields):
        head = self._head(x, layout, activation) | {"groups": groups}
        self._run("group_norm_forward", GroupNormForward, head, x=x, **fields)

    def group_norm_backward(self, x, layout, activation, groups, **fields):
        head = self._head(x, layout, activation) | {"groups": groups}
        self._run("group_norm_backward", GroupNormBackward, head, x=x, **fields)
