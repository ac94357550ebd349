"""An exponential moving average of a converted model (torch.optim.swa_utils), its running statistics included."""

import torch
import torch.nn.functional as F
from data import digits, network
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normfused


def main():
    model = normfused.convert(network())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in digits():
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    # The average has running statistics of no training of its own: one pass over the data gives it them.
    update_bn(digits(), averaged)
    averaged.eval()
    right = torch.cat([averaged(images).argmax(1) == labels for images, labels in digits()]).float().mean().item()
    print(f"averaged model: {right:.1%} right")
    # And back to torch.nn, for whoever has no normfused.
    return right, normfused.revert(averaged.module)


if __name__ == "__main__":
    main()
