"""Builds the C++ core where there is a compiler, for CUDA too where there is nvcc; the rest is in pyproject.toml."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

# -fno-trapping-math lets comparisons become blends; NaN and infinities keep their meaning.
FLAGS = ["-O3", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# LibTorch's stable ABI: what is built here runs on every torch from 2.10 on.
STABLE = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]
USE_CUDA, FORCE_CUDA = os.environ.get("USE_CUDA") != "0", os.environ.get("FORCE_CUDA") == "1"


def why_pure_python():
    """Why there is nothing to compile with, or None. A compiler that fails on our code fails the build instead."""
    if not sys.platform.startswith("linux"):
        return f"the C++ core is built on Linux only, this is {sys.platform}"
    probe = [*(compiler := os.environ.get("CXX", "c++")).split(), "-x", "c++", "-fsyntax-only", "-"]
    probed = {"input": b"#include <vector>", "capture_output": True}
    if shutil.which(probe[0]) and subprocess.run(probe, **probed).returncode == 0:
        return None
    return f"the C++ compiler, {compiler}, is missing or cannot compile an empty program"


def cuda_target(torch, tools):
    """nvcc's architecture flags, and what is built: {"version", "archs", "why_not"}; FORCE_CUDA=1 raises the reason."""
    version, flags, nvcc = "", [], Path(tools.CUDA_HOME or "", "bin/nvcc")
    wanted = torch.version.cuda if USE_CUDA else None
    if wanted is None:
        why_not = f"torch {torch.__version__} has no CUDA" if USE_CUDA else "it was built with USE_CUDA=0"
    elif not nvcc.is_absolute() or not nvcc.exists():
        why_not = "nvcc was not found; set CUDA_HOME to a CUDA toolkit"
    else:
        version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
        if torch.cuda.device_count() == 0:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
        flags = [flag for flag in tools._get_cuda_arch_flags() if int(re.search(r"compute_(\d+)", flag)[1]) >= 80]
        why_not = "" if flags else "no GPU of compute capability 8.0 or above was found or asked for"
        if version.split(".")[0] != wanted.split(".")[0]:
            why_not = f"nvcc is of CUDA {version}, torch of CUDA {wanted}; set CUDA_HOME to a toolkit like torch's"
    if why_not and FORCE_CUDA:
        raise SystemExit(f"FORCE_CUDA=1: the CUDA kernels cannot be built: {why_not}")
    if why_not and wanted:
        print(f"normfused: installing without the CUDA kernels: {why_not}")
    return flags, {"version": version, "archs": re.sub(r"\S*code=", "", " ".join(flags)), "why_not": why_not}


def operators(tools, device, flags, **options):
    """The operators' library for a device: without Python symbols, so that torch alone can load it."""
    patterns = "torch/*.cpp", f"*/{device}/**/*.cpp", f"*/{device}/**/*.cu"
    sources = sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))
    options |= {"define_macros": STABLE, "extra_compile_args": flags, "extra_link_args": ["-Wl,--no-as-needed"]}
    return tools.CppExtension(f"normfused._{device}", sources, py_limited_api=True, **options)


def core():
    """setup()'s arguments for the compiled part."""
    import torch
    from torch.utils import cpp_extension as tools

    arch_flags, cuda = cuda_target(torch, tools)
    modules = [operators(tools, "cpu", FLAGS)]
    if not cuda["why_not"]:
        flags = {"cxx": FLAGS, "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden", *arch_flags]}
        link = {"libraries": ["torch_cuda", "cudart_static", "rt", "dl"], "library_dirs": tools.library_paths("cuda")}
        modules.append(operators(tools, "cuda", flags, **link))
    macros = [(f"NORMFUSED_CUDA_{name.upper()}", json.dumps(value)) for name, value in cuda.items()]
    include = [__import__("pybind11").get_include(), *tools.include_paths()]
    modules.append(Extension("normfused._C", ["csrc/module.cpp"], include, macros, extra_compile_args=FLAGS))
    return {"ext_modules": modules, "cmdclass": {"build_ext": tools.BuildExtension}}


if reason := why_pure_python():
    print(f"normfused: installing without the C++ core, PyTorch's own operators serve instead: {reason}")
setup(**({} if reason else core()))
