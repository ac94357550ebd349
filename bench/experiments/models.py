"""The networks of the experiments, on normfused's layers."""

import torch
import torch.nn.functional as F
from torch import nn

import normfused

from ..mobilenet_v2 import BLOCKS, divisible

# Keras's BatchNormalization: epsilon 1e-3; its momentum 0.99 keeps the old value, torch's is the share of the new one.
KERAS_BATCH_NORM = {"eps": 1e-3, "momentum": 0.01}


def glorot_uniform(module):
    """Keras's default initialisation of convolutions and dense layers."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class StridePad(nn.Module):
    """Zeros as Keras adds them before a 3x3 convolution of stride 2 (``correct_pad``): (N, C, H, W), one row and column
    at the end of an even size, one at each side of an odd one."""

    def forward(self, x):
        height, width = x.shape[2:]
        return F.pad(x, (width % 2, 1, height % 2, 1))


class KerasMobileNetV2(nn.Module):
    """(N, 3, H, W) images to (N, classes) logits: MobileNetV2 as Keras builds it, without dropout.

    Args:
        pair: makes what follows the stem, each expansion, each depthwise convolution and the head, from a number of
            channels: 35 in all.
        project: makes what follows each of the 17 projections.
    """

    def __init__(self, pair, project, classes=10, width=1.0):
        super().__init__()

        def convolution(inputs, outputs, kernel, stride=1, groups=1):
            padding = kernel // 2 if stride == 1 else 0
            return [
                *([StridePad()] if stride != 1 else []),
                nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            ]

        channels = divisible(32 * width)
        layers = [nn.Sequential(*convolution(3, channels, 3, 2), pair(channels))]
        for expansion, outputs, repeats, first_stride in BLOCKS:
            outputs = divisible(outputs * width)
            for repeat in range(repeats):
                stride, hidden = first_stride if repeat == 0 else 1, channels * expansion
                branch = nn.Sequential(
                    *([*convolution(channels, hidden, 1), pair(hidden)] if expansion != 1 else []),
                    *convolution(hidden, hidden, 3, stride, hidden),
                    pair(hidden),
                    *convolution(hidden, outputs, 1),
                    project(outputs),
                )
                layers.append(Residual(branch) if stride == 1 and channels == outputs else branch)
                channels = outputs
        last = divisible(1280 * max(1.0, width))
        layers.append(nn.Sequential(*convolution(channels, last, 1), pair(last)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, classes)
        self.apply(glorot_uniform)

    @property
    def stem(self) -> nn.Conv2d:
        """The first convolution."""
        return self.features[0][1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def check_mobilenet(model, is_pair, is_project):
    """Count what the write-up counts; raises AssertionError where a count differs.

    Args:
        is_pair, is_project: whether a module is one of the 35 that ``pair`` made, one of the 17 that ``project`` made.

    Returns:
        What was asserted, as a sentence.
    """
    pairs = sum(map(is_pair, model.modules()))
    projects = sum(map(is_project, model.modules()))
    assert (pairs, projects) == (35, 17), f"{pairs} pairs and {projects} projections, expected 35 and 17"
    strided = padded = 0
    for module in model.modules():
        for before, after in zip([None, *module.children()], module.children(), strict=False):
            if isinstance(after, nn.Conv2d) and after.groups > 1 and after.stride != (1, 1):
                strided += 1
                padded += isinstance(before, StridePad) and after.padding == (0, 0)
    assert strided == padded == 4, f"{padded} of {strided} strided depthwise convolutions are padded, expected 4 of 4"
    return (
        "Asserted: 35 norm/activation pairs (stem 1, expansions 16, depthwise 17, head 1), 17 projections; zero "
        "padding before each of the 4 strided depthwise convolutions as in Keras."
    )


class SmallResNet(nn.Module):
    """(N, C, H, W) images to (N, classes) logits: a stem and three residual blocks (He et al. 2015), the last two of
    stride 2. BatchNorm adds the residual and applies ReLU in its own kernel.

    Args:
        groups: GroupNorm of so many groups in place of BatchNorm; None: BatchNorm.
    """

    def __init__(self, inputs=1, classes=10, channels=16, groups=None):
        super().__init__()

        def norm(channels):
            if groups is None:
                return normfused.BatchNormAct2d(channels, activation="relu")
            return normfused.GroupNormAct(groups, channels, activation="relu")

        self.stem = nn.Sequential(nn.Conv2d(inputs, channels, 3, 1, 1, bias=False), norm(channels))
        blocks = []
        for number in range(3):
            outputs = channels if number == 0 else 2 * channels
            blocks.append(_Block(channels, outputs, 1 if number == 0 else 2, norm))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs))
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm = norm(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        branch, shortcut = self.second(self.first(x)), self.shortcut(x)
        if isinstance(self.norm, normfused.BatchNormAct2d):
            return self.norm(branch, residual=shortcut)
        return self.norm(branch) + shortcut


class Perceptron(nn.Module):
    """(N, inputs) to (N, classes): three hidden layers, weights drawn from N(0, sigma), biases 0.

    Args:
        norm: makes normalisation and activation of a hidden layer from its width; the layers before have no bias then.
        activation: of a network without normalisation, a module.
    """

    def __init__(self, inputs, classes, hidden, sigma, norm=None, activation=None):
        super().__init__()
        layers = []
        for _ in range(3):
            layers.append(nn.Linear(inputs, hidden, bias=norm is None))
            layers += [activation] if norm is None else norm(hidden)
            inputs = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, classes))
        for module in self.layers:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, sigma)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
