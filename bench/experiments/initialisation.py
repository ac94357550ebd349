"""A four-layer perceptron with good and bad initial weights and learning rates, with and without BatchNorm; and how
many steps a second each makes."""

import itertools
import statistics
import time

import torch
from torch import nn

import normfused

from .models import Perceptron
from .record import Claim, page_of, spread

HIDDEN = 128
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}
# Batches between two evaluations, and evaluations between two checkpoints.
EVALUATED = 50
SAVED = 20
# A run trains if it ends at this accuracy: the published ones end at 80 % and more, or at 30 % and less.
TRAINS = 0.7
# Without BN, sigmoid "stays unstable until about 20,000": until then it is expected not to train.
STABLE_AT = 20_000

# What was published of (sigma, learning rate, activation): whether it trains with and without BN, and in words. Where
# both train, BN reaches 90 % first.
PUBLISHED = {
    (0.05, 0.01, "relu"): (True, True, "both train, BN reaches 90 % at batch 500, without at 3,000"),
    (0.05, 0.01, "sigmoid"): (True, False, "BN trains, without unstable until about 20,000"),
    (0.05, 2.0, "relu"): (True, False, "BN trains, without fails"),
    (0.05, 2.0, "sigmoid"): (True, True, "both train, 90 % at 500 against 1,000"),
    (10.0, 0.01, "relu"): (True, False, "about 80 % against failure"),
    (10.0, 0.01, "sigmoid"): (True, False, "85 % against 30 %"),
    (10.0, 2.0, "relu"): (False, False, "both stop"),
    (10.0, 2.0, "sigmoid"): (True, False, "93 % against failure"),
}

# Of the comparison of speed: steps of a block, blocks of a repeat; the networks take turns block by block, in blocks so
# short that a processor whose clock wanders treats neighbours alike.
BLOCK, BLOCKS, REPEATS = 10, 100, 3
NETWORKS = ("without", "native", "normfused")
GOAL = 0.6


def add_options(command, count, number):
    """Add the options that are this experiment's own."""
    command.add_argument("--seeds", type=count, default=1, metavar="N", help="runs of each of the 16; default: 1")
    command.add_argument(
        "--batches", type=count, default=3000, metavar="N", help="of a run, rounded down to fifties; default: 3000"
    )
    command.add_argument("--width", type=count, default=HIDDEN, metavar="N", help="of hidden layers; default: 128")
    command.add_argument(
        "--size", type=count, default=28, help="height = width of an image; default: 28, which makes 784 inputs"
    )
    command.add_argument("--batch", type=count, default=60, help="images of a step; default: 60")
    command.add_argument(
        "--speed-only", action="store_true", help="measure only steps per second; with --resume beside runs made before"
    )


def _hidden(activation, network):
    """What makes normalisation and activation of a hidden layer; None without BN."""
    return {
        "without": None,
        "native": lambda width: [nn.BatchNorm1d(width), ACTIVATIONS[activation]()],
        "normfused": lambda width: [normfused.BatchNormAct1d(width, activation=activation)],
    }[network]


def _perceptron(images, width, sigma, activation, network):
    channels, height, breadth = images.shape
    perceptron = Perceptron(
        channels * height * breadth,
        images.classes,
        width,
        sigma,
        _hidden(activation, network),
        ACTIVATIONS[activation](),
    )
    return nn.Sequential(nn.Flatten(), perceptron)


def run(options, images, record):
    """Train the eight cases with and without BN, then compare speeds."""
    images = images.resized(options.size)
    if not options.speed_only:
        _train(options, images, record)
    _, speed = record.run(part="speed")
    # Records of before have no differences by turn: they are measured again.
    if options.speed_only or "repeats" not in (speed["result"] or {}):
        speed["result"] = {**_speed(options, images), "command": record.where["command"], "date": record.where["date"]}
        record.save()


