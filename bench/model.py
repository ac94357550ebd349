"""The subcommand ``model``: training steps of whole models, native and converted: time, normalisation, memory."""

import contextlib
import copy
import csv
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
from .memory import garbage_apart, kept_memory, peak_memory
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
    "normfused-recompute-third": Variant(
        "converted, under recompute_activations(1 / 3)", lambda model: Recomputing(normfused.convert(model), 1 / 3)
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
        with garbage_apart():
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


def prepare(model_name, layout, batch, options):
    """(model, images, labels, context of a forward pass) that the options name, on their device."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    model = MODELS[model_name](classes=1000).to(device=device, memory_format=LAYOUTS[layout])
    x = torch.randn(batch, 3, options.size, options.size, device=device).to(memory_format=LAYOUTS[layout])
    y = torch.randint(1000, (batch,), device=device)
    dtype = getattr(torch, options.dtype)
    autocast = contextlib.nullcontext
    if dtype != torch.float32:
        autocast = functools.partial(torch.autocast, device.type, dtype=dtype)
    return model, x, y, autocast


def empty_row(model_name, layout, batch, options, variant):
    """A row without figures."""
    where = {"model": model_name, "layout": layout, "batch": batch, "size": options.size, "dtype": options.dtype}
    return {**where, "variant": variant, "failure": None}


def measure(model_name, layout, batch, options):
    """Rows, one for each variant, of one model in one layout: dicts that JSON can hold."""
    model, x, y, autocast = prepare(model_name, layout, batch, options)
    rows, trainings, samples = {}, {}, {}
    for name in options.variant:
        rows[name] = empty_row(model_name, layout, batch, options, name)
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
        if VARIANTS[name].in_profile and not x.is_cuda:
            row["share"] = normalisation_share(training.step, repeats=1)
        row["kept_bytes"], row["peak_bytes"] = training.memory()
    return list(rows.values())


def percentages(row, first, names=("kept_bytes", "peak_bytes")):
    """Memory of a row as cells of a table, and what it is of the first variant's."""
    return [f"{row[name] / 2**20:.0f} MiB, {row[name] / first[name]:.0%}" for name in names]


def first_variants(rows):
    """{(model, batch, layout, dtype): the first row that did not fail}."""
    found = {}
    for row in rows:
        if row["failure"] is None:
            found.setdefault(place(row), row)
    return found


def place(row):
    """What the variants of a row share."""
    return tuple(row[name] for name in ("model", "batch", "layout", "dtype"))


def table(rows):
    """Rows of ``measure`` as a Markdown table; ratios are to the first variant of the same model and layout."""
    header = ["model", "batch", "layout", "dtype", "variant", "step", "× native", "BatchNorm and activation"]
    header += ["kept for backward", "peak of a step"]
    lines, firsts = [], first_variants(rows)
    for row in rows:
        where = place(row)
        if row["failure"] is not None:
            lines.append([*where, row["variant"], f"failed: {row['failure']}", "", "", "", ""])
            continue
        first = firsts[where]
        spread = (row["q75_s"] - row["q25_s"]) / 2
        share = "–" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(
            [
                *(*where, row["variant"], f"{row['median_s'] * 1e3:.0f} ± {spread * 1e3:.0f} ms"),
                *(f"{first['median_s'] / row['median_s']:.2f}", share, *percentages(row, first)),
            ]
        )
    return report.table(header, lines)


LEGEND = (
    "Random images, SGD with momentum, steps of the variants in turn; time is the median ± half the interquartile "
    "range. Percentages are of the first variant's. Memory is PyTorch's own, beyond parameters and momentum: what the "
    "forward pass leaves for the backward pass, and the worst moment of a step."
)


def markdown(rows, where):
    """The result as one Markdown page."""
    return page("training whole models", LEGEND, table(rows), rows, where)


def page(title, legend, lines, rows, where):
    """A page of rows, whose table is ``lines``."""
    used = dict.fromkeys(row["variant"] for row in rows)
    interrupted = ["", "**Interrupted: only what was measured until then.**"] * bool(where.get("interrupted"))
    variants = [f"- {name}: {VARIANTS[name].about}" for name in used]
    head = [f"# normfused: {title}", "", *report.conditions(where), *interrupted]
    return "\n".join([*head, "", legend, "", *variants, "", *lines, ""])


def write(name, rows, text, where, folder):
    """Write NAME.md, NAME.csv and NAME.json into ``folder``; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("md", "csv", "json")]
    report.replace(paths[0], text)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "seconds"]
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, columns, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    report.replace(paths[2], json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
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
    defaults = {"model": ["mobilenet_v2"], "batch": [32], "layout": list(LAYOUTS), "variant": list(DEFAULT_VARIANTS)}
    add_selection(ours, positive, "model", defaults)
    ours.add_argument("--steps", type=positive(int), default=10, help="timed steps of each; default: 10")
    return ours


def add_selection(ours, positive, name, defaults):
    """Arguments about what is trained and where the result, NAME.json, goes; ``defaults`` of those with a choice."""
    says = {option: f"default: {' '.join(map(str, values))}" for option, values in defaults.items()}
    ours.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    ours.add_argument("--model", nargs="+", choices=tuple(MODELS), help=says["model"])
    ours.add_argument("--batch", nargs="+", type=positive(int), metavar="N", help=f"images of a step; {says['batch']}")
    ours.add_argument("--size", type=positive(int), default=224, help="height = width of an image; default: 224")
    ours.add_argument("--layout", nargs="+", choices=tuple(LAYOUTS), help=says["layout"])
    ours.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="16 bits: under autocast"
    )
    about = "; ".join(f"{variant}: {VARIANTS[variant].about}" for variant in VARIANTS)
    ours.add_argument(
        "--variant", nargs="+", choices=tuple(VARIANTS), metavar="VARIANT", help=f"{about}; {says['variant']}"
    )
    ours.add_argument("--seed", type=int, default=0, help="of weights and images; default: 0")
    ours.add_argument("--resume", action="store_true", help=f"measure only what FOLDER/{name}.json does not have yet")
    out = f"out/{name}"
    ours.add_argument(
        "--out", default=out, metavar="FOLDER", help=f"for {name}.md, {name}.csv, {name}.json; default: {out}"
    )
    ours.set_defaults(**defaults)


def main(options, arguments, error):
    """The subcommand ``model``; returns the exit status."""
    return run("model", measure, markdown, options, arguments, error)


def run(name, measure, markdown, options, arguments, error):
    """Measure every model, layout and batch size that ``options`` name, and write NAME.md, NAME.csv and NAME.json after
    each; returns the exit status.

    Args:
        measure: (model, layout, batch, options) to a list of rows, one for each variant.
        markdown: (rows, environment) to a page.
        error: called with a message where the options make no sense.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        error("--device cuda: PyTorch finds no GPU here")
    where = report.environment(arguments, options.device)
    try:
        rows = report.resumable(options.out, where, name) if options.resume else []
    except ValueError as why:
        error(f"--resume: {why}")
    done = {(*place(row), row["size"], row["variant"]) for row in rows}
    cases = [
        (model, layout, batch)
        for model in options.model
        for layout in options.layout
        for batch in options.batch
        if not {(model, batch, layout, options.dtype, options.size, variant) for variant in options.variant} <= done
    ]
    started, status = time.monotonic(), 0
    try:
        for number, (model, layout, batch) in enumerate(cases):
            left = (time.monotonic() - started) / number * (len(cases) - number) if number else None
            text = "" if left is None else f", {left:.0f} s left"
            print(f"[{number + 1}/{len(cases)}{text}] {model}, batch {batch}, {layout}", file=sys.stderr, flush=True)
            found = measure(model, layout, batch, options)
            # Variants are compared with what was measured beside them.
            again = (*place(found[0]), options.size)
            rows = [row for row in rows if (*place(row), row["size"]) != again] + found
            write(name, rows, markdown(rows, where), where, options.out)
    except KeyboardInterrupt:
        where["interrupted"], status = True, 130
        print("\ninterrupted: what was measured is written", file=sys.stderr)
    if rows:
        text = markdown(rows, where)
        paths = write(name, rows, text, where, options.out)
        print(text)
        print("written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return status
