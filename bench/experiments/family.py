"""Batch-, Layer-, Instance- and GroupNorm on one tensor: which elements each averages, how they are related, and
accuracy against batch size for BatchNorm and GroupNorm."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

import normfused

from .models import SmallResNet
from .record import Claim, page_of, spread

MOMENTUM = 0.9
BATCHES = (2, 4, 8, 32)
GROUPS = 4
NORMS = {"BN": None, "GN": GROUPS}
# The tensor that all four get, and groups of its GroupNorm.
SHAPE, SHAPE_GROUPS = (6, 8, 5, 4), 4
# Largest difference that is rounding in float32: values are a few units.
ROUNDING = 2e-5
# Layers that are timed: sizes of x, torch.nn's layer, ours with an activation.
TIMED = {
    "InstanceNorm2d": (
        (32, 64, 56, 56),
        lambda: nn.InstanceNorm2d(64, affine=True),
        lambda activation: normfused.InstanceNormAct2d(64, affine=True, activation=activation),
    ),
    "LayerNorm": (
        (64, 197, 768),
        lambda: nn.LayerNorm(768),
        lambda activation: normfused.LayerNormAct(768, activation=activation),
    ),
}
ACTIVATIONS = {None: nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU}
ROUNDS = 15
# Accuracy "falls" with the batch size where it loses more than this from 32 to 2.
FALLS = 0.02


@dataclass(frozen=True)
class Member:
    """One of the family; layers without affine parameters.

    ``averages``: the axes of (N, C, H, W) that share a mean, in words. ``view`` and ``axes``: the same for a computer.
    """

    averages: str
    view: tuple
    axes: tuple
    native: object
    ours: object


_N, _C, _H, _W = SHAPE
FAMILY = {
    "BatchNorm": Member(
        "N, H, W: one mean for each channel",
        SHAPE,
        (0, 2, 3),
        lambda: nn.BatchNorm2d(_C, affine=False),
        lambda: normfused.BatchNormAct2d(_C, affine=False, activation=None),
    ),
    "LayerNorm": Member(
        "C, H, W: one for each image",
        SHAPE,
        (1, 2, 3),
        lambda: nn.LayerNorm(SHAPE[1:], elementwise_affine=False),
        lambda: normfused.LayerNormAct(SHAPE[1:], elementwise_affine=False),
    ),
    "InstanceNorm": Member(
        "H, W: one for each channel of each image",
        SHAPE,
        (2, 3),
        lambda: nn.InstanceNorm2d(_C),
        lambda: normfused.InstanceNormAct2d(_C),
    ),
    "GroupNorm": Member(
        f"C / G, H, W: one for each of G groups of channels of each image (G = {SHAPE_GROUPS})",
        (_N, SHAPE_GROUPS, _C // SHAPE_GROUPS, _H, _W),
        (2, 3, 4),
        lambda: nn.GroupNorm(SHAPE_GROUPS, _C, affine=False),
        lambda: normfused.GroupNormAct(SHAPE_GROUPS, _C, affine=False),
    ),
}


def add_options(command, count, number):
    """Add the options that are this experiment's own."""
    command.add_argument("--seeds", type=count, default=2, metavar="N", help="runs of each case; default: 2")
    command.add_argument("--epochs", type=count, default=3, metavar="N", help="of a run; default: 3")
    command.add_argument(
        "--width",
        type=count,
        default=16,
        metavar="N",
        help=f"channels of the stem, a multiple of {GROUPS}; default: 16",
    )
    command.add_argument("--size", type=count, default=8, help="height = width of an image; default: 8")
    command.add_argument(
        "--lr", type=number, default=0.05, help="learning rate at batch 32, others in proportion; default: 0.05"
    )


