"""Interleaved timing: every competitor in every round, in shuffled order: drift of the machine hits all alike."""

import contextlib
import functools
import gc
import math
import mmap
import random
import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils import benchmark

from . import providers

# Blocks shorter than this are repeated: the clock and the loop must not show in a microsecond figure.
BLOCK_SECONDS = 2e-3
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds: median and quartiles; ``repeats`` calls make one round's figure."""

    median: float
    q25: float
    q75: float
    rounds: int
    repeats: int
    buffers: int = 1  # copies of the tensors that the calls rotate through

    @property
    def iqr(self) -> float:
        """Interquartile range in seconds."""
        return self.q75 - self.q25


class Stopwatch:
    """A clock that stands still during what ``outside`` wraps."""

    def __init__(self, clock):
        self._clock, self._skipped = clock, 0.0

    def __call__(self):
        return self._clock() - self._skipped

    def outside(self, function):
        """``function``, not timed."""

        def untimed():
            start = self._clock()
            result = function()
            self._skipped += self._clock() - start
            return result

        return untimed


class HostTimer:
    """Times ``function()`` by torch.utils.benchmark.Timer on the host's clock: blocks of ``repeats`` calls, each after
    calls of its own that warm up what another competitor left cold.

    With a ``setup`` it is ``function(setup())``, and the setup is not timed. ``threads`` is PyTorch's number of them
    during a block, its own choice by default. ``synchronize`` is called before and after a block: what it waits for is
    not timed.
    """

    buffers = 1

    def __init__(
        self,
        function,
        setup=None,
        *,
        threads=None,
        context=contextlib.nullcontext,
        clock=time.perf_counter,
        synchronize=lambda: None,
    ):
        watch = Stopwatch(clock)
        self._timer = benchmark.Timer(
            "function()" if setup is None else "function(setup())",
            timer=watch,
            globals={"function": function, "setup": setup and watch.outside(setup)},
            num_threads=threads or torch.get_num_threads(),
        )
        self._context, self._synchronize = context, synchronize
        self.repeats = 1

    def warm_up(self):
        """Choose ``repeats``: calls that fill BLOCK_SECONDS, found by doubling."""
        self.block()
        while (seconds := self.block() * self.repeats) < BLOCK_SECONDS / 2:
            self.repeats *= 2
        if seconds < BLOCK_SECONDS:
            self.repeats = max(1, math.ceil(BLOCK_SECONDS / seconds * self.repeats))

    def block(self):
        """Seconds per call."""
        with self._context():
            self._synchronize()
            seconds = self._timer.timeit(self.repeats).median
            self._synchronize()
        return seconds


def interleave(timers, seconds, *, min_rounds=MIN_ROUNDS, seed=0, clock=time.perf_counter):
    """Time several things against each other.

    Args:
        timers: {name: HostTimer or what has its warm_up, block, repeats and buffers}.
        seconds: budget for all rounds together, warm-up apart; ``min_rounds`` are made whatever they take.

    Returns:
        ({name: Timing}, {name: reason}) of those that ran and of those that raised.
    """
    timers = dict(timers)
    samples, failures = {name: [] for name in timers}, {}

    def attempt(name, action):
        try:
            return action()
        except Exception as error:
            failures[name] = reason(error)
            timers.pop(name)
            return None

    for name, timer in list(timers.items()):
        attempt(name, timer.warm_up)
    order = random.Random(seed)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = clock() + seconds
        rounds = 0
        while timers and (rounds < min_rounds or clock() < end):
            names = list(timers)
            order.shuffle(names)
            for name in names:
                samples[name].append(attempt(name, timers[name].block))
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    return {name: summarise(samples[name], timer.repeats, timer.buffers) for name, timer in timers.items()}, failures


def reason(error):
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def summarise(samples, repeats=1, buffers=1):
    """The Timing of a list of seconds per call."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, repeats, buffers)
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75, len(samples), repeats, buffers)


@contextlib.contextmanager
def mode_context(layer, mode):
    """What a layer is called in."""
    with layer.context(), torch.no_grad() if mode == "eval" else contextlib.nullcontext():
        yield


def host_timers(layers, inputs, mode, synchronize=lambda: None, threads=None):
    """{name: HostTimer} of providers.Layer by name."""
    timers = {}
    for name, layer in layers.items():
        setup, function = providers.call(layer, inputs, "forward+backward" if mode == "host" else mode)
        # Nothing is entered where nothing is needed: the host's time for a call is compared to the microsecond.
        context = functools.partial(mode_context, layer, mode)
        timers[name] = HostTimer(function, setup, threads=threads, context=context, synchronize=synchronize)
    return timers


def fresh_like(x):
    """A tensor of x's sizes and strides whose every page is new: malloc hands out old ones when it has them, so that
    what a copy into them costs depends on what was freed before."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # not on Windows
        return torch.empty_like(x)
    memory = mmap.mmap(-1, x.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.size(), x.stride())


def copies(x, threads=None):
    """Timers of a plain copy of ``x`` into memory fresh from the system and into memory that is mapped already."""
    source = x.detach()
    mapped = torch.empty_like(source)
    return {
        "copy_fresh": HostTimer(lambda: fresh_like(source).copy_(source), threads=threads),
        "copy_mapped": HostTimer(lambda: mapped.copy_(source), threads=threads),
    }
