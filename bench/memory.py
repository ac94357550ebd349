"""Peak memory of a piece of CPU code, from the profiler's allocation events."""

import contextlib
import gc

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import normfused


@contextlib.contextmanager
def garbage_apart():
    """No cyclic garbage is collected within: what was there before is, first, and what arises counts as held.

    Otherwise the collector's moment would be in the figures: `convert` leaves garbage that holds the model, and what it
    frees during a later measurement would be taken off that one's.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def peak_memory(fn) -> int:
    """Bytes that ``fn()`` held at its worst moment, beyond what was allocated before.

    The highest value of the running sum over PyTorch's CPU allocations and frees during the call. Not seen: memory that
    a library takes by itself (oneDNN's scratch pads), and frees of what was allocated earlier. What normfused keeps for
    its outputs is given back first, so that all of it is counted.
    """
    return peak_of_changes(_changes(fn))


def kept_memory(fn) -> int:
    """Bytes that are allocated after ``fn()`` and were not before, while its result is alive: of a forward pass, its
    result and what autograd keeps for the backward pass."""
    return sum(_changes(fn))


def _changes(fn):
    """The allocations (positive) and frees (negative) of ``fn()``, in bytes and in order."""
    with garbage_apart():
        normfused.empty_cache()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = fn()
            # What is idle is not kept by autograd.
            normfused.empty_cache()
    del result  # kept until here: what fn returns is part of what it holds
    # The raw events: profiler.events() attributes memory to operators and loses its order in time.
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_of_changes(changes) -> int:
    """The highest running sum of ``changes`` (bytes, allocations positive, frees negative), at least 0."""
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak
