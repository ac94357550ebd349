"""MobileNetV2 with BatchNorm only, with L2 only, and with both: what becomes of its weights and of its accuracy."""

import math

import torch
from torch import nn

from .models import KERAS_BATCH_NORM, KerasMobileNetV2, check_mobilenet
from .placement import check, network
from .record import Claim, page_of, spread

L2 = 0.001
# (BatchNorm, L2) of each case.
CASES = {"BN only": (True, False), "L2 only": (False, True), "both": (True, True)}
SHOWN = 10


def add_options(command, count, number):
    """Add the options that are this experiment's own."""
    command.add_argument("--seeds", type=count, default=1, metavar="N", help="runs of each case; default: 1")
    command.add_argument("--epochs", type=count, default=10, metavar="N", help="of a run; default: 10")
    command.add_argument("--width", type=number, default=0.35, help="width multiplier of the model; default: 0.35")
    command.add_argument("--size", type=count, default=32, help="height = width of an image; default: 32")
    command.add_argument("--batch", type=count, default=8, help="images of a step; default: 8, for many steps")
    command.add_argument("--lr", type=number, default=0.01, help="learning rate; default: 0.01, as Keras's SGD")


def penalty(model):
    """L2 times the sum of squares of convolution and dense kernels and dense biases, never of BatchNorm's."""
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            total = total + sum(parameter.square().sum() for parameter in module.parameters())
    return L2 * total


def plain_network(classes, width):
    """MobileNetV2 without normalisation: ReLU6 in place of the pairs, nothing after projections."""
    return KerasMobileNetV2(lambda channels: nn.ReLU6(), lambda channels: nn.Identity(), classes, width)


def _stem(model):
    """What is kept of the stem convolution after an epoch: its first weights, and its quartiles."""
    weights = model.stem.weight.detach().flatten()
    kept = {"accuracy": None, "weights": weights[:SHOWN].tolist()}
    kept["stem_median"] = weights.abs().median().item()
    kept["all_median"] = _kernels(model).abs().median().item()
    return kept


