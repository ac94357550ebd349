"""Processes that wait for functions to run together, as the ranks of one process group."""

import io
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist

# Where a rank fails the others wait for it in a collective.
TIMEOUT = timedelta(seconds=30)
# What the ranks need; torch.utils.checkpoint needs torch._dynamo.
_IMPORTED = ["normfused", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]


class Ranks:
    """``world_size`` processes under gloo, started by the first ``run`` and again after a failure."""

    def __init__(self, world_size):
        self.world_size = world_size
        self._pipes, self._processes, self._directory = [], [], None

    def run(self, function, *args):
        """What ``function(*args)`` returns on each rank, in their order; ``function`` belongs to a module."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results = [_load(pipe.recv_bytes()) if pipe.poll(2 * TIMEOUT.seconds) else "no answer" for pipe in self._pipes]
        failures = [f"rank {rank}: {result}" for rank, result in enumerate(results) if isinstance(result, str)]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [result for (result,) in results]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._pipes, self._processes, self._directory = [], [], None

    def _start(self):
        # Forked from a process that has imported everything: a rank costs milliseconds, not the seconds of an import.
        context = get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._directory = tempfile.TemporaryDirectory()
        store = os.path.join(self._directory.name, "store")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            self._pipes.append(here)
            self._processes.append(
                context.Process(target=_serve, args=(there, rank, self.world_size, store), daemon=True)
            )
            self._processes[-1].start()


def _serve(pipe, rank, world_size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            result = (function(*args),)
        except Exception:
            result = traceback.format_exc()
        pipe.send_bytes(_dump(result))


def _dump(result):
    buffer = io.BytesIO()
    torch.save(result, buffer)
    return buffer.getvalue()


def _load(data):
    return torch.load(io.BytesIO(data), weights_only=False)
