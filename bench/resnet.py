"""ResNet-50 in plain torch.nn (He et al. 2015, https://arxiv.org/abs/1512.03385, table 1; the stride on the 3x3, as in
torchvision's)."""

import torch
from torch import nn

# Channels of the 3x3 and number of blocks of each stage.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
EXPANSION = 4


class Bottleneck(nn.Module):
    """Reduce by 1x1, filter by 3x3, expand by 1x1, add the input; (N, C, H, W) in and out."""

    def __init__(self, inputs, channels, stride):
        super().__init__()
        outputs = channels * EXPANSION
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            *(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
            nn.Conv2d(channels, outputs, 1, bias=False),
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn(self.layers(x))
        out += self.downsample(x)
        return self.relu(out)


class ResNet50(nn.Module):
    """(N, 3, H, W) images to (N, classes) logits."""

    def __init__(self, classes=1000):
        super().__init__()
        stem = nn.Sequential(
            *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, inputs = [], 64
        for number, (channels, repeats) in enumerate(STAGES):
            for repeat in range(repeats):
                blocks.append(Bottleneck(inputs, channels, 2 if number > 0 and repeat == 0 else 1))
                inputs = channels * EXPANSION
        self.features = nn.Sequential(stem, *blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
