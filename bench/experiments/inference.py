"""Batch statistics against running statistics: near-identical images in both modes, and a small ResNet fine-tuned from
a checkpoint with and without its running statistics."""

import copy

import torch
from torch import nn

import normfused

from .models import SmallResNet
from .record import Claim, page_of, spread

MOMENTUM = 0.9
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# A batch of near-identical images: copies of one, with noise of this share of the images' standard deviation.
COPIES, NOISE = 16, 0.02
# Held-out images that are tried so: each needs a forward pass of its own.
TRIED = 60
# Learning rate of a fine-tuning over that of the first training: with frozen BN nothing else bounds a step.
FINE_TUNED = 0.1
# Predictions are ruined where accuracy falls by more than this.
RUINED = 0.2
# (running statistics kept in the checkpoint, BN frozen in evaluation mode) of each fine-tuning.
CASES = {
    "kept, BN trains": (True, False),
    "lost, BN trains": (False, False),
    "kept, BN frozen": (True, True),
    "lost, BN frozen": (False, True),
}


def add_options(command, count, number):
    """Add the options that are this experiment's own."""
    command.add_argument("--seeds", type=count, default=2, metavar="N", help="runs of each case; default: 2")
    command.add_argument(
        "--epochs",
        type=count,
        default=8,
        metavar="N",
        help="of the first training, and of each fine-tuning; default: 8",
    )
    command.add_argument("--width", type=count, default=16, metavar="N", help="channels of the stem; default: 16")
    command.add_argument("--size", type=count, default=16, help="height = width of an image; default: 16")
    command.add_argument("--batch", type=count, default=32, help="images of a step; default: 32")
    command.add_argument("--lr", type=number, default=0.02, help="learning rate; default: 0.02")


def without_statistics(state):
    """A state_dict without running statistics, as a checkpoint that saved parameters only."""
    return {name: tensor for name, tensor in state.items() if name.rsplit(".", 1)[-1] not in STATISTICS}


def missing_keys(model, state):
    """What a strict ``load_state_dict`` says of ``state``; raises AssertionError where it takes it in silence."""
    try:
        copy.deepcopy(model).load_state_dict(state)
    except RuntimeError as refused:
        return str(refused)
    raise AssertionError("load_state_dict took a checkpoint without running statistics")


@torch.no_grad()
def accuracies(model, images, seed):
    """Accuracy on held-out images by {"running", "batch"} statistics in {"mixed", "near-identical"} batches."""
    generator = torch.Generator().manual_seed(seed)
    x, y = images.held_out
    copies = [part + NOISE * torch.randn(COPIES, *part.shape, generator=generator) for part in x[:TRIED]]
    model, found = copy.deepcopy(model), {}
    for statistics in ("running", "batch"):
        # By module, past the network's own train(), which may keep BN frozen.
        for module in model.modules():
            module.training = statistics == "batch"
        mixed = sum(int((model(part).argmax(1) == labels).sum()) for part, labels in zip(*_batches(x, y), strict=True))
        near = sum(
            float((model(part).argmax(1) == label).float().mean()) for part, label in zip(copies, y, strict=False)
        )
        found[f"{statistics}_mixed"] = mixed / len(y)
        found[f"{statistics}_near"] = near / len(copies)
    return found