def _train(options, images, record):
    evaluations = max(1, options.batches // EVALUATED)
    cases = list(itertools.product(PUBLISHED, (True, False), range(options.seed, options.seed + options.seeds)))
    after = record.progress(len(cases) * evaluations, lambda: f"times {EVALUATED} batches")
    for (sigma, lr, activation), batch_norm, seed in cases:

        def make(sigma=sigma, lr=lr, activation=activation, batch_norm=batch_norm, seed=seed):
            torch.manual_seed(seed)
            network = "normfused" if batch_norm else "without"
            model = _perceptron(images, options.width, sigma, activation, network)
            return model, torch.optim.SGD(model.parameters(), lr=lr)

        record.train(
            {"sigma": sigma, "lr": lr, "activation": activation, "batch_norm": batch_norm, "seed": seed},
            make,
            lambda first, seed=seed: images.stream(options.batch, seed, first),
            EVALUATED,
            evaluations,
            lambda model: {"accuracy": images.accuracy(model)},
            after=after,
            save_every=SAVED,
        )


def _speed(options, images):
    """Seconds of a step of each network, and what BN adds to one, in REPEATS repeats: medians over turns."""
    x, y = next(images.stream(options.batch, options.seed))
    found = {"threads": torch.get_num_threads(), "repeats": {}}
    for activation in ACTIVATIONS:
        torch.manual_seed(options.seed)
        steps = [_step(_perceptron(images, options.width, 0.05, activation, network), x, y) for network in NETWORKS]
        for step in steps:
            _block(step)
        repeats = []
        for _ in range(REPEATS):
            blocks = {network: [] for network in NETWORKS}
            for turn in range(BLOCKS):
                for number in range(len(steps)):
                    number = (number + turn) % len(steps)
                    blocks[NETWORKS[number]].append(_block(steps[number]))
            repeats.append(_repeat(blocks))
        found["repeats"][activation] = repeats
    return found


def _step(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _block(step):
    """Seconds of a step, over a block of them."""
    start = time.perf_counter()
    for _ in range(BLOCK):
        step()
    return (time.perf_counter() - start) / BLOCK


def _repeat(blocks):
    """Medians of {network: a time by turn}, in seconds; and of what BN adds, each turn by itself."""
    repeat = {network: statistics.median(times) for network, times in blocks.items()}
    for network in NETWORKS[1:]:
        pairs = zip(blocks[network], blocks["without"], strict=True)
        repeat[f"{network} adds"] = statistics.median(time - without for time, without in pairs)
    return repeat


def added(repeat):
    """What BN adds to a step by normfused over what it adds by torch.nn; None where native adds nothing."""
    native = repeat["native adds"]
    return repeat["normfused adds"] / native if native > 0 else None


def _outcome(entries):
    """(accuracy at the end, batch of the first 90 % or None) of runs that differ in their seed, in the mean."""
    ends = [statistics.mean(line["accuracy"] for line in _last(entry["history"])) for entry in entries]
    firsts = [
        next((line["epoch"] * EVALUATED for line in entry["history"] if line["accuracy"] >= 0.9), None)
        for entry in entries
    ]
    return statistics.mean(ends), None if None in firsts else round(statistics.mean(firsts))


def _last(history):
    """The last tenth of a history: single evaluations of an unstable run say little."""
    return history[-max(1, len(history) // 10) :]


def _summary(record, case):
    """Outcomes with BN and without."""
    sigma, lr, activation = case
    return [
        _outcome(record.select(sigma=sigma, lr=lr, activation=activation, batch_norm=batch_norm))
        for batch_norm in (True, False)
    ]


def _name(case):
    sigma, lr, activation = case
    return f"σ {sigma:g}, lr {lr:g}, {activation}"


def claims(record):
    """The published statements beside ours."""
    found = []
    for case, (bn_trains, plain_trains, published) in PUBLISHED.items():
        if not record.select(sigma=case[0]):
            break
        (bn, bn_first), (plain, plain_first) = _summary(record, case)
        if case == (0.05, 0.01, "sigmoid") and record.settings["batches"] >= STABLE_AT:
            plain_trains = True
        holds = (bn >= TRAINS, plain >= TRAINS) == (bn_trains, plain_trains)
        if bn_trains and plain_trains:
            infinity = float("inf")
            holds = holds and (bn_first or infinity) < (plain_first or infinity)
        ours = f"with BN {bn:.1%}, {_reached(bn_first)}; without {plain:.1%}, {_reached(plain_first)}"
        found.append(Claim(_name(case), published, ours, holds))
    repeats = [r for repeats in _speed_of(record).values() for r in repeats]
    rates = {network: [1 / repeat[network] for repeat in repeats] for network in NETWORKS}
    slower = 1 - statistics.mean(rates["normfused"]) / statistics.mean(rates["without"])
    found.append(
        Claim(
            "steps per second with BN / without",
            "329.23 / 483.61: BN costs 32 % of the speed",
            f"{spread(rates['normfused'], 0)} / {spread(rates['without'], 0)}: {slower:.0%}",
            slower > 0,
        )
    )
    ratios = [added(repeat) for repeat in repeats]
    if None not in ratios:
        found.append(
            Claim(
                "time that BN adds to a step, over what native BN adds",
                f"our goal: at most {GOAL}",
                spread(ratios, 2),
                statistics.mean(ratios) <= GOAL,
            )
        )
    return found


def _reached(first):
    return "90 % never" if first is None else f"90 % at batch {first}"


def _speed_of(record):
    return record.runs["speed"]["result"]["repeats"]


def page(record, found):
    """The result as one Markdown page."""
    settings, speed = record.settings, record.runs["speed"]["result"]
    sentences = [
        f"A perceptron of three hidden layers of {settings['width']} and one output layer on "
        f"{settings['size']}×{settings['size']} images in [0, 1], batch {settings['batch']}, SGD without momentum, "
        f"{settings['batches']} batches; accuracy on held-out images by running statistics, the mean of the last tenth "
        f"of the evaluations, one every {EVALUATED} batches. A run trains if it ends at {TRAINS:.0%} or more. BN and "
        "its activation are one `BatchNormAct1d`; the layers before it have no bias.",
        f"Speed: {REPEATS} repeats of {BLOCKS} blocks of {BLOCK} whole training steps (forward, backward, SGD), the "
        f"three networks in turn, {speed['threads']} threads; what BN adds is the median over turns; "
        f"`{speed['command']}`, {speed['date']}.",
    ]
    rows = [
        (
            activation,
            number + 1,
            *(f"{1 / repeat[network]:.0f}" for network in NETWORKS),
            *(f"{1e6 * repeat[f'{network} adds']:.0f} µs" for network in NETWORKS[1:]),
            "–" if added(repeat) is None else f"{added(repeat):.2f}",
        )
        for activation, repeats in speed["repeats"].items()
        for number, repeat in enumerate(repeats)
    ]
    header = (
        "activation",
        "repeat",
        "steps/s without BN",
        "native BN",
        "normfused",
        "native adds",
        "normfused adds",
        "",
    )
    return page_of("normfused: initialisation and BN", record, sentences, found, [("Speed", header, rows)])


def draw(plt, record):
    """{suffix: figure}: accuracy by batch of the eight cases; none without runs."""
    if not record.select(batch_norm=True):
        return {}
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharex=True, sharey=True)
    for axis, case in zip(axes.T.flat, PUBLISHED, strict=True):
        sigma, lr, activation = case
        for batch_norm, color in ((True, "#1f77b4"), (False, "#9a9a9a")):
            runs = record.select(sigma=sigma, lr=lr, activation=activation, batch_norm=batch_norm)
            for number, entry in enumerate(runs):
                batches = [line["epoch"] * EVALUATED for line in entry["history"]]
                label = ("with BN" if batch_norm else "without") if number == 0 else None
                axis.plot(batches, [line["accuracy"] for line in entry["history"]], color=color, label=label)
        axis.set_title(_name(case), fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylim=(0, 1.02), ylabel="held-out accuracy")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    for axis in axes[1]:
        axis.set_xlabel("batch")
    return {"": figure}