def tensor(seed=0):
    """A tensor (N, C, H, W) whose images, channels and places differ in mean and scale."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator)

    return random(*SHAPE) * (0.5 + random(_N, _C, 1, 1).abs()) + random(_N, 1, 1, 1) + 2 * random(1, _C, 1, 1)


def normalised(x, member, eps=1e-5):
    """The formula in float64, with the biased variance."""
    grouped = x.double().reshape(member.view)
    var, mean = torch.var_mean(grouped, member.axes, correction=0, keepdim=True)
    return ((grouped - mean) / (var + eps).sqrt()).reshape(x.shape)


def _apart(a, b):
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
def check(seed=0):
    """Largest differences, in {"members", "identities"}: {name: number or {"native", "ours"}}."""
    x = tensor(seed)
    y = {name: member.ours()(x) for name, member in FAMILY.items()}
    found = {"members": {}, "identities": {}}
    for name, member in FAMILY.items():
        exact = normalised(x, member)
        found["members"][name] = {"native": _apart(member.native()(x), exact), "ours": _apart(y[name], exact)}
    one, each = (normfused.GroupNormAct(groups, _C, affine=False)(x) for groups in (1, _C))
    torch.manual_seed(seed)
    layer = normfused.BatchNormAct2d(_C, activation=None, momentum=1.0)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    layer(x)
    biased, unbiased = (x.double().var((0, 2, 3), correction=correction) for correction in (0, 1))
    layer.eval()
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    shift = layer.bias - layer.running_mean * scale
    found["identities"] = {
        "GN with 1 group, LayerNorm over C, H, W": _apart(one, nn.LayerNorm(SHAPE[1:], elementwise_affine=False)(x)),
        "GN with C groups, InstanceNorm": _apart(each, nn.InstanceNorm2d(_C)(x)),
        "GN with C groups, BatchNorm": _apart(each, y["BatchNorm"]),
        "running_var after a batch at momentum 1, unbiased variance": _apart(layer.running_var, unbiased),
        "running_var after a batch at momentum 1, biased variance": _apart(layer.running_var, biased),
        "BN in evaluation, x·scale + shift": _apart(layer(x), x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)),
    }
    return found


def speed(seed=0):
    """Seconds of forward and backward of each of TIMED with each activation, {"layer, activation": {"native", "ours"}}.

    Medians of rounds in which all take turns.
    """
    calls = {}
    for name, (shape, native, ours) in TIMED.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        for activation, function in ACTIVATIONS.items():
            what = f"{name} {'×'.join(map(str, shape))}, {activation or 'no activation'}"
            layer = native() if activation is None else nn.Sequential(native(), function())
            calls[what, "native"] = _call(layer, x)
            calls[what, "ours"] = _call(ours(activation), x)
    times = {key: [] for key in calls}
    for _ in range(1 + ROUNDS):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    # The first round is for warming up.
    medians = {key: statistics.median(seconds[1:]) for key, seconds in times.items()}
    return {what: {who: medians[what, who] for who in ("native", "ours")} for what, _ in calls}


def _call(layer, x):
    dy = torch.randn_like(x)
    wanted = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def run(options, images, record):
    """Check the numbers, time the layers, then train BN and GN at each batch size."""
    if options.width % GROUPS:
        raise ValueError(f"--width {options.width} is not a multiple of {GROUPS}, the number of groups")
    images.steps(max(BATCHES))
    _, checks = record.run(part="checks")
    checks["result"] = check(options.seed)
    _, timed = record.run(part="speed")
    if timed["result"] is None:
        timed["result"] = speed(options.seed)
    images = images.resized(options.size).standardised()
    cases = [
        (norm, batch, seed)
        for seed in range(options.seed, options.seed + options.seeds)
        for batch in BATCHES
        for norm in NORMS
    ]
    after = record.progress(len(cases) * options.epochs, lambda: "epochs of all runs")
    for norm, batch, seed in cases:

        def make(norm=norm, batch=batch, seed=seed):
            torch.manual_seed(seed)
            model = SmallResNet(images.shape[0], images.classes, options.width, NORMS[norm])
            lr = options.lr * batch / max(BATCHES)
            return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)

        record.train(
            {"norm": norm, "batch": batch, "seed": seed},
            make,
            lambda first, batch=batch, seed=seed: images.stream(batch, seed, first),
            images.steps(batch),
            options.epochs,
            lambda model: {"accuracy": images.accuracy(model)},
            after=after,
        )


def _accuracies(record, norm, batch):
    return [entry["history"][-1]["accuracy"] for entry in record.select(norm=norm, batch=batch)]


def _mean(values):
    return sum(values) / len(values)


def claims(record):
    """The published statements beside ours."""
    checks = record.runs["checks"]["result"]
    worst = max(value for member in checks["members"].values() for value in member.values())
    identities = checks["identities"]

    def apart(name):
        return identities[name]

    def same(about, published, name):
        return Claim(about, published, f"largest difference {apart(name):.1e}", apart(name) < ROUNDING)

    biased, unbiased = (
        apart(f"running_var after a batch at momentum 1, {kind} variance") for kind in ("biased", "unbiased")
    )
    found = [
        Claim(
            "axes that BN, LN, IN and GN average, variance of the forward",
            "N,H,W / C,H,W / H,W / C/G,H,W; biased",
            f"torch.nn and ours against the formulas in float64: largest difference {worst:.1e}",
            worst < ROUNDING,
        ),
        same("GN with one group", "LayerNorm over C, H, W", "GN with 1 group, LayerNorm over C, H, W"),
        same("GN with C groups", "InstanceNorm", "GN with C groups, InstanceNorm"),
        Claim(
            "GN with C groups (one of the write-ups)",
            "BatchNorm",
            f"InstanceNorm; from BatchNorm it differs by up to {apart('GN with C groups, BatchNorm'):.1f}",
            apart("GN with C groups, BatchNorm") < ROUNDING,
        ),
        Claim(
            "variance in running_var",
            "unbiased",
            f"differs by {unbiased:.1e} from the unbiased one, by {biased:.1e} from the biased one",
            unbiased < ROUNDING < biased,
        ),
        same("BN in evaluation", "folds into x·scale + shift", "BN in evaluation, x·scale + shift"),
    ]
    for name in TIMED:
        ratios = {
            what.rsplit(", ", 1)[1]: times["ours"] / times["native"]
            for what, times in record.runs["speed"]["result"].items()
            if what.startswith(name)
        }
        found.append(
            Claim(
                f"time of our {name} over that of torch.nn, forward and backward",
                "our goal: at most 1, less with an activation",
                ", ".join(f"{activation} {ratio:.2f}" for activation, ratio in ratios.items()),
                max(ratios.values()) < 1,
            )
        )
    falls = {}
    for norm in NORMS:
        large, small = (_mean(_accuracies(record, norm, batch)) for batch in (max(BATCHES), min(BATCHES)))
        falls[norm] = large - small
    for norm, published, holds in (
        ("BN", "falls (Wu & He 2018)", falls["BN"] > FALLS),
        ("GN", "does not depend on it", abs(falls["GN"]) <= FALLS),
    ):
        accuracies = ", ".join(f"{batch}: {spread(_accuracies(record, norm, batch))}" for batch in BATCHES)
        found.append(Claim(f"accuracy of {norm} as the batch gets small", published, accuracies, holds))
    return found


def page(record, found):
    """The result as one Markdown page."""
    settings, checks = record.settings, record.runs["checks"]["result"]
    sentences = [
        f"One tensor of {'×'.join(map(str, SHAPE))}, layers without affine parameters. Accuracy: a ResNet of three "
        f"blocks ({settings['width']} channels in the stem) on {settings['size']}×{settings['size']} images, "
        f"{settings['epochs']} epochs whatever the batch, SGD (momentum {MOMENTUM}, lr {settings['lr']:g} · batch / "
        f"{max(BATCHES)}), {settings['seeds']} seeds; GN of {GROUPS} groups.",
    ]
    rows = [
        (name, member.averages, f"{checks['members'][name]['native']:.1e}", f"{checks['members'][name]['ours']:.1e}")
        for name, member in FAMILY.items()
    ]
    identities = [(name, f"{value:.1e}") for name, value in checks["identities"].items()]
    timed = [
        (what, f"{1e3 * times['native']:.1f}", f"{1e3 * times['ours']:.1f}", f"{times['native'] / times['ours']:.2f}")
        for what, times in record.runs["speed"]["result"].items()
    ]
    accuracy = [(norm, *(spread(_accuracies(record, norm, batch)) for batch in BATCHES)) for norm in NORMS]
    tables = [
        (
            "What each averages, and the largest difference from the formula",
            ("", "averages over", "torch.nn", "ours"),
            rows,
        ),
        ("Largest difference between two", ("", ""), identities),
        ("Forward and backward, ms", ("", "torch.nn", "ours", "torch.nn / ours"), timed),
        ("Held-out accuracy by batch size", ("", *map(str, BATCHES)), accuracy),
    ]
    return page_of("normfused: the family of normalisations", record, sentences, found, tables)


def draw(plt, record):
    """{suffix: figure}: the cubes, and accuracy by batch size."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for norm, color in zip(NORMS, ("#1f77b4", "#d08a2e"), strict=True):
        found = [_accuracies(record, norm, batch) for batch in BATCHES]
        axis.plot(BATCHES, list(map(_mean, found)), color=color, marker="o", label=norm)
        for batch, values in zip(BATCHES, found, strict=True):
            axis.scatter([batch] * len(values), values, color=color, s=12, alpha=0.5)
    axis.set_xscale("log", base=2)
    axis.set_xticks(BATCHES, map(str, BATCHES))
    axis.set(xlabel="batch", ylabel="held-out accuracy", title="the same number of images seen")
    axis.grid(alpha=0.3)
    axis.legend()
    return {"": _cubes(plt), "_accuracy": figure}


