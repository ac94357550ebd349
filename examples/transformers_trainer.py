"""transformers: a converted model in its Trainer; saved and loaded as the unconverted one."""

import tempfile

import torch
from data import digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import normfused


def new():
    torch.manual_seed(0)
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **shape))


def dataset():
    for images, labels in digits(batch=32):
        for image, label in zip(torch.nn.functional.interpolate(images, size=32), labels, strict=True):
            yield {"pixel_values": image, "labels": label}


def main():
    model = normfused.convert(new())
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=12,
            per_device_train_batch_size=32,
            learning_rate=2e-2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=list(dataset()))
        trainer.train()
        trainer.save_model(directory)
        plain = ResNetForImageClassification.from_pretrained(directory)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"transformers: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses, model, plain


if __name__ == "__main__":
    main()
