"""MobileNetV2 in plain torch.nn (Sandler et al. 2018, https://arxiv.org/abs/1801.04381, table 2)."""

import torch
from torch import nn

# Expansion t, output channels c, repeats n, stride s of the first repeat.
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def divisible(channels, divisor=8):
    """``channels`` rounded to a multiple of ``divisor``, never down by more than a tenth."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _convolution(inputs, outputs, kernel, stride=1, groups=1, activation=True):
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if activation else []))


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without activation; (N, C, H, W) in and out."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.adds_input = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *([_convolution(inputs, hidden, 1)] if expansion != 1 else []),
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            _convolution(hidden, outputs, 1, activation=False),
        )

    def forward(self, x):
        return x + self.layers(x) if self.adds_input else self.layers(x)


class MobileNetV2(nn.Module):
    """(N, 3, H, W) images to (N, classes) logits.

    Without the dropout before the classifier: two models that are compared must not draw different random numbers.
    Initialised close to a linear map, so that tens of steps on little data teach it something and rounding is not
    amplified a thousandfold by one step: convolutions by fan-in, BatchNorm's bias 1.5 before a ReLU6 (0 before the
    last, whose mean the classifier would have to undo), residual branches starting at 0 (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677).
    """

    def __init__(self, classes=10, width=1.0):
        super().__init__()
        channels = divisible(32 * width)
        layers = [_convolution(3, channels, 3, stride=2)]
        for expansion, outputs, repeats, stride in BLOCKS:
            outputs = divisible(outputs * width)
            for repeat in range(repeats):
                layers.append(InvertedResidual(channels, outputs, stride if repeat == 0 else 1, expansion))
                channels = outputs
        last = divisible(1280 * max(1.0, width))
        layers.append(_convolution(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(last, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Sequential) and isinstance(module[-1], nn.ReLU6):
                nn.init.constant_(module[1].bias, 1.5)
            elif isinstance(module, InvertedResidual) and module.adds_input:
                nn.init.zeros_(module.layers[-1][1].weight)
        nn.init.zeros_(self.features[-1][1].bias)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
