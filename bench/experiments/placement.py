"""MobileNetV2 with Layer -> BN -> ReLU6 against Layer -> ReLU6 -> BN, from the same weights on the same batches."""

import torch

import normfused

from .models import KerasMobileNetV2, check_mobilenet
from .record import Claim, page_of, spread

MOMENTUM = 0.9
# Keras's eps; its momentum (0.01 in torch's terms) would average over more steps than these runs make in two epochs.
BATCH_NORM = {"eps": 1e-3, "momentum": 0.1}

# Where the activation of a pair is: the arguments of its BatchNormAct2d.
ORDERS = {
    "BN, ReLU6": {"activation": "relu6", "pre_activation": None},
    "ReLU6, BN": {"activation": None, "pre_activation": "relu6"},
}
PUBLISHED = {"BN, ReLU6": (0.8281, 51, 0.9942), "ReLU6, BN": (0.8203, 67, 1.0)}
# The best validation accuracies were "nearly equal": 0.8281 and 0.8203. Seeds of ours differ by about as much.
NEARLY_EQUAL = 0.02


def add_options(command, count, number):
    """Add the options that are this experiment's own."""
    command.add_argument("--seeds", type=count, default=2, metavar="N", help="runs of each order; default: 2")
    command.add_argument("--epochs", type=count, default=40, metavar="N", help="of a run; default: 40")
    command.add_argument("--width", type=number, default=0.35, help="width multiplier of the model; default: 0.35")
    command.add_argument("--size", type=count, default=32, help="height = width of an image; default: 32")
    command.add_argument("--batch", type=count, default=32, help="images of a step; default: 32")
    command.add_argument("--lr", type=number, default=0.003, help="learning rate; default: 0.003")


def network(order, classes, width, **batch_norm):
    """MobileNetV2 whose 35 pairs are in ``order``, a name in ORDERS."""

    def pair(channels):
        return normfused.BatchNormAct2d(channels, **ORDERS[order], **batch_norm)

    def project(channels):
        return normfused.BatchNormAct2d(channels, activation=None, **batch_norm)

    return KerasMobileNetV2(pair, project, classes, width)


def check(model, order):
    """Assert the counts of pairs, projections and padding; returns what was asserted."""

    def has(module, **arguments):
        found = isinstance(module, normfused.BatchNormAct2d)
        return found and all(getattr(module, name) == value for name, value in arguments.items())

    return check_mobilenet(
        model,
        lambda module: has(module, **ORDERS[order]),
        lambda module: has(module, activation=None, pre_activation=None),
    )


def run(options, images, record):
    """Train each order with each seed."""
    images = images.resized(options.size).standardised().coloured()
    after = record.progress(options.seeds * len(ORDERS) * options.epochs, lambda: "epochs of both orders")
    for seed in range(options.seed, options.seed + options.seeds):
        for order in ORDERS:

            def make(order=order, seed=seed):
                torch.manual_seed(seed)
                model = network(order, images.classes, options.width, **BATCH_NORM)
                record.asserted = check(model, order)
                return model, torch.optim.SGD(model.parameters(), lr=options.lr, momentum=MOMENTUM)

            record.train(
                {"order": order, "seed": seed},
                make,
                lambda first, seed=seed: images.stream(options.batch, seed, first),
                images.steps(options.batch),
                options.epochs,
                lambda model: {"accuracy": images.accuracy(model)},
                after=after,
            )


def _best(history):
    """(accuracy, epoch) of the best epoch, the first of equals."""
    best = max(history, key=lambda line: line["accuracy"])
    return best["accuracy"], best["epoch"]


def _summary(record, order):
    """Best accuracies, their epochs, and training accuracies at the end, one for each seed."""
    histories = [entry["history"] for entry in record.select(order=order)]
    best = [_best(history) for history in histories]
    return [value for value, _ in best], [epoch for _, epoch in best], [h[-1]["train_accuracy"] for h in histories]


def claims(record):
    """The published statements beside ours."""
    (first, epochs, trained), (second, second_epochs, second_trained) = (_summary(record, order) for order in ORDERS)
    gap = sum(first) / len(first) - sum(second) / len(second)
    return [
        Claim(
            "best validation accuracy, Layer, BN, ReLU6 / Layer, ReLU6, BN",
            "0.8281 / 0.8203: nearly equal, the first ahead",
            f"{spread(first)} / {spread(second)}",
            abs(gap) <= NEARLY_EQUAL and min(first + second) > 0.5,
        ),
        Claim(
            "the same, which is ahead",
            "Layer, BN, ReLU6 by 0.0078",
            f"difference {gap:+.4f}, seeds of one order differ by up to "
            f"{max(max(values) - min(values) for values in (first, second)):.4f}",
            gap > 0 if len(first) > 1 and abs(gap) > max(max(v) - min(v) for v in (first, second)) else None,
        ),
        Claim(
            "epoch of the best, of 100 there",
            "51 / 67: the second later",
            f"{spread(epochs, 0)} / {spread(second_epochs, 0)} of {record.settings['epochs']}",
            sum(second_epochs) > sum(epochs),
        ),
        Claim(
            "training accuracy at the end",
            "0.9942 / 1.0000: both fit the training images",
            f"{spread(trained, 4)} / {spread(second_trained, 4)}",
            min(trained + second_trained) >= 0.99,
        ),
    ]


def page(record, found):
    """The result as one Markdown page."""
    settings = record.settings
    rows = []
    for entry in record.select():
        best, epoch = _best(entry["history"])
        last = entry["history"][-1]
        rows.append(
            (
                entry["key"]["order"],
                entry["key"]["seed"],
                f"{best:.4f} ({epoch})",
                f"{last['accuracy']:.4f}",
                f"{last['train_accuracy']:.4f}",
            )
        )
    header = ("order", "seed", "best validation accuracy (epoch)", "at the end", "training accuracy at the end")
    sentences = [
        f"MobileNetV2 {settings['width']:g} on {settings['size']}×{settings['size']} images, batch "
        f"{settings['batch']}, SGD (momentum {MOMENTUM}, lr {settings['lr']:g}), {settings['epochs']} epochs, Keras's "
        f"initialisation, BN with eps {BATCH_NORM['eps']:g} and torch momentum {BATCH_NORM['momentum']:g}; the same "
        'initial weights and batches for both orders. Both orders are one operator: `activation="relu6"` and '
        '`pre_activation="relu6"`.',
        record.asserted,
    ]
    return page_of("normfused: where the activation goes", record, sentences, found, [("Runs", header, rows)])


def draw(plt, record):
    """{suffix: figure}: validation and training accuracy by epoch."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for order, color in zip(ORDERS, ("#1f77b4", "#d08a2e"), strict=True):
        for number, entry in enumerate(record.select(order=order)):
            history = entry["history"]
            epochs = [line["epoch"] for line in history]
            label = f"Layer, {order}" if number == 0 else None
            for axis, name in zip(axes, ("accuracy", "train_accuracy"), strict=True):
                axis.plot(epochs, [line[name] for line in history], color=color, label=label, linewidth=1.2)
    for axis, title in zip(axes, ("validation accuracy", "training accuracy"), strict=True):
        axis.set(title=title, xlabel="epoch", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return {"": figure}
