"""Fills the caches of torch.compile for a share of the cases of some runs of ``python -m bench ops``, timing nothing:
``python -m bench.warm INDEX WORKERS --then ARGUMENTS [--then ARGUMENTS]``."""

import sys

import torch
import torch._inductor.config

from . import cases, providers
from .__main__ import select


def runs(arguments):
    """The argument lists that follow each "--then"."""
    found = []
    for argument in arguments:
        if argument == "--then":
            found.append([])
        else:
            found[-1].append(argument)
    return found


def share(index, workers, arguments, device):
    """(case, whether in training) of every ``workers``-th case of the runs, most important first."""
    wanted = dict.fromkeys(
        (case, mode != "eval")
        for run in runs(arguments)
        for selected, modes in [select(["ops", "--device", device, *run])]
        for case in selected
        for mode in cases.modes_of(case, modes)
    )
    return list(wanted)[index::workers]


def compile_case(case, training, device):
    """Compile a case as ``bench ops`` will."""
    torch._dynamo.reset()
    inputs = cases.inputs(case, device)
    layer = providers.compiled(case, device, training)
    with layer.context():
        if training:
            torch.autograd.grad(layer.run(*inputs.arguments), providers.wanted(inputs, layer.parameters), inputs.dy)
        else:
            with torch.no_grad():
                layer.run(*inputs.arguments)


def main(index, workers, *arguments, device="cuda"):
    """Compile one share. Several processes use the GPU at once: what they find to be the fastest configuration of a
    kernel is not kept."""
    torch._inductor.config.autotune_local_cache = False
    for case, training in share(int(index), int(workers), arguments, device):
        try:
            compile_case(case, training, device)
        except Exception as error:  # the run that is timed will say so in its row
            print(f"{case}: {error!r}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
