"""Interleaved timing: every competitor in every round, in shuffled order: drift of the machine hits all alike."""

import gc
import math
import random
import statistics
import time
from dataclasses import dataclass

import torch

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

    @property
    def iqr(self) -> float:
        """Interquartile range in seconds."""
        return self.q75 - self.q25


def _block(function, repeats, clock):
    """Seconds per call of ``repeats`` calls."""
    loop = range(repeats)
    start = clock()
    for _ in loop:
        function()
    return (clock() - start) / repeats


def _repeats(function, clock):
    """Calls that fill BLOCK_SECONDS, found by doubling; serves as the warm-up too."""
    repeats = 1
    function()
    while (seconds := _block(function, repeats, clock) * repeats) < BLOCK_SECONDS / 2:
        repeats *= 2
    return max(1, math.ceil(BLOCK_SECONDS / seconds * repeats)) if seconds < BLOCK_SECONDS else repeats


def interleave(functions, seconds, *, min_rounds=MIN_ROUNDS, seed=0, clock=time.perf_counter):
    """Time functions against each other.

    Args:
        functions: {name: callable without arguments}.
        seconds: budget for all rounds together, warm-up apart; ``min_rounds`` are made whatever they take.

    Returns:
        ({name: Timing}, {name: reason}) of those that ran and of those that raised.
    """
    functions = dict(functions)
    samples, repeats, failures = {}, {}, {}

    def attempt(name, action):
        try:
            return action()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
            functions.pop(name)
            return None

    for name, function in list(functions.items()):
        repeats[name] = attempt(name, lambda function=function: _repeats(function, clock))
        samples[name] = []
    order = random.Random(seed)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = clock() + seconds
        rounds = 0
        while functions and (rounds < min_rounds or clock() < end):
            names = list(functions)
            order.shuffle(names)
            for name in names:
                taken = attempt(name, lambda name=name: _block(functions[name], repeats[name], clock))
                samples[name].append(taken)
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    return {name: summarise(samples[name], repeats[name]) for name in functions}, failures


def summarise(samples, repeats=1):
    """The Timing of a list of seconds per call."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, repeats)
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75, len(samples), repeats)


def copies(x):
    """A plain copy of ``x`` into fresh and into already mapped memory, as callables to be timed like any other."""
    source = x.detach()
    mapped = torch.empty_like(source)
    return {
        "copy_fresh": lambda: torch.empty_like(source).copy_(source),
        "copy_mapped": lambda: mapped.copy_(source),
    }
