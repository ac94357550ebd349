"""Builds the C++ core where there is a compiler, for CUDA too where there is nvcc; the rest is in pyproject.toml."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

from build_backend import check_requirements, why_pure_python

# -fno-trapping-math lets comparisons become blends; -g0 takes back Python's own -g: smaller, compiled sooner.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
USE_CUDA = os.environ.get("USE_CUDA") != "0"
BUILDS = not {"egg_info", "dist_info", "sdist"} & {*sys.argv}  # pip's questions and an archive of sources take no torch


def cuda_target(torch, tools):
    """nvcc's architecture flags, and what is built: {"version", "archs", "why_not"}; FORCE_CUDA=1 raises the reason."""
    version, flags, nvcc = "", [], Path(tools.CUDA_HOME or "", "bin/nvcc")
    if (wanted := torch.version.cuda if USE_CUDA else None) is None:
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
            flags, why_not = [], f"nvcc is of CUDA {version}, torch of CUDA {wanted}; set CUDA_HOME to one like torch's"
    if why_not and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"FORCE_CUDA=1: the CUDA kernels cannot be built: {why_not}")
    if why_not and wanted:
        print(f"normfused: installing without the CUDA kernels: {why_not}")
    return flags, {"version": version, "archs": re.sub(r"\S*code=", "", " ".join(flags)), "why_not": why_not}


def cuda_library_dirs(tools):
    """torch's guess, which a wrapper of nvcc in PATH leads astray, and what nvcc itself links from."""
    says = subprocess.run([f"{tools.CUDA_HOME}/bin/nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return [*tools.library_paths("cuda"), *dict.fromkeys(re.findall(r'"-L([^"]+)"', says))]


def core():
    """setup()'s arguments for the compiled part: the module _C, and a library of operators for each device."""
    import torch
    from torch.utils import cpp_extension as tools

    arch_flags, cuda = cuda_target(torch, tools)
    devices = {"cpu": (cpu := {"extra_compile_args": FLAGS})}
    if not cuda["why_not"]:
        flags = {"cxx": FLAGS, "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden", *arch_flags]}
        devices["cuda"] = {"extra_compile_args": flags, "library_dirs": cuda_library_dirs(tools)}
        devices["cuda"]["libraries"] = ["torch_cuda", "cudart_static", "rt", "dl"]
    macros = [(f"NORMFUSED_CUDA_{name.upper()}", json.dumps(value)) for name, value in cuda.items()]
    modules = [Extension("normfused._C", ["csrc/module.cpp"], tools.include_paths(), macros, **cpu)]
    modules.append(tools.CppExtension("normfused._autograd", ["csrc/autograd.cpp"], **cpu))
    # LibTorch's stable ABI: these run on every torch from 2.10 on; without Python's symbols, torch alone can load them.
    stable = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]
    common = {"define_macros": stable, "extra_link_args": ["-Wl,--no-as-needed"], "py_limited_api": True}
    for device, options in devices.items():
        patterns = "torch/*.cpp", f"*/{device}/**/*.cpp", f"*/{device}/**/*.cu"
        sources = [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]
        modules.append(tools.CppExtension(f"normfused._{device}", sources, **common, **options))
    return {"ext_modules": modules, "cmdclass": {"build_ext": tools.BuildExtension}}


sys.argv.insert(1, "--quiet")  # so that what fails is not below a hundred lines of files that were copied
if (reason := why_pure_python()) and BUILDS:
    print(f"normfused: installing without the C++ core, PyTorch's own operators serve instead: {reason}")
try:
    check_requirements(compiles=not reason)
    setup(**(core() if BUILDS and not reason else {}))
except (ModuleNotFoundError, RuntimeError) as error:
    raise SystemExit(f"normfused is not built: {error} (it needs torch >= 2.10, setuptools >= 77, ninja)") from None
