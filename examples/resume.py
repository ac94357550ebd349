"""Resume, converted, what an unconverted model began, from its checkpoint, and give the checkpoint back."""

import tempfile

import torch
import torch.nn.functional as F
from data import digits, network

import normfused


def train(model, optimizer, batches):
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new(convert):
    model = normfused.convert(network()) if convert else network()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def save(path, model, optimizer):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def load(path, model, optimizer):
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])


def main():
    """Losses of a training that is converted halfway and back, and of one that never is."""
    batches = list(digits())
    first, second, third = batches[:4], batches[4:8], batches[8:]
    plain = new(convert=False)
    expected = train(*plain, batches)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/checkpoint.pt"
        losses = []
        for part, convert in ((first, False), (second, True), (third, False)):
            model, optimizer = new(convert)
            if losses:
                load(path, model, optimizer)
            losses += train(model, optimizer, part)
            save(path, model, optimizer)
    print(f"converted for steps 4 to 7: last loss {losses[-1]:.4f}; never converted: {expected[-1]:.4f}")
    return losses, expected


if __name__ == "__main__":
    main()