def _cubes(plt):
    """The picture of Wu & He 2018 (https://arxiv.org/abs/1803.08494, figure 2): what shares one mean is coloured."""
    channels, batch, places, group = 6, 4, 4, 2
    shared = {
        "BatchNorm": lambda c, n: c == 0,
        "LayerNorm": lambda c, n: n == 0,
        "InstanceNorm": lambda c, n: (c == 0) & (n == 0),
        "GroupNorm": lambda c, n: (c < group) & (n == 0),
    }
    figure = plt.figure(figsize=(13, 3.8))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.86, wspace=0.02)
    for number, (name, chosen) in enumerate(shared.items()):
        axis = figure.add_subplot(1, 4, number + 1, projection="3d")
        whole = torch.ones(channels, batch, places, dtype=torch.bool)
        c = torch.arange(channels).view(-1, 1, 1).expand_as(whole)
        n = torch.arange(batch).view(1, -1, 1).expand_as(whole)
        selected = chosen(c, n).numpy()
        axis.voxels(whole.numpy() & ~selected, facecolors="#e8e8e8", edgecolor="#b0b0b0", linewidth=0.4)
        axis.voxels(selected, facecolors="#1f77b4", edgecolor="white", linewidth=0.4)
        axis.set(title=f"{name}\n{FAMILY[name].averages.split(':')[0]}", xlabel="C", ylabel="N", zlabel="H, W")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_zticks([])
        axis.set_box_aspect((channels, batch, places))
        axis.view_init(elev=22, azim=-60)
    return figure