def _kernels(model):
    kernels = [m.weight.detach().flatten() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return torch.cat(kernels)


def _histogram(model, _history):
    """Counts of log10 |w| of all convolution and dense kernels, and all weights of the stem."""
    logarithms = _kernels(model).abs().clamp(min=1e-7).log10()
    counts = torch.histc(logarithms, bins=80, min=-7, max=1)
    return {"counts": counts.tolist(), "stem": model.stem.weight.detach().flatten().tolist()}


def run(options, images, record):
    """Train each case with each seed, printing the first weights of the stem after each epoch."""
    images = images.resized(options.size).standardised().coloured()
    record.where["steps"] = images.steps(options.batch)
    after = record.progress(options.seeds * len(CASES) * options.epochs, lambda: "epochs of the three cases")
    for seed in range(options.seed, options.seed + options.seeds):
        for case, (batch_norm, l2) in CASES.items():

            def make(batch_norm=batch_norm, seed=seed):
                torch.manual_seed(seed)
                if batch_norm:
                    model = network("BN, ReLU6", images.classes, options.width, **KERAS_BATCH_NORM)
                    record.asserted = check(model, "BN, ReLU6")
                else:
                    model = plain_network(images.classes, options.width)
                    is_relu6 = lambda module: isinstance(module, nn.ReLU6)  # noqa: E731
                    check_mobilenet(model, is_relu6, lambda module: isinstance(module, nn.Identity))
                return model, torch.optim.SGD(model.parameters(), lr=options.lr)

            def evaluate(model, case=case):
                kept = {**_stem(model), "accuracy": images.accuracy(model)}
                shown = " ".join(f"{weight:+.4f}" for weight in kept["weights"])
                print(f"{case}: accuracy {kept['accuracy']:.3f}, stem {shown}", flush=True)
                return kept

            record.train(
                {"case": case, "seed": seed},
                make,
                lambda first, seed=seed: images.stream(options.batch, seed, first),
                images.steps(options.batch),
                options.epochs,
                evaluate,
                finish=_histogram,
                penalty=penalty if l2 else None,
                after=after,
            )


def _found(record, case):
    """Of the runs of a case: best and last accuracies, last median |w| of the stem, last entries, all of them."""
    entries = record.select(case=case)
    last = [entry["history"][-1] for entry in entries]
    best = [max(line["accuracy"] for line in entry["history"]) for entry in entries]
    return best, [line["accuracy"] for line in last], [line["stem_median"] for line in last], last, entries


def claims(record):
    """The published statements beside ours."""
    bn, l2, both = (_found(record, case) for case in CASES)
    classes = record.where["classes"]
    chance = 2.0 / classes

    def sizes(found):
        first = [abs(weight) for line in found[3] for weight in line["weights"]]
        return f"first ten {min(first):.4f}–{max(first):.4f}, median of the stem {spread(found[2], 4)}"

    def mean(values):
        return sum(values) / len(values)

    l2_ratio = mean([entry["history"][-1]["stem_median"] / entry["history"][0]["stem_median"] for entry in l2[4]])
    return [
        Claim("BN only: stem weights", "0.1–0.4", sizes(bn), 0.1 <= mean(bn[2]) <= 0.4),
        Claim("BN only: accuracy", "rises", f"best {spread(bn[0])}, end {spread(bn[1])}", min(bn[0]) > 2 * chance),
        Claim(
            "L2 only: stem weights",
            "shrink to 0.00x",
            f"{sizes(l2)}, shrunk to {l2_ratio:.2f} of what they were after an epoch",
            max(l2[2]) < 0.01,
        ),
        Claim("L2 only: accuracy", "stays flat", f"best {spread(l2[0])}, end {spread(l2[1])}", max(l2[0]) <= chance),
        Claim("both: stem weights", "mostly 0.0x", sizes(both), mean(both[2]) < 0.1),
        Claim("both: accuracy", "rises", f"best {spread(both[0])}, end {spread(both[1])}", min(both[0]) > 2 * chance),
    ]


def page(record, found):
    """The result as one Markdown page."""
    settings = record.settings
    steps = record.where["steps"] * settings["epochs"]
    shrink = math.exp(-2 * settings["lr"] * L2 * steps)
    sentences = [
        f"MobileNetV2 {settings['width']:g} on {settings['size']}×{settings['size']} images, batch "
        f"{settings['batch']}, SGD without momentum, lr {settings['lr']:g}, {settings['epochs']} epochs of "
        f"{record.where['steps']} steps; L2 is {L2} times the sum of squares of convolution and dense kernels and "
        "dense biases, a term of the loss, never of BN's parameters; BN with Keras's settings (eps 1e-3, torch "
        "momentum 0.01); the same initial weights (Glorot) and batches for all cases.",
        f"Where no gradient but L2's arrives, weights shrink by exp(−2·lr·{L2}·steps): to {shrink:.2g} in these "
        f"{steps} steps, to a tenth in {math.log(10) / (2 * settings['lr'] * L2):.0f}.",
        f"{record.asserted} The network without BN has 35 ReLU6 and nothing after its 17 projections, asserted too.",
    ]
    first = record.settings["seed"]
    tables = []
    for case in CASES:
        for entry in record.select(case=case, seed=first):
            rows = [
                (
                    line["epoch"],
                    *(f"{weight:.4f}" for weight in line["weights"]),
                    f"{line['stem_median']:.4f}",
                    f"{line['train_accuracy']:.3f}",
                    f"{line['accuracy']:.3f}",
                )
                for line in entry["history"]
            ]
            header = ("epoch", *(f"w{i}" for i in range(SHOWN)), "median abs", "training accuracy", "accuracy")
            tables.append((f"{case}, seed {first}: the stem's first {SHOWN} weights", header, rows))
    return page_of("normfused: BN, L2, and both", record, sentences, found, tables)


def draw(plt, record):
    """{suffix: figure}: histograms of all kernels at the end, accuracy and size of the stem's weights by epoch."""
    figure, (weights, accuracy, sizes) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for case, color in zip(CASES, ("#1f77b4", "#9a9a9a", "#d08a2e"), strict=True):
        for number, entry in enumerate(record.select(case=case)):
            label = case if number == 0 else None
            history = entry["history"]
            epochs = [line["epoch"] for line in history]
            if number == 0:
                places = [-7 + 0.1 * (i + 0.5) for i in range(80)]
                weights.step(places, entry["result"]["counts"], where="mid", color=color, label=case)
            accuracy.plot(epochs, [line["accuracy"] for line in history], color=color, label=label)
            sizes.semilogy(epochs, [line["stem_median"] for line in history], color=color, label=label)
    weights.set(title="all kernels at the end", xlabel="log10 |w|", ylabel="weights")
    accuracy.set(title="validation accuracy", xlabel="epoch", ylim=(0, 1.02))
    sizes.set(title="stem: median |w|", xlabel="epoch")
    for axis in (weights, accuracy, sizes):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return {"": figure}
