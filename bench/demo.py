"""``python -m bench demo``: MobileNetV2 and its converted twin, trained side by side on handwritten digits."""

import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import normfused

from . import report
from .memory import peak_memory
from .mobilenet_v2 import MobileNetV2
from .training import (
    FIRST_STEPS,
    Digits,
    Trainee,
    agreement,
    moved_by_one_ulp,
    normalisation_share,
    train,
)

MOMENTUM = 0.9

# Steps whose times are left out: the first ones set up threads and memory pools.
WARM_UP_STEPS = 3


class Progress:
    """A bar on a terminal, a line at every tenth elsewhere, with the time left.

    Args:
        steps: of all the work.
        describe: returns what to say beside the number of the step.
        done: steps that an earlier run has made.
    """

    def __init__(self, steps, describe, done=0, stream=None):
        self._steps = steps
        self._describe = describe
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._before = done

    def __call__(self, done):
        if not self._terminal and done % max(1, self._steps // 10) and done != self._steps:
            return
        left = (time.monotonic() - self._start) / (done - self._before) * (self._steps - done)
        filled = 20 * done // self._steps
        bar = f"[{'#' * filled}{'.' * (20 - filled)}] " if self._terminal else ""
        end = "\n" if not self._terminal or done == self._steps else ""
        text = f"{bar}step {done}/{self._steps}  {self._describe()}  {left:.0f} s left"
        print(f"\r\033[K{text}" if self._terminal else text, end=end, file=self._stream, flush=True)


def _trainees(options):
    """The native model, its converted twin, and its copy moved by one ulp."""
    torch.manual_seed(options.seed)
    native = MobileNetV2(width=options.width)
    if options.channels_last:
        native.to(memory_format=torch.channels_last)
    models = {
        "native": native,
        "normfused": normfused.convert(copy.deepcopy(native)),
        "one ulp": moved_by_one_ulp(native, options.seed + 1),
    }
    return [
        Trainee(name, model, torch.optim.SGD(model.parameters(), lr=options.lr, momentum=MOMENTUM))
        for name, model in models.items()
    ]


def _fused_layers(model):
    """(fused, all) BatchNorm layers of a converted model."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    fused = [m for m in layers if isinstance(m, normfused.BatchNormAct2d) and m.activation is not None]
    return len(fused), len(layers)


def measure(options):
    """Run the demo; returns what it found as a dict that JSON can hold.

    Times in seconds, memory in bytes, accuracy and shares as fractions; losses and times of a step per model.
    """
    digits = Digits(options.size, options.channels_last)
    trainees = _trainees(options)

    def losses():
        return "loss " + ", ".join(f"{trainee.name} {trainee.losses[-1]:.4f}" for trainee in trainees)

    train(
        trainees,
        digits.batches(options.batch, options.steps, options.seed),
        options.lr,
        options.warm_up,
        Progress(options.steps, losses),
    )
    native, fused, moved = trainees
    found = {
        "settings": {name: value for name, value in vars(options).items() if name not in ("command", "out")},
        "fused_layers": _fused_layers(fused.model),
        "agreement": vars(agreement(native.losses, fused.losses, moved.losses)),
        "models": {},
    }
    print("accuracy, profile and memory ...", file=sys.stderr, flush=True)
    x, y = next(digits.batches(options.batch, 1, options.seed))
    for trainee in trainees:
        timed = trainee.seconds[WARM_UP_STEPS:] or trainee.seconds
        found["models"][trainee.name] = {
            "losses": trainee.losses,
            "seconds": trainee.seconds,
            "median_s": statistics.median(timed),
            "accuracy": digits.accuracy(trainee.model),
        }
    for trainee in (native, fused):
        found["models"][trainee.name]["normalisation_share"] = normalisation_share(
            lambda trainee=trainee: trainee.step(x, y)
        )
        # Otherwise the gradients of the step before would be freed unseen in this one.
        trainee.optimizer.zero_grad(set_to_none=True)
        found["models"][trainee.name]["peak_bytes"] = peak_memory(lambda trainee=trainee: trainee.step(x, y))
    return found


def markdown(found, where):
    """The result as one Markdown page."""
    settings, judged = found["settings"], found["agreement"]
    native, fused = (found["models"][name] for name in ("native", "normfused"))
    ratio = native["median_s"] / fused["median_s"]
    memory = fused["peak_bytes"] / native["peak_bytes"]
    mega = [model["peak_bytes"] / 2**20 for model in (native, fused)]
    rows = [
        ("loss, first step", f"{native['losses'][0]:.4f}", f"{fused['losses'][0]:.4f}", ""),
        ("loss, last step", f"{native['losses'][-1]:.4f}", f"{fused['losses'][-1]:.4f}", ""),
        (f"largest difference, first {FIRST_STEPS} steps", "", "", f"{judged['first']:.1e} (relative)"),
        ("largest difference, all steps", "", "", f"{judged['overall']:.1e} (relative)"),
        ("accuracy on held-out digits", f"{native['accuracy']:.1%}", f"{fused['accuracy']:.1%}", ""),
        (
            "median step",
            f"{native['median_s'] * 1e3:.0f} ms",
            f"{fused['median_s'] * 1e3:.0f} ms",
            f"{ratio:.2f}× as fast",
        ),
        (
            "share of BatchNorm + ReLU6",
            f"{native['normalisation_share']:.0%}",
            f"{fused['normalisation_share']:.0%}",
            "",
        ),
        ("peak memory of a step", f"{mega[0]:.0f} MiB", f"{mega[1]:.0f} MiB", f"{memory:.2f}×"),
    ]
    if judged["drift"] is not None:
        drift = f"{judged['drift']:.1e} (absolute; one ulp: {judged['drift_moved']:.1e})"
        rows.insert(4, (f"largest difference after step {FIRST_STEPS}", "", "", drift))
    layout = "channels_last" if settings["channels_last"] else "contiguous"
    verdict = "The losses agree." if judged["why_not"] is None else f"The losses DISAGREE: {judged['why_not']}."
    return "\n".join(
        [
            "# normfused: MobileNetV2 on handwritten digits",
            "",
            *report.conditions(where),
            "",
            f"MobileNetV2 {settings['width']:g}, batch {settings['batch']}, {settings['size']}×{settings['size']}, "
            f"float32, {layout}, SGD (momentum {MOMENTUM}, lr {settings['lr']:g} after {settings['warm_up']} steps of "
            f"warm-up), {settings['steps']} steps, seed {settings['seed']}; "
            f"{found['fused_layers'][0]} of {found['fused_layers'][1]} BatchNorm layers fused with their ReLU6.",
            "",
            *report.table(("", "native", "normfused", ""), rows),
            "",
            verdict,
            "",
            "Same weights, same batches, steps in turn; the share by torch.profiler over 3 steps (its overhead "
            "included); the peak counts PyTorch's CPU allocations beyond weights and momentum.",
            "",
        ]
    )


def plot(found, path):
    """Save the curves of losses and step times as a PNG; returns why not, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = {"native": "-", "normfused": "--", "one ulp": ":"}
    for name, model in found["models"].items():
        losses.plot(range(1, len(model["losses"]) + 1), model["losses"], styles[name], label=name)
        if name != "one ulp":
            milliseconds = [seconds * 1e3 for seconds in model["seconds"]]
            label = f"{name}, median {model['median_s'] * 1e3:.0f} ms"
            times.plot(range(1, len(milliseconds) + 1), milliseconds, styles[name], label=label)
    losses.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    times.set(xlabel="step", ylabel="ms", title="Time of a step", ylim=(0, None))
    for axes in (losses, times):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None


def main(options, arguments):
    """``python -m bench demo``; returns the exit status: 0 if the losses agree, 1 if not, 2 without scikit-learn."""
    where = report.environment(arguments)
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        print("python -m bench demo: error: scikit-learn is missing: pip install scikit-learn", file=sys.stderr)
        return 2
    try:
        found = measure(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    page = markdown(found, where)
    (folder / "demo.md").write_text(page, encoding="utf-8")
    (folder / "demo.json").write_text(json.dumps({"environment": where, **found}, indent=1) + "\n", encoding="utf-8")
    no_plot = plot(found, folder / "demo.png")
    print(page)
    written = ["demo.md", "demo.json", *([] if no_plot else ["demo.png"])]
    print("written: " + ", ".join(str(folder / name) for name in written), file=sys.stderr)
    if no_plot:
        print(no_plot, file=sys.stderr)
    return 0 if found["agreement"]["why_not"] is None else 1
