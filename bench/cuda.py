"""Kernel times on a GPU: replays of a CUDA graph, so that the host's work for a call does not show, over tensors that
rotate through more memory than L2 holds, so that every call finds them in DRAM."""

import math

import torch

from . import providers, timing

# The tensors x that the calls of a graph rotate through are this many times L2 together.
L2_MULTIPLE = 4
MOST_BUFFERS = 4096
_BLOCK_SECONDS = 4e-3


def buffers(tensor_bytes, l2_bytes):
    """How many tensors to rotate through: L2_MULTIPLE times L2 together, at least two."""
    return min(max(2, math.ceil(L2_MULTIPLE * l2_bytes / max(tensor_bytes, 1))), MOST_BUFFERS)


class GraphTimer:
    """A CUDA graph with one call for each of several buffers, timed by events around its replays.

    ``prepare()`` gives the calls; it runs on the stream that is captured afterwards, in ``context()``. What the calls
    return is kept, so that each has memory of its own to write to.
    """

    def __init__(self, prepare, buffers, stream, *, context):
        self._prepare, self._stream, self._context = prepare, stream, context
        self.buffers = buffers
        self.repeats = 1

    def warm_up(self):
        """Run, capture, and choose how many replays make a block."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), self._context():
            # Kept: a replay reads what they hold.
            self._calls = calls = self._prepare()
            for call in (calls[0], calls[0], calls[-1]):  # compiles, searches configurations, allocates workspaces
                call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with self._context(), torch.cuda.graph(self._graph, stream=self._stream):
            self._results = [call() for call in calls]
        self.block()
        seconds = self.block() * self.buffers
        self.repeats = max(1, math.ceil(_BLOCK_SECONDS / seconds))

    def block(self):
        """Seconds per call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.repeats / self.buffers


def _backward(layer, inputs):
    y = layer.run(*inputs.arguments)
    tensors = providers.wanted(inputs, layer.parameters)
    # A graph is replayed: what backward reads must stay.
    return lambda: torch.autograd.grad(y, tensors, inputs.dy, retain_graph=True)


def _both(layer, inputs):
    tensors = providers.wanted(inputs, layer.parameters)

    def call():
        y = layer.run(*inputs.arguments)
        return y, torch.autograd.grad(y, tensors, inputs.dy)

    return call


_CALLS = {
    "forward": lambda layer, inputs: lambda: layer.run(*inputs.arguments),
    "eval": lambda layer, inputs: lambda: layer.run(*inputs.arguments),
    "backward": _backward,
    "forward+backward": _both,
}


class Rotation:
    """The inputs of a case, as often as it takes."""

    def __init__(self, inputs):
        properties = torch.cuda.get_device_properties(inputs.x.device)
        count = buffers(inputs.x.numel() * inputs.x.element_size(), properties.L2_cache_size)
        self.inputs = [inputs] + [inputs.clone() for _ in range(count - 1)]
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()

    def timers(self, layers, mode):
        """{name: timer} of providers.Layer by name; the host's time in mode "host"."""
        if mode == "host":
            return timing.host_timers(layers, self.inputs[0], mode, torch.cuda.synchronize)

        def timer(layer):
            def prepare():
                return [_CALLS[mode](layer, one) for one in self.inputs]

            return self._timer(prepare, context=lambda: timing.mode_context(layer, mode))

        return {name: timer(layer) for name, layer in layers.items()}

    def copies(self, mode):
        """Timers of a copy of x, which moves 2 S, and of ``torch.add(x, dy, out=...)``, which moves 3 S."""
        timers = {"copy": self._timer(lambda: [_copy(one) for one in self.inputs])}
        if mode in ("backward", "forward+backward") or self.inputs[0].residual is not None:
            timers["add"] = self._timer(lambda: [_add(one) for one in self.inputs])
        return timers

    def _timer(self, prepare, context=torch.no_grad):
        return GraphTimer(prepare, len(self.inputs), self.stream, context=context)


def _copy(inputs):
    x = inputs.x.detach()
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


def _add(inputs):
    x = inputs.x.detach()
    out = torch.empty_like(x)
    return lambda: torch.add(x, inputs.dy, out=out)
