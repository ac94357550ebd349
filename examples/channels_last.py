"""channels_last: the fused layers read and write it as it is, and keep it."""

import torch
import torch.nn.functional as F
from data import digits, network

import normfused


def main():
    model = normfused.convert(network()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for images, labels in digits():
        images = images.to(memory_format=torch.channels_last)
        features = model[:3](images)
        assert features.is_contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model[3:](features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"channels_last: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
