"""Data and a model for the examples: handwritten digits, and a small network of torch.nn's layers."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def digits(batch=64, steps=12):
    """Yield ``steps`` batches of images ``(batch, 1, 8, 8)`` and labels ``(batch,)``."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for indices in order.split(batch)[:steps]:
        yield images[indices], labels[indices]


def block(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)
    )


def network():
    """(N, 1, 8, 8) to (N, 10)."""
    torch.manual_seed(0)
    return nn.Sequential(block(1, 16), block(16, 32, 2), block(32, 32), nn.Flatten(), nn.Linear(32 * 16, 10))
