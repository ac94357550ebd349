"""Training a model and its twins side by side: data, steps, agreement of the losses, share of normalisation."""

import copy
import math
import re
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

FIRST_STEPS = 20
TOLERANCE = 1e-3
DRIFT_FACTOR = 2.0

# What belongs to BatchNorm and ReLU6 in a trace: PyTorch's operators, ours, and the autograd nodes of both.
_NORMALISATION = re.compile(r"batch_?norm|hardtanh|relu6", re.IGNORECASE)
_STEP = "bench::step"


@dataclass
class Trainee:
    """A model in training; ``losses`` one per step, ``seconds`` wall time per step."""

    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, x, y):
        """One step on images (N, 3, H, W) and labels (N,); returns the loss before it, a scalar tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@dataclass(frozen=True)
class Agreement:
    """How far the losses of two trainings lie apart, and whether that is rounding.

    ``first``: largest relative difference over the first 20 steps; ``overall``: over all steps; ``drift``: largest
    absolute difference after the first 20, None where there are no later steps; ``drift_moved``: that of a native model
    whose initial weights were moved by one ulp; ``why_not``: None if they agree, else the reason in a sentence.
    """

    first: float
    overall: float
    drift: float | None
    drift_moved: float | None
    why_not: str | None

    @property
    def accepted(self) -> bool:
        """Whether the losses agree."""
        return self.why_not is None


def agreement(native, fused, moved) -> Agreement:
    """Judge the losses of a converted model by those of the native one and of its copy moved by one ulp.

    Training amplifies any rounding difference step by step, so that only the first steps can be held to a fixed
    tolerance; later ones must not drift further than twice what a change of the last bit of the weights does.

    Args:
        native, fused, moved: losses, one per step, of the same batches.
    """
    if not len(native) == len(fused) == len(moved) or not native:
        raise ValueError(f"agreement: expected as many losses, got {len(native)}, {len(fused)}, {len(moved)}")
    if not all(map(math.isfinite, (*native, *fused, *moved))):
        return Agreement(math.nan, math.nan, None, None, "a loss is not finite")
    relative = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(native, fused, strict=True)]
    first, overall = max(relative[:FIRST_STEPS]), max(relative)
    drift = drift_moved = why_not = None
    if len(native) > FIRST_STEPS:
        drift, drift_moved = (
            max(abs(a - b) for a, b in zip(native[FIRST_STEPS:], other[FIRST_STEPS:], strict=True))
            for other in (fused, moved)
        )
    if first > TOLERANCE:
        why_not = f"the first {FIRST_STEPS} losses differ by up to {first:.1e}, more than {TOLERANCE:.0e} (relative)"
    elif drift is not None and drift > DRIFT_FACTOR * drift_moved:
        why_not = f"later losses drift by {drift:.1e}, more than {DRIFT_FACTOR:g} times one ulp's {drift_moved:.1e}"
    return Agreement(first, overall, drift, drift_moved, why_not)


def moved_by_one_ulp(model, seed):
    """A copy of ``model`` with every parameter's elements at a neighbouring float, up or down at random."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            towards = torch.where(up, math.inf, -math.inf)
            parameter.copy_(torch.nextafter(parameter, towards))
    return model


class Digits:
    """scikit-learn's 1797 handwritten digits, 8x8 grey, standardised; the last 297 of a fixed shuffle are held out."""

    HELD_OUT = 297

    def __init__(self, size, channels_last=False):
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.as_tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1)
        self._images = (images - images.mean()) / images.std()
        self._labels = torch.as_tensor(digits.target)[order]
        self._size = size
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def _load(self, indices):
        images = F.interpolate(self._images[indices], size=(self._size, self._size), mode="bilinear")
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=self._memory_format)
        return images, self._labels[indices]

    def batches(self, batch, steps, seed):
        """Yield ``steps`` pairs of images (batch, 3, size, size) and labels (batch,), every epoch newly shuffled."""
        generator = torch.Generator().manual_seed(seed)
        available = len(self._labels) - self.HELD_OUT
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < batch:
                order = torch.cat([order, torch.randperm(available, generator=generator)])
            yield self._load(order[:batch])
            order = order[batch:]

    @torch.no_grad()
    def accuracy(self, model, batch=99):
        """Share of the held-out digits that ``model`` in evaluation mode gets right."""
        was_training = model.training
        model.eval()
        right = 0
        for indices in torch.arange(len(self._labels))[-self.HELD_OUT :].split(batch):
            images, labels = self._load(indices)
            right += int((model(images).argmax(1) == labels).sum())
        model.train(was_training)
        return right / self.HELD_OUT


def train(trainees, batches, lr, warm_up, after_step=lambda done: None):
    """Train models side by side: every batch goes to all of them before the next.

    Args:
        trainees: the first two take turns in going first, the others follow.
        batches: iterable of (images, labels).
        lr: learning rate after ``warm_up`` steps of linear increase.
        after_step: called with the number of finished steps.
    """
    for number, (x, y) in enumerate(batches):
        order = [*reversed(trainees[:2]), *trainees[2:]] if number % 2 else trainees
        for trainee in order:
            for group in trainee.optimizer.param_groups:
                group["lr"] = lr * min(1.0, (number + 1) / warm_up)
            start = time.perf_counter()
            loss = trainee.step(x, y)
            trainee.seconds.append(time.perf_counter() - start)
            trainee.losses.append(loss.item())
        after_step(number + 1)


def normalisation_share(step, repeats=3) -> float:
    """Share of the time of ``step()`` spent in BatchNorm and ReLU6, forward and backward.

    From torch.profiler, over ``repeats`` calls: the outermost events that belong to normalisation or activation
    (operators in the forward pass, autograd nodes with all they call in the backward), over the duration of the calls.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            with record_function(_STEP):
                step()

    def inside_another(event):
        parent = event.cpu_parent
        while parent is not None:
            if _NORMALISATION.search(parent.name):
                return True
            parent = parent.cpu_parent
        return False

    part = whole = 0.0
    for event in profiler.events():
        if event.name == _STEP:
            whole += event.time_range.elapsed_us()
        elif _NORMALISATION.search(event.name) and not inside_another(event):
            part += event.time_range.elapsed_us()
    return part / whole
