"""Lightning: a converted model in a LightningModule, with synchronised statistics where there are several devices.

Trainer(sync_batchnorm=True) calls torch's converter, which knows no activations and is stopped by an error; a LayerSync
plugin calls ours in its place.
"""

import lightning
import torch
import torch.nn.functional as F
from data import digits, network
from lightning.pytorch.plugins import LayerSync
from torch.utils.data import DataLoader

import normfused


class FusedLayerSync(LayerSync):
    def apply(self, model):
        return normfused.convert_sync_batchnorm(model)

    def revert(self, model):
        return model  # Evaluation does not synchronise; normfused.revert(model) gives torch.nn's layers back.


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = normfused.convert(network())
        self.losses = []

    def training_step(self, batch, batch_index):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main():
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        plugins=[FusedLayerSync()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(list(digits()), batch_size=None))
    print(f"Lightning: loss {module.losses[0]:.3f} to {module.losses[-1]:.3f}")
    return module.losses


if __name__ == "__main__":
    main()
