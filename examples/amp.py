"""Mixed precision: convert first, then train under torch.amp as before."""

import torch
import torch.nn.functional as F
from data import digits, network

import normfused


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    model = normfused.convert(network()).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    losses = []
    for images, labels in digits():
        with torch.autocast(device, dtype):
            # Activations are 16-bit; parameters, statistics and running statistics stay float32.
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    print(f"{dtype}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
