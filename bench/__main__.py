"""Command line: ``python -m bench ops`` and ``python -m bench demo``."""

import argparse
import sys

import torch

from . import cases, ops, providers, report

_EPILOG = """examples:
  python -m bench ops                                          everything; torch.compile takes its time for each shape
  python -m bench ops --family batch_norm --shape 96,56 --providers eager normfused
  python -m bench ops --family tiny                            host time of one call
  python -m bench demo --out out/demo
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
    """(C, H = W) of "C,HW"."""
    try:
        channels, size = (int(part) for part in text.split(","))
    except ValueError:
        channels = size = 0
    if channels < 1 or size < 1:
        raise argparse.ArgumentTypeError(f"expected C,HW such as 96,56, got {text!r}")
    return channels, size


def parser():
    """The argument parser of ``python -m bench``."""
    whole = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks of normfused against PyTorch, on the CPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    ours = commands.add_parser(
        "ops",
        help="time single layers",
        description="Time single layers: PyTorch's own (eager), torch.compile of them, normfused. Every provider is "
        "checked against the formulas in float64 first; all are timed in turn, in one process, in shuffled rounds.",
    )
    ours.add_argument(
        "--family",
        choices=(*cases.FAMILIES, "all"),
        help="batch_norm: BatchNorm + ReLU6 of MobileNetV2; group_norm: GroupNorm of a U-Net; tiny: host time of a "
        "call. Default: all, or batch_norm where --shape is given",
    )
    ours.add_argument(
        "--batch",
        type=_positive(int),
        metavar="N",
        help="batch size; default: 32 for batch_norm, 8 for group_norm",
    )
    ours.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(cases.DTYPES),
        help="of x, parameters are float32; default: all for batch_norm, float32 for group_norm; tiny has float32 only",
    )
    ours.add_argument("--layout", nargs="+", choices=cases.LAYOUTS, default=cases.LAYOUTS, help="default: both")
    ours.add_argument(
        "--mode", nargs="+", choices=cases.MODES, default=cases.MODES, help="default: both; tiny has the last only"
    )
    ours.add_argument(
        "--shape",
        nargs="+",
        type=_shape,
        metavar="C,HW",
        help="channels and height = width, in place of the family's own shapes (group_norm: C divisible by 32)",
    )
    ours.add_argument(
        "--seconds",
        type=_positive(float),
        default=4.0,
        metavar="S",
        help="timing budget of one case in one mode, all providers together; at least five rounds are made; default: 4",
    )
    ours.add_argument("--providers", nargs="+", choices=tuple(providers.PROVIDERS), default=list(providers.PROVIDERS))
    ours.add_argument(
        "--out", default="out/bench", metavar="FOLDER", help="for ops.md, ops.csv, ops.json; default: out/bench"
    )
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
    for command in (ours, demo):
        command.add_argument("--threads", type=_positive(int), metavar="N", help="default: PyTorch's own choice")
    return whole


def _selection(options, error):
    """The cases that the options of ``ops`` name."""
    family = options.family or ("batch_norm" if options.shape else "all")
    if options.shape and family not in ("batch_norm", "group_norm"):
        error(f"--shape needs --family batch_norm or group_norm, got {family}")
    if options.batch and family == "tiny":
        error(f"--batch does not apply to the tiny family, whose only shape is {cases.TINY_SHAPE}")
    if family == "group_norm":
        for channels, _ in options.shape or ():
            if channels % cases.GROUPS:
                error(f"--shape: {channels} channels do not divide into {cases.GROUPS} groups")
    families = cases.FAMILIES if family == "all" else (family,)
    selected = cases.select(families, options.shape, options.batch, options.dtype, options.layout)
    if "forward+backward" not in options.mode:
        selected = [case for case in selected if case.family != "tiny"]
    if not selected:
        error("no case is left: the tiny family is float32, contiguous and forward+backward only")
    return selected


def run_ops(options, arguments, error):
    """``python -m bench ops``; returns the exit status."""
    selected = _selection(options, error)
    where = report.environment(arguments)
    names = [name for name in providers.PROVIDERS if name in options.providers]
    modes = [mode for mode in cases.MODES if mode in options.mode]
    rows = []
    try:
        ops.run(selected, modes, names, options.seconds, rows)
    except KeyboardInterrupt:
        where["interrupted"] = True
        print("\ninterrupted: writing what was measured", file=sys.stderr)
    paths = report.write(rows, where, options.out)
    print(report.markdown(rows, where))
    print("written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return 130 if where.get("interrupted") else 0


def main(arguments=None):
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    whole = parser()
    options = whole.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.command == "ops":
        return run_ops(options, arguments, whole.error)
    from . import demo  # scikit-learn and matplotlib are needed by the demo alone

    return demo.main(options, arguments)


if __name__ == "__main__":
    sys.exit(main())
