"""DistributedDataParallel with synchronised statistics: convert, convert_sync_batchnorm, wrap.

One process for each GPU (NCCL), or two on the CPU (gloo).
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from data import digits, network
from torch.nn.parallel import DistributedDataParallel

import normfused


def train(rank, world_size, store):
    on_gpu = torch.cuda.device_count() >= world_size
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=rank, world_size=world_size)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    model = normfused.convert_sync_batchnorm(normfused.convert(network())).to(device)
    model = DistributedDataParallel(model, device_ids=[rank] if on_gpu else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in digits():
        # Each rank takes its part of the batch; statistics are those of the whole.
        images, labels = (t.chunk(world_size)[rank].to(device) for t in (images, labels))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dist.all_reduce(loss := loss.detach())
    if rank == 0:
        print(f"{world_size} ranks: last loss {loss.item() / world_size:.3f}")
        torch.save(model.module.state_dict(), store.removeprefix("file://") + ".pt")
    dist.destroy_process_group()


def main():
    world_size = max(2, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as directory:
        store = f"file://{directory}/store"
        mp.spawn(train, (world_size, store), world_size)
        # The state_dict is that of the model before convert.
        model = network()
        model.load_state_dict(torch.load(f"{directory}/store.pt", weights_only=True, map_location="cpu"))
    return model


if __name__ == "__main__":
    main()