def _batches(x, y, size=64):
    """Parts of 64 in a fixed random order: a batch of one class only would be a case of its own."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = order.split(size)
    if len(parts) > 1 and len(parts[-1]) < size // 2:
        parts = (*parts[:-2], torch.cat(parts[-2:]))
    return [x[part] for part in parts], [y[part] for part in parts]


def undone(seed=0):
    """Largest |y - x| of a BatchNorm with weight = sqrt(var + eps) and bias = mean, in training and in evaluation."""
    torch.manual_seed(seed)
    x = 3 + 5 * torch.randn(32, 8, 6, 6)
    layer = normfused.BatchNormAct2d(8, activation=None)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    with torch.no_grad():
        layer.weight.copy_((var + layer.eps).sqrt())
        layer.bias.copy_(mean)
        train = (layer(x) - x).abs().max().item()
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        layer.eval()
        return {"training": train, "evaluation": (layer(x) - x).abs().max().item()}


class Classifier(SmallResNet):
    """A SmallResNet whose BatchNorm layers may stay in evaluation mode while it trains."""

    frozen = False

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def run(options, images, record):
    """Train on the first half of the classes, fine-tune on the others from both checkpoints."""
    images = images.resized(options.size).standardised()
    half = images.classes // 2
    if half < 1:
        raise ValueError(f"{images.name} has {images.classes} class, two are needed")
    first, second = images.only(0, half), images.only(half, images.classes)
    record.where["split"] = [half, images.classes - half]
    after = record.progress(options.seeds * (1 + len(CASES)) * options.epochs, lambda: "epochs of all runs")
    for seed in range(options.seed, options.seed + options.seeds):

        def optimizer(model, lr=options.lr):
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)

        def make(seed=seed):
            torch.manual_seed(seed)
            model = Classifier(images.shape[0], first.classes, options.width)
            return model, optimizer(model)

        def finish(model, history, seed=seed):
            state = without_statistics(model.state_dict())
            lost = Classifier(images.shape[0], first.classes, options.width)
            refusal = missing_keys(lost, state)
            lost.load_state_dict(state, strict=False)
            return {
                "kept": accuracies(model, first, seed),
                "lost": accuracies(lost, first, seed),
                "refusal": refusal,
                "undone": undone(seed),
            }

        def train(key, make, data, finish=None, seed=seed):
            return record.train(
                {**key, "seed": seed},
                make,
                lambda step: data.stream(options.batch, seed, step),
                data.steps(options.batch),
                options.epochs,
                lambda model: accuracies(model, data, seed),
                finish=finish,
                after=after,
            )

        pretrained = train({"case": "first half"}, make, first, finish).state_dict()
        for case, (kept, frozen) in CASES.items():

            def make_tuned(kept=kept, frozen=frozen, pretrained=pretrained, seed=seed):
                torch.manual_seed(seed + 1)
                model = Classifier(images.shape[0], first.classes, options.width)
                model.load_state_dict(pretrained if kept else without_statistics(pretrained), strict=kept)
                model.classifier = nn.Linear(model.classifier.in_features, second.classes)
                model.frozen = frozen
                return model, optimizer(model, options.lr * FINE_TUNED)

            train({"case": case}, make_tuned, second)


_NAMES = ("running_mixed", "running_near", "batch_mixed", "batch_near")
_HEADER = (
    "running statistics, mixed batch",
    "running, near-identical",
    "batch statistics, mixed",
    "batch, near-identical",
)


def _results(record, kind):
    """{name: accuracies, one for each seed} of the first training's network, statistics "kept" or "lost"."""
    found = [entry["result"][kind] for entry in record.select(case="first half")]
    return {name: [result[name] for result in found] for name in _NAMES}


def _tuned(record, case, epoch=-1):
    """{name: accuracies, one for each seed} of a fine-tuning, at the end or after an epoch."""
    found = [entry["history"][epoch] for entry in record.select(case=case)]
    return {name: [line[name] for line in found] for name in _NAMES}


def _mean(values):
    return sum(values) / len(values)


def claims(record):
    """The published statements beside ours."""
    kept, lost = _results(record, "kept"), _results(record, "lost")
    tuned = {case: _tuned(record, case) for case in CASES}
    frozen_kept, frozen_lost = tuned["kept, BN frozen"], tuned["lost, BN frozen"]
    undo = [entry["result"]["undone"] for entry in record.select(case="first half")]
    worst = max(value for result in undo for value in result.values())

    def falls(before, after):
        return _mean(before) - _mean(after) > RUINED

    return [
        Claim(
            "near-identical images, batch statistics (mixed / near-identical)",
            "predictions are ruined",
            f"{spread(kept['batch_mixed'])} / {spread(kept['batch_near'])}",
            falls(kept["batch_mixed"], kept["batch_near"]),
        ),
        Claim(
            "the same, running statistics",
            "predictions are as good as ever",
            f"{spread(kept['running_mixed'])} / {spread(kept['running_near'])}",
            not falls(kept["running_mixed"], kept["running_near"]),
        ),
        Claim(
            "running statistics lost, evaluation mode (kept / lost), near-identical images",
            "predictions are ruined",
            f"{spread(kept['running_near'])} / {spread(lost['running_near'])}",
            falls(kept["running_near"], lost["running_near"]),
        ),
        Claim(
            "fine-tuned with BN in evaluation mode (kept / lost), near-identical images",
            "the loss stays",
            f"{spread(frozen_kept['running_near'])} / {spread(frozen_lost['running_near'])}",
            falls(frozen_kept["running_near"], frozen_lost["running_near"]),
        ),
        Claim(
            "weight = σ and bias = μ",
            "undo the normalisation",
            f"largest difference of y and x {worst:.1e} in both modes, x of mean 3 and σ 5",
            worst < 1e-4,
        ),
    ]


