"""Command line: ``ops``, ``passes``, ``model``, ``memory``, ``compare``, ``report``, ``gpu``, ``demo``, experiments."""

import argparse
import dataclasses
import sys

import torch

from . import PROGRAM, allocator, cases, compare, experiments, model, model_memory, ops, page, passes, providers, report

_EPILOG = f"""examples:
  {PROGRAM} ops                                          MobileNetV2's layers against eager and torch.compile
  {PROGRAM} ops --family batch_norm --shape 96,56 --providers eager normfused
  {PROGRAM} ops --shape 32,96,112,112 --dtype bf16 --layout channels_last --groups 32 --activation silu
  {PROGRAM} ops --family tiny                            host time of one call
  {PROGRAM} ops --device cuda --batch 32 128 256         on a GPU
  {PROGRAM} passes --shape 32,96,112,112                 which pass over memory the time goes to
  {PROGRAM} model --layout channels_last                 time of a training step of MobileNetV2
  {PROGRAM} memory --model resnet50 --batch 8 16 32      its peak memory
  {PROGRAM} compare before/ops.json after/ops.json       status 1 where something became slower
  {PROGRAM} report out/bench/ops.json out/memory/memory.json --out out/report.html
  {PROGRAM} demo --out out/demo                          two trainings side by side
  {PROGRAM} experiment placement                         a write-up on normalisation, run on our layers

Ctrl-C ends a run and keeps what was measured; --resume goes on from there.
"""
_OPS_DESCRIPTION = """\
Time single layers: PyTorch's own (eager), torch.compile of them, normfused, its Triton kernels where
there is a GPU, and the peers that are installed. Every provider is checked against the formulas in
float64 first; all are timed in turn, in one process, in shuffled rounds, by torch.utils.benchmark.
On a GPU times are those of the kernels (replays of a CUDA graph over tensors four times as large as
L2), but for mode host.
"""
_OPS_EPILOG = f"""families:
{chr(10).join(f"  {name:<18} {family.about}" for name, family in cases.FAMILIES.items())}

providers:
  eager, normfused   PyTorch's layers, and ours on the backend that serves them by default
  compile            torch.compile of what eager runs; compile-max: with max-autotune
  triton, path-*     ours on a GPU: the Triton kernels; the CUDA kernels on one path of their launch plan
  onednn             BatchNorm + ReLU of Debian's libdnnl2, CPU; liger, inplace_abn, apex: those packages' layers

examples:
  {PROGRAM} ops --family batch_norm --layout channels_last --activation relu --providers eager onednn normfused
  {PROGRAM} ops --family batch_norm --batch 1 2 --threads 1 2 --providers eager normfused    how it scales
  {PROGRAM} ops --family work --providers eager normfused                                    cost against size
"""


def _positive(kind):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return value

    return parse


