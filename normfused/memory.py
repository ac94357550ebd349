"""Memory that the C++ core keeps for large CPU outputs.

The C library returns a large block to the system when it is freed, and a fresh one costs a page fault for every page
that is written: more than a normalisation layer's arithmetic. So the memory of outputs of 1 MiB and more is kept when
they are gone, as CUDA's caching allocator does, and serves the next ones.
"""

import torch

from . import ops


def empty_cache() -> int:
    """Give the memory that is kept for CPU outputs back to the system, as torch.cuda.empty_cache does for CUDA.

    Returns:
        The number of bytes given back.
    """
    return torch.ops.normfused.empty_cache() if ops.LOADED else 0


def set_cache_limit(bytes: int) -> None:
    """Keep at most ``bytes`` for CPU outputs; 0 keeps nothing. By default it is an eighth of the machine's memory.

    What has been idle for more than a second is offered to the system, which takes it when it is short of memory.

    Raises:
        TypeError: ``bytes`` is not an integer.
        ValueError: ``bytes`` is negative.
    """
    if not isinstance(bytes, int):
        raise TypeError(f"set_cache_limit: bytes must be an integer, got {bytes!r}")
    if bytes < 0:
        raise ValueError(f"set_cache_limit: bytes must not be negative, got {bytes}")
    if ops.LOADED:
        torch.ops.normfused.set_cache_limit(bytes)
