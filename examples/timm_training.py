"""timm: a converted model with timm's optimizer, schedule, loss and moving average, as its train.py has them."""

import timm
import torch
from data import digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import normfused


def main():
    torch.manual_seed(0)
    model = normfused.convert(timm.create_model("resnet10t", in_chans=1, num_classes=10))
    averaged = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = CosineLRScheduler(optimizer, t_initial=12, t_in_epochs=False)
    loss_function = LabelSmoothingCrossEntropy()
    losses = []
    for step, (images, labels) in enumerate(digits(batch=32)):
        loss = loss_function(model(torch.nn.functional.interpolate(images, size=32)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update(model, step)
        schedule.step_update(step)
        losses.append(loss.item())
    print(f"timm: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses, normfused.revert(averaged.module)


if __name__ == "__main__":
    main()
