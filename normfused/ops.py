"""Typed access to the operators in torch.ops.normfused, and the fake (meta) kernels that Triton's share.

LOADED says whether the C++ core is there; WHY_NOT says in a sentence why it is not; BUILD holds the build information.
CUDA_WHY_NOT says why the operators have no CUDA kernels (None: they have). AUTOGRAD is the C++ form of autograd.py's
functions, or None, and AUTOGRAD_WHY_NOT says why.
"""

from pathlib import Path
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

LOADED = False
WHY_NOT: str | None = None
CUDA_WHY_NOT: str | None = None
BUILD: dict[str, Any] = {}
AUTOGRAD: Any = None
AUTOGRAD_WHY_NOT: str | None = None


def _load() -> str | None:
    """Load the operator library; returns why it could not be loaded, or None."""
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError:
        cure = "install a C++ compiler (Debian: apt-get install g++ python3-dev) and reinstall normfused"
        if (tree := Path(__file__).parent.parent).joinpath("setup.py").exists():
            cure = f"this is the source tree {tree}: start Python elsewhere for an installed normfused, or {cure}"
        return f"the C++ core is not built; {cure}"
    BUILD.update(_C.build_info())
    (library,) = Path(__file__).parent.glob("_cpu*.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the C++ core does not load under torch {torch.__version__} (it needs torch >= 2.10): {error}"
    return None


def _load_cuda() -> str | None:
    """Load the CUDA kernels of the operators; returns why they could not be, or None. Does not initialise CUDA."""
    if not LOADED:
        return WHY_NOT
    if torch.version.hip:
        return f"normfused's CUDA kernels are for NVIDIA's GPUs, torch {torch.__version__} is a build for AMD's"
    built, running = BUILD["cuda_version"], torch.version.cuda
    rebuild = "reinstall normfused where torch and nvcc are, with FORCE_CUDA=1 and pip's --no-build-isolation"
    if running is None:
        rebuild = f"install a CUDA build of torch, then {rebuild}"
    if BUILD["cuda_why_not"]:
        return f"normfused was built without CUDA kernels ({BUILD['cuda_why_not']}); {rebuild}"
    if running is None:
        return f"normfused has CUDA kernels, but torch {torch.__version__} has no CUDA; install a CUDA build"
    if built.split(".")[0] != running.split(".")[0]:
        return f"normfused's CUDA kernels were built with CUDA {built}, this torch runs on CUDA {running}; {rebuild}"
    try:
        (library,) = Path(__file__).parent.glob("_cuda*.so")
        torch.ops.load_library(library)
    except (OSError, ValueError) as error:
        return f"normfused's CUDA kernels do not load under torch {torch.__version__}: {error}"
    return None


def _load_autograd() -> str | None:
    """Load the C++ autograd functions; returns why they could not be, or None. The operators do not need them."""
    global AUTOGRAD
    if not LOADED:
        return WHY_NOT
    if (built := BUILD["torch"]) != torch.__version__.split("+")[0]:
        return f"autograd in C++ was built for torch {built} and this is torch {torch.__version__}; reinstall normfused"
    try:
        from . import _autograd as AUTOGRAD  # type: ignore[attr-defined]
    except ImportError as error:
        return f"autograd in C++ does not load under torch {torch.__version__}: {error}"
    return None


WHY_NOT = _load()
LOADED = WHY_NOT is None
CUDA_WHY_NOT = _load_cuda()
AUTOGRAD_WHY_NOT = _load_autograd()


def _check_devices(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    for t in others:
        torch._check(
            t is None or t.device == x.device,
            lambda t=t: f"normfused: all tensors must be on one device, got {x.device} and {t.device}",
        )


def batch_norm_memory_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format of outputs: as in PyTorch's own batch_norm, what is dense in both counts as contiguous."""
    return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)


def group_norm_memory_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format of outputs: as in PyTorch's own group_norm, the strides decide."""
    return suggest_memory_format(x)


def _batch_norm_empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=batch_norm_memory_format(x))


def _group_norm_empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=group_norm_memory_format(x))


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    pre_activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(x, weight, bias, residual, running_mean, running_var, num_batches_tracked)
    mean = x.new_empty(x.shape[1], dtype=_statistics_dtype(x))
    return _batch_norm_empty_like(x), mean, torch.empty_like(mean)


def fake_batch_norm_act_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    training: bool,
    activation: str | None,
    pre_activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    need_dresidual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(x, dy, weight, bias, residual, mean, invstd)
    return (
        _batch_norm_empty_like(x) if need_dx else x.new_empty(0),
        mean.new_empty(x.shape[1]) if need_dweight else mean.new_empty(0),
        mean.new_empty(x.shape[1]) if need_dbias else mean.new_empty(0),
        _batch_norm_empty_like(x) if need_dresidual else x.new_empty(0),
    )


def fake_group_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(x, weight, bias)
    mean = x.new_empty((x.shape[0], num_groups), dtype=_statistics_dtype(x))
    return _group_norm_empty_like(x), mean, torch.empty_like(mean)


def fake_group_norm_act_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    activation: str | None,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_devices(x, dy, weight, bias, mean, rstd)
    return (
        _group_norm_empty_like(x) if need_dx else x.new_empty(0),
        mean.new_empty(x.shape[1]) if need_dweight else mean.new_empty(0),
        mean.new_empty(x.shape[1]) if need_dbias else mean.new_empty(0),
    )


def fuses_pre_activation(
    device_type: str, pre_activation: str, activation: str | None, residual: torch.Tensor | None
) -> bool:
    """Whether the BatchNorm kernels of a device apply ``pre_activation``; otherwise it is an operator of its own."""
    if device_type == "cpu":
        return pre_activation in ("relu", "relu6") and activation is None and residual is None
    return device_type == "cuda"


if LOADED:
    batch_norm_act = torch.ops.normfused.batch_norm_act.default
    batch_norm_act_backward = torch.ops.normfused.batch_norm_act_backward.default
    group_norm_act = torch.ops.normfused.group_norm_act.default
    group_norm_act_backward = torch.ops.normfused.group_norm_act_backward.default

    BUILD["instruction_set"] = torch.ops.normfused.cpu_instruction_set()

    # torch.compile's inductor lays tensors out as convolutions like them, and would copy what our kernels read as it is
    # into the layout that it was traced in. (The stable ABI of torch 2.10 has no way to declare it.)
    for _operator in (batch_norm_act, batch_norm_act_backward, group_norm_act, group_norm_act_backward):
        _operator.tags.append(torch.Tag.flexible_layout)

    torch.library.register_fake("normfused::batch_norm_act", fake_batch_norm_act)
    torch.library.register_fake("normfused::batch_norm_act_backward", fake_batch_norm_act_backward)
    torch.library.register_fake("normfused::group_norm_act", fake_group_norm_act)
    torch.library.register_fake("normfused::group_norm_act_backward", fake_group_norm_act_backward)
