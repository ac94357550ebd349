"""The CUDA binding over the emulated kernels, torch.ops.normfused_emulated.*: the tests' backend "emulated"."""

import functools
import shutil
import types

import emulated
import torch
from torch.utils import cpp_extension

from normfused import ops

NAMES = ("batch_norm_act", "batch_norm_act_backward", "group_norm_act", "group_norm_act_backward")


def why_not():
    """Why there is no emulator here, or None."""
    if ops.WHY_NOT is not None:
        return ops.WHY_NOT
    return None if shutil.which(emulated.COMPILER[0]) else f"no C++ compiler ({emulated.COMPILER[0]}) was found"


def build_binding(folder):
    kernels, objects = emulated.built()[0], []
    flags = ["-O1", "-DNORMFUSED_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()] + ["-fvisibility=hidden"]
    binding = emulated.ROOT / "csrc/torch"
    sources = [*binding.glob("*.cpp"), binding / "cuda/device.cpp", emulated.ROOT / "tests/emulator/library.cpp"]
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        emulated.compile_with(*flags, "-c", source, "-o", objects[-1])
    library = folder / "liboperators.so"
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    emulated.compile_with("-shared", *objects, kernels, *torch_libraries, f"-Wl,-rpath,{kernels.parent}", "-o", library)


@functools.cache
def operators():
    """What normfused.ops is to the extension."""
    torch.ops.load_library(emulated.once("binding", build_binding) / "liboperators.so")
    for name in NAMES:
        torch.library.register_fake(f"normfused_emulated::{name}", getattr(ops, f"fake_{name}"))
    namespace = torch.ops.normfused_emulated
    operators = {name: getattr(namespace, name).default for name in NAMES}
    return types.SimpleNamespace(**operators, fuses_pre_activation=lambda *_: True)
