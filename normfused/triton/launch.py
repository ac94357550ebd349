"""What every launch shares."""

import contextlib
import ctypes
import functools
import math

import torch
import triton
from triton.runtime.jit import JITFunction

# TRITON_INTERPRET=1, read when triton is imported, makes every kernel an interpreted one: it runs on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def wrap_triton(kernel):
    """torch.library.wrap_triton, by which torch.compile sees the kernel; an interpreted kernel as it is."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def on_device(function):
    """Make the device of a function's first argument the current one: that is where Triton launches."""

    @functools.wraps(function)
    def guarded(tensor, *args, **kwargs):
        index = tensor.device.index
        with contextlib.nullcontext() if index is None else torch.accelerator.device_index(index):
            return function(tensor, *args, **kwargs)

    return guarded


def halves(name, value):
    """A float as two float32 arguments: Triton would round it to one."""
    high = ctypes.c_float(value).value
    return {f"{name}_high": high, f"{name}_low": value - high if math.isfinite(high) else 0.0}


def tiles(extent, plan):
    """The arguments by which a program finds its tiles."""
    return {
        "sample": extent.N * extent.C * extent.S,
        "channels": plan.channels,
        "blocks": plan.blocks,
        "splits": plan.splits,
        "split_tiles": plan.split_tiles,
        "tiles": plan.tiles,
        "N": extent.N,
        "C": extent.C,
        "S": extent.S,
        "rows": extent.N * extent.S,
        "CHANNELS_LAST": plan.channels_last,
        "WIDE": plan.wide,
        "BLOCK_N": plan.block_n,
        "BLOCK_S": plan.block_s,
        "BLOCK_C": plan.block_c,
    }


def groups(extent):
    """The arguments by which a program finds the statistics of a channel."""
    return {"G": extent.G, "group": extent.C // extent.G}


def programs(extent, plan):
    """The grid of a kernel over tiles; one-dimensional, for the other dimensions end at 65,535."""
    return (extent.B * plan.splits * plan.blocks,)
