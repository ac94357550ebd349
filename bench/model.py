"""``python -m bench model``: training steps of whole models, native and converted: time, normalisation, memory."""

import contextlib
import copy
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import normfused

from . import report
from .memory import kept_memory, peak_memory
from .mobilenet_v2 import MobileNetV2
from .resnet import ResNet50
from .timing import reason, summarise
from .training import Trainee, normalisation_share

MODELS = {"mobilenet_v2": MobileNetV2, "resnet50": ResNet50}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP_STEPS = 2
NATIVE, OURS = "native", "normfused"


class Checkpointed(torch.nn.Module):
    """A model of MODELS that keeps the inputs of its blocks and computes the rest again in the backward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        for block in self.model.features:
            x = checkpoint(block, x, use_reentrant=False)
        return self.model.classifier(x.mean((2, 3)))


class Recomputing(torch.nn.Module):
    """A converted model under normfused.recompute_activations(share)."""

    def __init__(self, model, share=1.0):
        super().__init__()
        self.model, self.share = model, share

    def forward(self, x):
        with normfused.recompute_activations(self.share):
            return self.model(x)


@dataclass(frozen=True)
class Variant:
    """A way of training a model: ``make(model)`` gives the module to train, from a copy that it may change."""

    about: str
    make: object
    # The profiler sees neither inside of what is compiled.
    in_profile: bool = True


VARIANTS = {
    NATIVE: Variant("as it is", lambda model: model),
    OURS: Variant("converted", normfused.convert),
    "native-compile": Variant("as it is, compiled", torch.compile, False),
    "normfused-compile": Variant("converted, compiled", lambda m: torch.compile(normfused.convert(m)), False),
    "native-checkpoint": Variant("as it is, each block under torch.utils.checkpoint", Checkpointed),
    "normfused-recompute": Variant(
        "converted, under recompute_activations", lambda model: Recomputing(normfused.convert(model))
    ),
    "normfused-recompute-half": Variant(
        "converted, under recompute_activations(0.5)", lambda model: Recomputing(normfused.convert(model), 0.5)
    ),
}
DEFAULT_VARIANTS = (NATIVE, OURS)


class Training:
    """One variant of a model in training on one batch of random images."""

    def __init__(self, name, model, x, y, autocast):
        made = VARIANTS[name].make(copy.deepcopy(model))
        self.trainee = Trainee(name, made, torch.optim.SGD(made.parameters(), lr=1e-3, momentum=0.9))
        self.x, self.y, self.autocast = x, y, autocast

    def step(self):
        """One step; returns once the device is done with it."""
        with self.autocast():
            self.trainee.step(self.x, self.y)
        self._wait()

    def timed(self):
        """Seconds of a step."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def forward(self):
        """The loss, and with it all that the backward pass needs."""
        with self.autocast():
            return torch.nn.functional.cross_entropy(self.trainee.model(self.x), self.y)

    def memory(self):
        """(bytes kept between forward and backward pass, bytes at the worst moment of a step), parameters apart."""
        self.trainee.optimizer.zero_grad(set_to_none=True)
        if self.x.is_cuda:
            return self._cuda_memory()
        kept = kept_memory(self.forward)
        return kept, peak_memory(self.step)

    def _cuda_memory(self):
        before = torch.cuda.memory_allocated()
        loss = self.forward()
        kept = torch.cuda.memory_allocated() - before
        del loss
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return kept, torch.cuda.max_memory_allocated() - before

    def _wait(self):
        if self.x.is_cuda:
            torch.cuda.synchronize()


