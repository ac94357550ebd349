"""The subcommand ``passes``: which pass over memory our time goes to, by public calls, and what the machine can do."""

import json
import sys
from pathlib import Path

import torch

from . import allocator, cases, providers, report, timing

DEFAULT_SHAPES = ((32, 96, 112, 112), (32, 144, 56, 56), (32, 192, 28, 28), (32, 576, 14, 14))
# Tensors of x's size that a pass reads or writes: forward, statistics read x and apply reads it and writes y; backward,
# the reduction reads x and dy, and apply reads both and writes dx.
PASSES = {"statistics": 1, "forward apply": 2, "reduction": 2, "backward apply": 3}
MACHINE = {"read": 1, "copy": 2, "copy, fresh": 2}

LEGEND = """\
Milliseconds, and GB/s of the tensors that the pass reads and writes: S bytes each, as many as the header says; one that
a cache still holds counts as much. forward apply is the forward pass of evaluation, statistics what training takes
longer; backward apply the backward pass of evaluation without gradients of parameters, reduction what training takes
longer. host is the same calls on a tensor of 32 values, subtracted from all of them, and its part of the whole. read is
a sum over x; the copies are of x, into mapped memory and into pages fresh from the system."""


def calls(case):
    """{name: HostTimer} of the calls that contain one pass more or less of normfused's layer."""
    inputs = cases.inputs(case)
    training, frozen = (providers.fused(case, "cpu", training) for training in (True, False))
    for parameter in frozen.parameters:
        parameter.requires_grad_(False)

    def forward(layer):
        return timing.HostTimer(lambda: layer.run(inputs.x), context=torch.no_grad)

    def backward(layer, tensors):
        y = layer.run(inputs.x)
        return timing.HostTimer(lambda: torch.autograd.grad(y, tensors, inputs.dy, retain_graph=True))

    return {
        "evaluation": forward(frozen),
        "training": forward(training),
        "backward of evaluation": backward(frozen, (inputs.x,)),
        "backward of training": backward(training, providers.wanted(inputs, training.parameters)),
    }


def machine(x):
    """{name of MACHINE: HostTimer} of plain passes over x."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    # As float32 whatever the dtype, so that no conversion is timed.
    words = flat.view(torch.float32) if flat.nbytes % 4 == 0 else flat
    copies = timing.copies(x)
    return {"read": timing.HostTimer(words.sum), "copy": copies["copy_mapped"], "copy, fresh": copies["copy_fresh"]}


def measure(case, seconds):
    """The row of a case: seconds by name in PASSES and MACHINE, and "host"; everything is timed in the same rounds."""
    tiny = cases.Case("tiny", cases.TINY_SHAPE, case.dtype, case.layout, activation=case.activation)
    groups = {"large": calls(case), "tiny": calls(tiny), "machine": machine(cases.inputs(case).x)}
    timers = {(group, name): timer for group, found in groups.items() for name, timer in found.items()}
    timings, failures = timing.interleave(timers, seconds)
    if failures:
        raise RuntimeError(f"{case}: {failures}")
    medians = {group: {name: timings[group, name].median for name in found} for group, found in groups.items()}
    return {
        "shape": list(case.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "bytes": case.bytes,
        "seconds": split(medians["large"], medians["tiny"]) | medians["machine"],
    }


def split(large, tiny):
    """{pass: seconds} and "host", from the seconds of ``calls`` on the tensor and on a tiny one."""
    kernel = {name: large[name] - tiny[name] for name in large}
    return {
        "statistics": kernel["training"] - kernel["evaluation"],
        "forward apply": kernel["evaluation"],
        "reduction": kernel["backward of training"] - kernel["backward of evaluation"],
        "backward apply": kernel["backward of evaluation"],
        "host": tiny["training"] + tiny["backward of training"],
    }


def table(rows):
    """Rows of ``measure`` as a Markdown table."""
    tensors = PASSES | MACHINE
    header = ["sizes", "dtype", "layout", *(f"{name}, {count} S" for name, count in tensors.items()), "host"]
    lines = []
    for row in rows:
        times = row["seconds"]
        cells = [f"{_ms(times[name])} ({_rate(count * row['bytes'], times[name])})" for name, count in tensors.items()]
        share = times["host"] / sum(times[name] for name in (*PASSES, "host"))
        lines.append([report.size(row), row["dtype"], row["layout"], *cells, f"{_ms(times['host'])} ({share:.0%})"])
    return report.table(header, lines)


def _ms(seconds):
    return f"{seconds * 1e3:.3g}"


def _rate(size, seconds):
    """GB/s; where noise is longer than the pass there is none."""
    return f"{size / seconds / 1e9:.0f}" if seconds > 0 else "–"


def add_command(commands, positive, shape, dtype):
    """The subcommand's arguments; ``positive(kind)``, ``shape`` and ``dtype`` parse those."""
    ours = commands.add_parser(
        "passes",
        help="which pass over memory our time goes to",
        description="Split normfused's time for BatchNorm + activation on the CPU into its passes, by the difference "
        "of public calls: apply (evaluation) and statistics (what training takes longer), both again for backward, and "
        "the work of the host; beside it a plain read and copies of the same tensor.",
    )
    ours.add_argument(
        "--shape", nargs="+", type=shape, default=DEFAULT_SHAPES, metavar="N,C,H,W", help="default: of MobileNetV2"
    )
    ours.add_argument("--dtype", nargs="+", type=dtype, choices=tuple(cases.DTYPES), default=["float32", "bfloat16"])
    ours.add_argument("--layout", nargs="+", choices=cases.LAYOUTS, default=cases.LAYOUTS, help="default: both")
    ours.add_argument("--activation", choices=tuple(providers.ACTIVATIONS), default="relu6", help="default: relu6")
    ours.add_argument("--seconds", type=positive(float), default=2.0, help="timing budget of one case; default: 2")
    ours.add_argument("--memory", choices=tuple(allocator.ABOUT), default="kept", help="as of ops; default: kept")
    out = "out/passes"
    ours.add_argument("--out", default=out, metavar="FOLDER", help=f"for passes.md, passes.json; default: {out}")
    return ours


def main(options, arguments, error):
    """Run the command; returns the exit status."""
    if any(len(shape) < 4 for shape in options.shape):
        error("--shape: N,C,H,W is needed here")
    try:
        allocator.use(options.memory)
    except ValueError as why:
        error(f"--memory {options.memory}: {why}")
    where = {**report.environment(arguments), "memory": options.memory}
    rows = []
    for case in cases.own(options.shape, options.dtype, options.layout, activation=options.activation):
        print(case, file=sys.stderr, flush=True)
        rows.append(measure(case, options.seconds))
    page = "\n".join(["# normfused: passes", "", *report.conditions(where), "", LEGEND, "", *table(rows), ""])
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    report.replace(folder / "passes.md", page)
    report.replace(folder / "passes.json", json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    print(page)
    return 0
