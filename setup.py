"""Builds the C++ core where there is a compiler; everything else is in pyproject.toml."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

CPU_SOURCES = [
    *sorted(str(path) for path in Path("csrc/torch").glob("*.cpp")),
    *sorted(str(path) for path in Path("csrc/kernels/cpu").glob("**/*.cpp")),
]
# -fno-trapping-math lets comparisons become blends; NaN and infinities keep their meaning.
FLAGS = ["-O3", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# LibTorch's stable ABI: what is built here runs on every torch from 2.10 on.
STABLE = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]


def why_pure_python():
    """Why there is nothing to compile with, or None. A compiler that fails on our code fails the build instead."""
    if not sys.platform.startswith("linux"):
        return f"the C++ core is built on Linux only, this is {sys.platform}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler}) was found"
    probe = [*compiler.split(), "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input=b"#include <vector>\n", capture_output=True).returncode != 0:
        return f"the C++ compiler ({compiler}) cannot compile an empty program"
    return None


def why_no_cuda():
    """Why no CUDA kernels are built. FORCE_CUDA=1 makes it an error, USE_CUDA=0 a choice."""
    why = "this version of normfused has no CUDA kernels yet"
    if os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"FORCE_CUDA=1: {why}")
    return "it was built with USE_CUDA=0" if os.environ.get("USE_CUDA") == "0" else why


def extensions():
    from torch.utils.cpp_extension import CppExtension, include_paths

    why = json.dumps(why_no_cuda())
    return [
        # Operators: no Python symbols, so that torch alone can load them.
        CppExtension(
            "normfused._cpu",
            CPU_SOURCES,
            define_macros=STABLE,
            extra_compile_args=FLAGS,
            extra_link_args=["-Wl,--no-as-needed"],
            py_limited_api=True,
        ),
        Extension(
            "normfused._C",
            ["csrc/module.cpp"],
            include_dirs=[__import__("pybind11").get_include(), *include_paths()],
            define_macros=[("NORMFUSED_CUDA_WHY_NOT", why)],
            extra_compile_args=["-O2", "-fvisibility=hidden"],
            language="c++",
        ),
    ]


if reason := why_pure_python():
    print(f"normfused: installing without the C++ core, PyTorch's own operators serve instead: {reason}")
    setup()
else:
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