def page(record, found):
    """The result as one Markdown page."""
    settings, (half, rest) = record.settings, record.where["split"]
    refusal = record.select(case="first half")[0]["result"]["refusal"].replace("\n", " ").replace("\t", " ")
    sentences = [
        f"A ResNet of three blocks ({settings['width']} channels in the stem) on {settings['size']}×{settings['size']} "
        f"images, trained on the first {half} classes, then fine-tuned on the other {rest} with a new classifier; "
        f"batch {settings['batch']}, SGD (momentum {MOMENTUM}, lr {settings['lr']:g}, then "
        f"{settings['lr'] * FINE_TUNED:g}), {settings['epochs']} epochs each, {settings['seeds']} seeds. "
        f"Near-identical: {COPIES} copies of one held-out image with noise of {NOISE} standard deviations, {TRIED} "
        "images. Lost: running statistics are not in the checkpoint; the new network keeps mean 0 and variance 1.",
        f"A strict `load_state_dict` refuses that checkpoint (asserted): `{refusal[:160]} …`. The failures below need "
        "`strict=False`.",
    ]
    rows = [(f"first half, {kind}", *_cells(_results(record, kind))) for kind in ("kept", "lost")]
    for case in CASES:
        rows.append((f"fine-tuned: {case}, 1 epoch", *_cells(_tuned(record, case, 0))))
        rows.append((f"fine-tuned: {case}, {settings['epochs']} epochs", *_cells(_tuned(record, case))))
    tables = [("Accuracy on held-out images", ("", *_HEADER), rows)]
    return page_of("normfused: batch statistics and running statistics", record, sentences, found, tables)


def _cells(results):
    return [spread(results[name]) for name in _NAMES]


def draw(plt, record):
    """{suffix: figure}: the four accuracies of the first network, and those of each fine-tuning by epoch."""
    figure, (bars, mixed, near) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for shift, (kind, color) in zip((-0.2, 0.2), (("kept", "#1f77b4"), ("lost", "#d08a2e")), strict=True):
        results = _results(record, kind)
        heights = [_mean(results[name]) for name in _NAMES]
        bars.bar([place + shift for place in range(4)], heights, width=0.4, color=color, label=kind)
    bars.set_xticks(range(4), ["running,\nmixed", "running,\nnear-ident.", "batch,\nmixed", "batch,\nnear-ident."])
    bars.set(title="first network, running statistics kept or lost", ylabel="held-out accuracy")
    styles = {"kept, BN trains": "#1f77b4", "lost, BN trains": "#7b6cc4", "kept, BN frozen": "#9a9a9a"}
    for case in CASES:
        histories = [entry["history"] for entry in record.select(case=case)]
        epochs = [line["epoch"] for line in histories[0]]
        for axis, name in ((mixed, "running_mixed"), (near, "running_near")):
            means = [_mean([history[i][name] for history in histories]) for i in range(len(epochs))]
            axis.plot(epochs, means, color=styles.get(case, "#d08a2e"), label=f"statistics {case}")
    mixed.set(title="fine-tuned, evaluation mode, mixed batches", xlabel="epoch")
    near.set(title="fine-tuned, evaluation mode, near-identical", xlabel="epoch")
    for axis in (bars, mixed, near):
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return {"": figure}