def measure(model_name, layout, batch, options):
    """Rows, one for each variant, of one model in one layout: dicts that JSON can hold."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    model = MODELS[model_name](classes=1000).to(device=device, memory_format=LAYOUTS[layout])
    x = torch.randn(batch, 3, options.size, options.size, device=device).to(memory_format=LAYOUTS[layout])
    y = torch.randint(1000, (batch,), device=device)
    dtype = getattr(torch, options.dtype)
    autocast = contextlib.nullcontext
    if dtype != torch.float32:
        autocast = functools.partial(torch.autocast, device.type, dtype=dtype)
    rows, trainings, samples = {}, {}, {}
    for name in options.variant:
        rows[name] = {
            **{"model": model_name, "layout": layout, "batch": batch, "size": options.size, "dtype": options.dtype},
            **{"variant": name, "failure": None},
        }
        try:
            training = Training(name, model, x, y, autocast)
            for _ in range(WARM_UP_STEPS):
                training.step()
        except Exception as error:
            rows[name]["failure"] = reason(error)
        else:
            trainings[name], samples[name] = training, []
    # Steps in turn: drift of the machine hits all alike.
    for number in range(options.steps):
        names = list(trainings)
        for name in names if number % 2 else reversed(names):
            samples[name].append(trainings[name].timed())
    for name, training in trainings.items():
        timing, row = summarise(samples[name]), rows[name]
        row |= {"seconds": samples[name], "median_s": timing.median, "q25_s": timing.q25, "q75_s": timing.q75}
        row["share"] = None
        if VARIANTS[name].in_profile and device.type == "cpu":
            row["share"] = normalisation_share(training.step, repeats=1)
        row["kept_bytes"], row["peak_bytes"] = training.memory()
    return list(rows.values())


def table(rows):
    """Rows of ``measure`` as a Markdown table; ratios are to the first variant of the same model and layout."""
    header = ["model", "batch", "layout", "dtype", "variant", "step", "× native", "BatchNorm and activation"]
    header += ["kept for backward", "peak of a step"]
    lines, native = [], {}
    for row in rows:
        where = row["model"], row["batch"], row["layout"], row["dtype"]
        if row["failure"] is not None:
            lines.append([*where, row["variant"], f"failed: {row['failure']}", "", "", "", ""])
            continue
        first = native.setdefault(where, row)
        spread = (row["q75_s"] - row["q25_s"]) / 2
        share = "–" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(
            [
                *(*where, row["variant"], f"{row['median_s'] * 1e3:.0f} ± {spread * 1e3:.0f} ms"),
                f"{first['median_s'] / row['median_s']:.2f}",
                share,
                *(f"{row[key] / 2**20:.0f} MiB, {row[key] / first[key]:.0%}" for key in ("kept_bytes", "peak_bytes")),
            ]
        )
    return report.table(header, lines)


def markdown(rows, where):
    """The result as one Markdown page."""
    used = dict.fromkeys(row["variant"] for row in rows)
    return "\n".join(
        [
            *("# normfused: training whole models", "", *report.conditions(where), ""),
            "Random images, SGD with momentum, steps of the variants in turn; time is the median ± half the "
            "interquartile range. Percentages are of the first variant's. Memory is PyTorch's own, beyond parameters "
            "and momentum: what the forward pass leaves for the backward pass, and the worst moment of a step.",
            "",
            *(f"- {name}: {VARIANTS[name].about}" for name in used),
            *("", *table(rows), ""),
        ]
    )


def write(rows, where, folder):
    """Write model.md and model.json into ``folder``; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "model.md", folder / "model.json"
    report.replace(paths[0], markdown(rows, where))
    report.replace(paths[1], json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    return paths


def add_command(commands, positive):
    """The subcommand's arguments; ``positive(kind)`` parses positive numbers."""
    ours = commands.add_parser(
        "model",
        help="time training steps of whole models, and their memory",
        description="Training steps of MobileNetV2 and ResNet-50 at ImageNet's size on random images, native and "
        "converted by normfused.convert, in turn in one process: time, the share of BatchNorm and its activation, "
        "and memory.",
    )
    ours.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    ours.add_argument("--model", nargs="+", choices=tuple(MODELS), default=["mobilenet_v2"], help="default: the first")
    ours.add_argument("--batch", nargs="+", type=positive(int), default=[32], metavar="N", help="default: 32")
    ours.add_argument("--size", type=positive(int), default=224, help="height = width of an image; default: 224")
    ours.add_argument("--layout", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), help="default: both")
    ours.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="16 bits: under autocast"
    )
    about = "; ".join(f"{name}: {variant.about}" for name, variant in VARIANTS.items())
    ours.add_argument(
        "--variant",
        nargs="+",
        choices=tuple(VARIANTS),
        default=list(DEFAULT_VARIANTS),
        help=f"{about}. Default: {', '.join(DEFAULT_VARIANTS)}",
    )
    ours.add_argument("--steps", type=positive(int), default=10, help="timed steps of each; default: 10")
    ours.add_argument("--seed", type=int, default=0, help="of weights and images; default: 0")
    ours.add_argument("--out", default="out/model", metavar="FOLDER", help="for model.md, model.json")
    return ours


def main(options, arguments):
    """Run the command; returns the exit status."""
    where = report.environment(arguments, options.device)
    rows, status = [], 0
    cases = [(model, layout, batch) for model in options.model for layout in options.layout for batch in options.batch]
    started = time.monotonic()
    try:
        for done, (model, layout, batch) in enumerate(cases):
            left = (time.monotonic() - started) / done * (len(cases) - done) if done else None
            text = "" if left is None else f", {left:.0f} s left"
            print(f"[{done + 1}/{len(cases)}{text}] {model}, batch {batch}, {layout}", file=sys.stderr, flush=True)
            rows += measure(model, layout, batch, options)
            write(rows, where, options.out)
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is written", file=sys.stderr)
        status = 130
    if rows:
        paths = write(rows, where, options.out)
        print(markdown(rows, where))
        print("written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return status
