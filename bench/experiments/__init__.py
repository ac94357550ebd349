"""``python -m bench experiment``: five write-ups on normalisation in practice, run on normfused's layers."""

import argparse
import importlib
import sys

from .. import report
from .record import Record

# What each shows, in a line; a module of this package each.
NAMES = {
    "placement": "MobileNetV2 with Layer -> BN -> ReLU6 against Layer -> ReLU6 -> BN",
    "regularisation": "MobileNetV2 with BN only, L2 only, and both",
    "initialisation": "a perceptron with good and bad initial weights and learning rates, with and without BN",
    "inference": "batch statistics against running statistics, and what losing these does",
    "family": "Batch-, Layer-, Instance- and GroupNorm on one tensor; accuracy against batch size",
}


def _count(text):
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _number(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _module(name):
    return importlib.import_module(f".{name}", __package__)


def add_command(commands):
    """Add ``experiment`` to the subcommands of ``python -m bench``."""
    ours = commands.add_parser(
        "experiment",
        help="run a write-up's experiment on normfused's layers",
        description="Run the experiment of a write-up on normfused's layers, and say of each of its conclusions "
        "whether it is found here.",
    )
    experiments = ours.add_subparsers(dest="experiment", required=True)
    for name, about in NAMES.items():
        module = _module(name)
        command = experiments.add_parser(name, help=about, description=module.__doc__)
        command.add_argument(
            "--data",
            metavar="PATH",
            help="a folder with MNIST's IDX files (gzipped or not), or with a folder of images for each class, alone "
            "or under train and test; default: scikit-learn's digits",
        )
        command.add_argument("--limit", type=_count, metavar="N", help="use N images to train on; default: all")
        command.add_argument("--seed", type=int, default=0, help="the first seed; default: 0")
        module.add_options(command, _count, _number)
        command.add_argument("--resume", action="store_true", help="go on where a run with the same options ended")
        command.add_argument(
            "--out",
            default=f"out/experiments/{name}",
            metavar="FOLDER",
            help=f"for {name}.md, .json, .csv, .png and checkpoints; default: out/experiments/{name}",
        )
        command.add_argument("--threads", type=_count, metavar="N", help="default: PyTorch's own choice")


def main(options, arguments, error):
    """``python -m bench experiment``; returns the exit status: 0, 130 after an interruption."""
    from . import data  # scikit-learn and Pillow are needed by experiments alone

    module = _module(options.experiment)
    where = report.environment(arguments)
    try:
        record = Record(options.experiment, options.out, options, where, options.resume)
    except ValueError as why:
        error(f"--resume: {why}")
    try:
        images = data.load(options.data)
        if options.limit:
            images = images.limited(options.limit)
        where.update(data=images.name, classes=images.classes, images=[len(images.train[1]), len(images.held_out[1])])
        module.run(options, images, record)
    except (ValueError, ImportError) as why:
        error(str(why))
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from here", file=sys.stderr)
        return 130
    claims = module.claims(record)
    record.save(claims=[{**vars(claim), "verdict": claim.verdict.strip("*")} for claim in claims])
    page = module.page(record, claims)
    record.path(".md").write_text(page, encoding="utf-8")
    written = [record.path(".md"), record.path(".json"), record.write_csv()]
    no_plot = _draw(module, record, written)
    print(page)
    print("written: " + ", ".join(map(str, written)), file=sys.stderr)
    if no_plot:
        print(no_plot, file=sys.stderr)
    return 0


def _draw(module, record, written):
    """Save the figures of ``module`` as PNG; returns why not, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for suffix, figure in module.draw(pyplot, record).items():
        path = record.path(f"{suffix}.png")
        figure.savefig(path, dpi=100)
        pyplot.close(figure)
        written.append(path)
    return None