def _shape(text):
    """(C, H = W), (N, C, H, W) or (N, C, D, H, W)."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) not in (2, 4, 5) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"expected N,C,H,W such as 32,96,112,112 (or N,C,D,H,W), or C,HW such as 96,56, got {text!r}"
        )
    return sizes


def _dtype(text):
    return cases.DTYPE_ALIASES.get(text, text)


def _activation(text):
    return None if text == "none" else text


def parser():
    """The argument parser of ``python -m bench``."""
    whole = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Benchmarks of normfused against PyTorch, on the CPU and on a GPU. COMMAND --help says more.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ops(commands)
    _add_threads(passes.add_command(commands, _positive, _shape, _dtype))
    _add_threads(model.add_command(commands, _positive))
    _add_threads(model_memory.add_command(commands, _positive))
    _add_compare(commands)
    _add_report(commands)
    _add_gpu(commands)
    _add_demo(commands)
    experiments.add_command(commands)
    return whole


def _add_ops(commands):
    ours = commands.add_parser(
        "ops",
        help="time single layers",
        description=_OPS_DESCRIPTION,
        epilog=_OPS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ours.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    ours.add_argument(
        "--family",
        nargs="+",
        choices=(*cases.FAMILIES, "all"),
        metavar="FAMILY",
        help=f"layers, by name (below), or all. Default: {', '.join(cases.DEFAULT_FAMILIES['cpu'])} on the CPU, "
        f"{', '.join(cases.DEFAULT_FAMILIES['cuda'])} on a GPU; batch_norm where --shape C,HW is given",
    )
    ours.add_argument(
        "--batch", nargs="+", type=_positive(int), metavar="N", help="batch sizes; default: the family's own"
    )
    ours.add_argument(
        "--dtype",
        nargs="+",
        type=_dtype,
        choices=tuple(cases.DTYPES),
        help="of x (bf16, fp16, fp32 will do), parameters are float32; default: float32 and, for BatchNorm, bfloat16; "
        "on a GPU the 16-bit ones too; tiny has float32 only",
    )
    ours.add_argument("--layout", nargs="+", choices=cases.LAYOUTS, default=cases.LAYOUTS, help="default: both")
    ours.add_argument(
        "--mode",
        nargs="+",
        choices=cases.MODES,
        help=f"default: {', '.join(cases.DEFAULT_MODES['cpu'])} on the CPU, all on a GPU; host is the tiny family's",
    )
    ours.add_argument(
        "--shape",
        nargs="+",
        type=_shape,
        metavar="SIZES",
        help="a layer of your own, N,C,H,W or N,C,D,H,W: BatchNorm + ReLU6 unless --groups and --activation say "
        "otherwise; or C,HW, channels and height = width in place of a family's own (group_norm: C divisible by 32)",
    )
    ours.add_argument("--groups", type=_positive(int), metavar="G", help="GroupNorm of --shape N,C,H,W")
    ours.add_argument(
        "--activation",
        choices=("none", *providers.ACTIVATIONS),
        help="default: relu6 for --shape N,C,H,W, else the family's own; not of the tiny family",
    )
    ours.add_argument("--residual", action="store_true", help="add a residual to --shape N,C,H,W, BatchNorm only")
    ours.add_argument(
        "--seconds",
        type=_positive(float),
        help="timing budget of one case in one mode, all providers together; at least five rounds are made; "
        "default: 4, on a GPU 0.5",
    )
    ours.add_argument(
        "--providers",
        nargs="+",
        choices=tuple(providers.PROVIDERS),
        metavar="PROVIDER",
        help="by name (below); default: eager, compile, normfused, on a GPU triton, and the peers that are installed",
    )
    ours.add_argument(
        "--memory",
        choices=tuple(allocator.ABOUT),
        default="system",
        help="of results on the CPU, for all providers alike. "
        + "; ".join(f"{name}: {about}" for name, about in allocator.ABOUT.items())
        + ". Default: system",
    )
    ours.add_argument("--seed", type=int, default=0, help="of the numbers and of the order; default: 0")
    ours.add_argument("--resume", action="store_true", help="measure only what FOLDER/ops.json does not have yet")
    ours.add_argument(
        "--out", default="out/bench", metavar="FOLDER", help="for ops.md, ops.csv, ops.json; default: out/bench"
    )
    ours.add_argument(
        "--threads",
        nargs="+",
        type=_positive(int),
        metavar="N",
        help="default: PyTorch's own choice; several, on the CPU: each in the same rounds, to see how a layer scales",
    )


def _add_threads(command):
    command.add_argument("--threads", type=_positive(int), metavar="N", help="default: PyTorch's own choice")


def _add_compare(commands):
    ours = commands.add_parser(
        "compare",
        help="what became slower between two runs",
        description="Compare two files that `ops` wrote. A change beyond three standard deviations of the two medians, "
        "and beyond the threshold, is one. Status 1 where something became slower or fails now, 2 where the files "
        "cannot be compared.",
    )
    ours.add_argument("old", help="ops.json of the earlier run")
    ours.add_argument("new", help="ops.json of the later run")
    ours.add_argument(
        "--providers",
        nargs="+",
        choices=tuple(providers.PROVIDERS),
        default=["normfused", "triton"],
        help="default: ours",
    )
    ours.add_argument(
        "--threshold", type=_positive(float), default=0.05, help="relative change that is none; default: 0.05"
    )
    ours.add_argument(
        "--unit",
        choices=("seconds", "copies"),
        default="seconds",
        help="copies: times as multiples of the copy in the same run, for machines that are not equally fast",
    )


def _add_report(commands):
    ours = commands.add_parser(
        "report",
        help="runs as one HTML page",
        description="One self-contained HTML page of files that `ops`, `model`, `memory` and `gpu` wrote: bandwidth "
        "against size and the roof of a copy, bars for each layer, memory of training steps, tables to sort and to "
        "filter, the environment; beside it the pictures as PNG and SVG where matplotlib is installed.",
    )
    ours.add_argument(
        "runs", nargs="+", metavar="JSON", help="ops.json, model.json, memory.json, or report.json of `gpu`"
    )
    ours.add_argument("--out", default="out/report.html", metavar="FILE", help="default: out/report.html")


def _add_gpu(commands):
    ours = commands.add_parser(
        "gpu",
        help="build, test and measure on a machine with a GPU",
        description="What `make gpu` runs: builds the extension for the GPU at hand, runs the tests that need one, "
        "compute-sanitizer and the benchmarks, each with a time limit, the most important first. Status 1 where a part "
        "that is about correctness failed. Needs python3 with torch, setuptools, ninja, pytest and "
        "hypothesis, and nvcc; no network.",
    )
    ours.add_argument(
        "--out",
        default="out/gpu",
        metavar="FOLDER",
        help="for report.md, report.json, report.csv, log.txt and two plots; default: out/gpu",
    )
    ours.add_argument(
        "--minutes", type=_positive(float), default=8.7, help="for all parts together; default: 8.7; 60 leaves none out"
    )
    ours.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a few small benchmarks, to try the machinery where there is no GPU",
    )
    ours.add_argument("--no-build", action="store_true", help="use what is built")


def _add_demo(commands):
    demo = commands.add_parser(
        "demo",
        help="train MobileNetV2 and its converted twin side by side",
        description="Train MobileNetV2 on scikit-learn's digits, and its twin converted by normfused.convert, from the "
        "same weights on the same batches, step by step in turn: losses, accuracy, step time, memory. A third model, "
        "PyTorch's own with weights moved by one ulp, says how far rounding alone drives two trainings apart. Status 1 "
        "unless the losses agree.",
    )
    demo.add_argument(
        "--out", default="out/demo", metavar="FOLDER", help="for demo.md, demo.json, demo.png; default: out/demo"
    )
    demo.add_argument("--steps", type=_positive(int), default=100, help="training steps of each model; default: 100")
    demo.add_argument("--batch", type=_positive(int), default=32, help="images of a step; default: 32")
    demo.add_argument("--size", type=_positive(int), default=96, help="height = width of an image; default: 96")
    demo.add_argument("--width", type=_positive(float), default=1.0, help="width multiplier of the model; default: 1")
    demo.add_argument(
        "--lr", type=_positive(float), default=0.01, help="learning rate after the warm-up; default: 0.01"
    )
    demo.add_argument("--warm-up", type=_positive(int), default=40, help="steps of linear warm-up; default: 40")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches; default: 0")
    demo.add_argument("--channels-last", action="store_true", help="channels_last images and weights")
    _add_threads(demo)


def _selection(options, modes, error):
    """The cases that the options of ``ops`` name."""
    full = [shape for shape in options.shape or () if len(shape) > 2]
    layers = [shape for shape in options.shape or () if len(shape) == 2]
    if full and (layers or options.family or options.batch):
        error("--shape N,C,H,W does not go with --shape C,HW, --family or --batch")
    if not full and (options.groups or options.residual):
        error("--groups and --residual need --shape N,C,H,W")
    if full:
        if options.groups and options.residual:
            error("--residual is BatchNorm's: GroupNorm takes none")
        for shape in full if options.groups else ():
            if shape[1] % options.groups:
                error(f"--shape: {shape[1]} channels do not divide into {options.groups} groups")
        activation = "relu6" if options.activation is None else _activation(options.activation)
        dtypes = options.dtype or ("float32",)
        selected = cases.own(full, dtypes, options.layout, options.groups, activation, options.residual)
    else:
        families = options.family or (("batch_norm",) if layers else cases.DEFAULT_FAMILIES[options.device])
        families = tuple(cases.FAMILIES) if "all" in families else tuple(families)
        if layers and ("tiny" in families or "video" in families):
            error(f"--shape C,HW needs families of such shapes, batch_norm or group_norm say, got {' '.join(families)}")
        if options.batch and families == ("tiny",):
            error(f"--batch does not apply to the tiny family, whose only shape is {cases.TINY_SHAPE}")
        for name in families:
            groups = cases.FAMILIES[name].groups
            for channels, _ in layers if groups else ():
                if channels % groups:
                    error(f"--shape: {channels} channels do not divide into {groups} groups")
        selected = cases.select(families, options.batch, options.dtype, options.layout, options.device, layers)
        if options.activation is not None:
            if "tiny" in families:
                error("--activation does not apply to the tiny family, whose only one is relu6")
            selected = [dataclasses.replace(case, activation=_activation(options.activation)) for case in selected]
    selected = [case for case in selected if cases.modes_of(case, modes)]
    if not selected:
        error("no case is left: the tiny family is float32, contiguous and mode host only")
    return selected


def select(arguments):
    """(cases, modes) that ``arguments`` of ``ops`` name."""
    whole = parser()
    options = whole.parse_args(arguments)
    modes = options.mode or cases.DEFAULT_MODES[options.device]
    return _selection(options, modes, whole.error), modes


def run_ops(options, arguments, error):
    """The subcommand ``ops``; returns the exit status."""
    modes = options.mode or cases.DEFAULT_MODES[options.device]
    selected = _selection(options, modes, error)
    if options.device == "cuda" and not torch.cuda.is_available():
        error("--device cuda: PyTorch finds no GPU here")
    if options.device == "cuda" and options.threads and len(options.threads) > 1:
        error("--threads: one number on a GPU, whose kernels do not depend on it")
    try:
        allocator.use(options.memory)
    except ValueError as why:
        error(f"--memory {options.memory}: {why}")
    where = {**report.environment(arguments, options.device), "memory": options.memory}
    names = options.providers or providers.defaults(options.device)
    seconds = options.seconds or (4.0 if options.device == "cpu" else 0.5)
    try:
        rows = report.resumable(options.out, where) if options.resume else []
    except ValueError as why:
        error(f"--resume: {why}")

    def write():
        return report.write(rows, where, options.out)

    try:
        ops.run(
            selected,
            modes,
            names,
            seconds,
            rows,
            device=options.device,
            threads=options.threads,
            seed=options.seed,
            finished=write,
        )
    except KeyboardInterrupt:
        where["interrupted"] = True
        print("\ninterrupted: writing what was measured", file=sys.stderr)
    paths = write()
    print(report.markdown(rows, where))
    print("written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return 130 if where.get("interrupted") else 0


def main(arguments=None):
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    whole = parser()
    options = whole.parse_args(arguments)
    if options.command == "compare":
        return compare.main(options, whole.error)
    if options.command == "report":
        return page.main(options, whole.error)
    if options.command == "gpu":
        from . import gpu  # this process loads no CUDA: its children have all of the GPU

        return gpu.main(options, arguments, whole.error)
    if options.threads:
        torch.set_num_threads(max(options.threads) if options.command == "ops" else options.threads)
    if options.command == "ops":
        return run_ops(options, arguments, whole.error)
    if options.command == "passes":
        return passes.main(options, arguments, whole.error)
    if options.command in ("model", "memory"):
        return (model if options.command == "model" else model_memory).main(options, arguments, whole.error)
    if options.command == "experiment":
        return experiments.main(options, arguments, whole.error)
    from . import demo  # scikit-learn and matplotlib are needed by the demo alone

    return demo.main(options, arguments)


if __name__ == "__main__":
    sys.exit(main())
