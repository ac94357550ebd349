"""Which backend serves which tensor, and why.

"extension": our C++ operators. "torch": PyTorch's own operators, composed (native.py).
"""

import contextlib
import platform
import warnings

import torch

from . import ops
from .version import __version__

BACKENDS = ("extension", "torch")

# Device types our operators have kernels for; what remains is served by PyTorch's own operators.
_EXTENSION_DEVICES = ("cpu", "meta")

_override: str | None = None
_decided: dict[str, str] = {}


def choose(tensor) -> str:
    """The backend that serves ``tensor``; decided once per device type, overridden by use_backend."""
    if _override is not None:
        if _override == "extension" and tensor.device.type not in _EXTENSION_DEVICES:
            raise RuntimeError(
                f'use_backend("extension") cannot be honoured for a tensor on {tensor.device}: '
                f"{_why_not_extension(tensor.device.type)}"
            )
        return _override
    return _decision(tensor.device.type)


# A constant to torch.compile, which could neither trace the warning nor guard on the dictionary that it is kept in.
@torch.compiler.assume_constant_result
def _decision(device_type):
    return _decided.get(device_type) or _decide(device_type)


def _decide(device_type):
    why_not = _why_not_extension(device_type)
    _decided[device_type] = "extension" if why_not is None else "torch"
    if why_not is not None and device_type != "meta":
        warnings.warn(
            f"normfused: tensors on {device_type} are served by PyTorch's own operators, at their speed: {why_not}",
            stacklevel=5,
        )
    return _decided[device_type]


def _why_not_extension(device_type):
    """Why the extension cannot serve a device type, with the cure; None if it can."""
    if not ops.LOADED:
        return ops.WHY_NOT
    if device_type == "cuda":
        return cuda_info()["why_not"]
    if device_type not in _EXTENSION_DEVICES:
        return f"normfused has no kernels for {device_type}"
    return None


@contextlib.contextmanager
def use_backend(name):
    """Serve every fused layer in the block by the backend called ``name`` ("extension" or "torch"), in all threads.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend is not available here (the message says why), or not for a tensor's device.
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "extension" and not ops.LOADED:
        raise RuntimeError(f'use_backend("extension") cannot be honoured: {ops.WHY_NOT}')
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def cuda_info():
    """{"built", "archs", "why_not"}: whether CUDA kernels are part of this build."""
    return {"built": False, "archs": [], "why_not": ops.BUILD.get("cuda_why_not", ops.WHY_NOT)}


def info() -> dict:
    """What is built, what runs, and why.

    Returns:
        {"version", "torch", "python", "extension": {"built", "instruction_set", "compiler", "why_not"},
        "cuda": {"built", "archs", "why_not"}, "triton": {"installed", "used", "why_not"},
        "backend": {device type: name}}
    """
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator().type)
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": {
            "built": ops.LOADED,
            "instruction_set": ops.BUILD.get("instruction_set"),
            "compiler": ops.BUILD.get("compiler"),
            "why_not": ops.WHY_NOT,
        },
        "cuda": cuda_info(),
        "triton": {
            "installed": triton_version,
            "used": False,
            "why_not": "this version of normfused has no Triton kernels",
        },
        "backend": {
            device: _override or ("extension" if _why_not_extension(device) is None else "torch") for device in devices
        },
    }
