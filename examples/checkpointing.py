"""Less activation memory: three ways, the same losses, one update of the running statistics for each step."""

import functools

import torch
import torch.nn.functional as F
from data import digits, network
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import normfused

# What torch.utils.checkpoint saves although it is inside: convolutions. Norms and activations are computed again.
SELECTIVE = functools.partial(create_selective_checkpoint_contexts, normfused.checkpoint_policy)


def plain(model, images):
    return model(images)


def recompute(model, images):
    """Only the fused layers' outputs are computed again: cheap, and no change to the model."""
    with normfused.recompute_activations():
        return model(images)


def whole_blocks(model, images, **kwargs):
    """Everything inside the blocks is computed again, convolutions too."""
    return model[2:](checkpoint(model[:2], images, use_reentrant=False, **kwargs))


def selective(model, images):
    return whole_blocks(model, images, context_fn=SELECTIVE)


def train(forward):
    model = normfused.convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for images, labels in digits():
        loss = F.cross_entropy(forward(model, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model[0][1].running_var


def main():
    results = {forward.__name__: train(forward) for forward in (plain, recompute, whole_blocks, selective)}
    for name, (losses, _) in results.items():
        print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return results


if __name__ == "__main__":
    main()
