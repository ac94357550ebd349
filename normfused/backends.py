"""Which backend serves which tensor, and why.

"extension": our C++ operators. "triton": the same operators in Triton. "torch": PyTorch's own, composed (native.py).
"""

import contextlib
import importlib.util
import platform
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from . import ops
from .version import __version__

BACKENDS = ("extension", "triton", "torch")

# Device types that Triton compiles for; "cuda" is AMD's name too.
_TRITON_DEVICES = ("cuda", "xpu")

_override: str | None = None
# By device type: the backend that serves it by default.
_decided: dict[str, str] = {}
# By backend and device type: why use_backend cannot be honoured ("": it can).
_refused: dict[tuple[str, str], str] = {}
# The operators of "extension" and, once imported, "triton", by the names that they have in ops.py.
OPERATORS: dict[str, Any] = {"extension": ops}


def choose(tensor: torch.Tensor) -> str:
    """The backend that serves ``tensor``; decided once per device type, overridden by use_backend."""
    if _override is not None:
        if why_not := _refusal(_override, tensor.device.type):
            raise RuntimeError(
                f'use_backend("{_override}") cannot be honoured for a tensor on {tensor.device}: {why_not}'
            )
        return _override
    # A torch.device takes longer to make than the question whether it is the CPU.
    return _decision("cpu" if tensor.is_cpu else tensor.device.type)


def _decision(device_type: str) -> str:
    return _decided.get(device_type) or _decide(device_type)


def _refusal(backend: str, device_type: str) -> str:
    if (backend, device_type) not in _refused:
        why_not = {"extension": _why_not_extension, "triton": _why_not_triton}.get(backend, lambda _: None)
        _refused[backend, device_type] = why_not(device_type) or ""
    return _refused[backend, device_type]


# Constants to torch.compile, which could neither trace the warning nor guard on the dictionaries that they are kept in:
# all that torch.compiler.assume_constant_result does, but for importing torch._dynamo and triton (a second).
_decision._dynamo_marked_constant = _refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide(device_type: str) -> str:
    backend, why_not = _preference(device_type)
    _decided[device_type] = backend
    if backend != "extension" and device_type != "meta":
        by = "normfused's Triton kernels" if backend == "triton" else "PyTorch's own operators, at their speed"
        warnings.warn(f"normfused: tensors on {device_type} are served by {by}: {why_not}", stacklevel=5)
    return backend


def _preference(device_type: str) -> tuple[str, str | None]:
    """(backend, why it is not the one before it) for a device type without use_backend."""
    why_not = _why_not_extension(device_type)
    if why_not is None:
        return "extension", None
    if device_type not in _TRITON_DEVICES:
        return "torch", why_not
    why_not_triton = _why_not_triton(device_type)
    if why_not_triton is None and OPERATORS["triton"].INTERPRETED:
        why_not_triton = "TRITON_INTERPRET is set, and interpreted kernels are for debugging: unset it"
    if why_not_triton is None:
        return "triton", why_not
    return "torch", f"{why_not}; {why_not_triton}"


def _why_not_extension(device_type: str) -> str | None:
    """Why the extension cannot serve a device type, with the cure; None if it can."""
    if not ops.LOADED:
        return ops.WHY_NOT
    if device_type == "cuda":
        return ops.CUDA_WHY_NOT or _why_not_gpus()
    if device_type not in ("cpu", "meta"):
        return f"normfused has no kernels for {device_type}"
    return None


def _why_not_gpus() -> str | None:
    """Why the CUDA kernels do not run on every GPU that torch sees; None if they do."""
    archs = _archs()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
        if major < 8:
            return f"the CUDA kernels need compute capability 8.0 or above, and cuda:{index} is a {name}"
        if not any(_runs_on(arch, major, minor) for arch in archs):
            return (
                f"the CUDA kernels were built for {', '.join(archs)}, which does not run on cuda:{index}, a {name}; "
                f'reinstall normfused with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
            )
    return None


def _archs() -> list[str]:
    archs: str = ops.BUILD.get("cuda_archs", "")
    return archs.split()


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for "sm_86" or "compute_80" runs on a GPU: the former on later ones of its generation, the latter,
    which is compiled on first use, on all later ones."""
    kind, _, number = arch.partition("_")
    if not number.isdecimal():
        # sm_90a and the like: that architecture alone.
        return number[:-1] == f"{major}{minor}"
    built = int(number[:-1]), int(number[-1])
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


_NO_TRITON = "triton is not installed; pip install triton"


def _import_triton() -> str | None:
    """Import Triton's operators; returns why that cannot be, with the cure, or None."""
    if "triton" in OPERATORS:
        return None
    if importlib.util.find_spec("triton") is None:
        return _NO_TRITON
    try:
        from . import triton
    except (ImportError, AttributeError) as error:
        return f"Triton's operators need triton >= 3.4 and torch >= 2.10, and do not import: {error!r}"
    OPERATORS["triton"] = triton
    return None


def _why_not_triton(device_type: str) -> str | None:
    """Why Triton cannot serve a device type, with the cure; None if it can."""
    why_not = _import_triton()
    if why_not is not None or device_type == "meta" or OPERATORS["triton"].INTERPRETED:
        return why_not
    if device_type not in _TRITON_DEVICES:
        return (
            f"Triton does not compile for {device_type}; to interpret its kernels, slowly, set TRITON_INTERPRET=1 "
            "before Python starts"
        )
    try:
        import triton

        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:
        # Whatever a driver raises that is not there or does not load.
        return f"Triton has no driver for {device_type}: {error}"
    if target.backend == "cuda" and target.arch < 70:
        return f"Triton compiles for compute capability 7.0 and above, this GPU has {target.arch / 10}"
    if device_type == "xpu" and not torch.xpu.get_device_properties().has_fp64:
        return "this GPU has no float64, in which the Triton kernels combine their sums"
    return None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every fused layer in the block by one backend, in all threads.

    Args:
        name: "extension", "triton" or "torch".

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend is not available here (the message says why), or not for a tensor's device.
    """
    global _override
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    why_not: str | None = _import_triton() if name == "triton" else ops.WHY_NOT if name == "extension" else None
    if why_not is not None:
        raise RuntimeError(f'use_backend("{name}") cannot be honoured: {why_not}')
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def cuda_info() -> dict[str, Any]:
    """{"built": whether CUDA kernels are part of this build, "version", "archs", "why_not": why they do not load}"""
    return {
        "built": bool(_archs()),
        "version": ops.BUILD.get("cuda_version") or None,
        "archs": _archs(),
        "why_not": ops.CUDA_WHY_NOT,
    }


def _triton_info(devices: list[str], served: dict[str, str]) -> dict[str, Any]:
    """{"installed": version or None, "used": whether it serves a device here, "why_not": why it does not}"""
    try:
        import triton

        installed = triton.__version__
    except ImportError:
        installed = None
    used = "triton" in served.values()
    why_not = None
    if not used:
        gpus = [device for device in devices if device in _TRITON_DEVICES]
        if gpus:
            why_not = _why_not_triton(gpus[0]) or _preference(gpus[0])[1] or "the extension serves this GPU"
        elif installed is None:
            why_not = _NO_TRITON
        else:
            # Nothing is imported to find that out: Triton's operators bring torch's compiler, which takes seconds.
            why_not = "there is no GPU here that Triton compiles for"
    return {"installed": installed, "used": used, "why_not": why_not}


def info() -> dict[str, Any]:
    """What is built, what runs, and why.

    Returns:
        {"version", "torch", "python", "extension": {"built", "instruction_set", "compiler", "autograd", "why_not"},
        "cuda": {"built", "version", "archs", "why_not"}, "triton": {"installed", "used", "why_not"},
        "backend": {device type: name}}
    """
    devices = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        devices.append(accelerator.type)
    served = {device: _override or _preference(device)[0] for device in devices}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": {
            "built": ops.LOADED,
            "instruction_set": ops.BUILD.get("instruction_set"),
            "compiler": ops.BUILD.get("compiler"),
            # The same numbers, but in Python a call costs the host some microseconds more.
            "autograd": f"in Python: {ops.AUTOGRAD_WHY_NOT}" if ops.AUTOGRAD is None else "in C++",
            "why_not": ops.WHY_NOT,
        },
        "cuda": cuda_info(),
        "triton": _triton_info(devices, served),
        "backend": served,
    }
