"""Images to learn from: scikit-learn's digits, MNIST's IDX files, or a folder for each class."""

import gzip
import struct
from pathlib import Path

import torch
import torch.nn.functional as F

from ..training import Digits

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".tif", ".tiff"}
HELD_OUT_NAMES = ("test", "val", "valid", "validation")
# Side of the images of a folder, whose own sizes may differ.
FOLDER_SIZE = 32


class Images:
    """Images (N, C, size, size) in [0, 1] and labels (N,), some of them held out.

    Args:
        train, held_out: pairs of such images, float32 with C 1 or 3, and labels, int64.
        classes: number of classes.
    """

    def __init__(self, name, train, held_out, classes):
        self.name, self.train, self.held_out, self.classes = name, train, held_out, classes
        if min(len(train[1]), len(held_out[1])) < 1:
            raise ValueError(f"{name}: {len(train[1])} images to train on and {len(held_out[1])} held out are too few")

    @property
    def shape(self):
        """(C, H, W) of an image."""
        return tuple(self.train[0].shape[1:])

    def limited(self, count):
        """Only the first ``count`` images to train on."""
        return Images(self.name, tuple(part[:count] for part in self.train), self.held_out, self.classes)

    def resized(self, size):
        """Images of side ``size``, by bilinear interpolation."""

        def resize(pair):
            images, labels = pair
            if images.shape[2:] == (size, size):
                return pair
            parts = [F.interpolate(part, size=(size, size), mode="bilinear") for part in images.split(4096)]
            return torch.cat(parts), labels

        return Images(self.name, resize(self.train), resize(self.held_out), self.classes)

    def standardised(self):
        """Images of which those to train on have mean 0 and standard deviation 1 over all elements."""
        mean, std = self.train[0].mean(), self.train[0].std().clamp(min=1e-6)
        pairs = [((images - mean) / std, labels) for images, labels in (self.train, self.held_out)]
        return Images(self.name, *pairs, self.classes)

    def coloured(self):
        """Images of three channels: grey ones repeat theirs, without a copy."""
        pairs = [(images.expand(-1, 3, -1, -1), labels) for images, labels in (self.train, self.held_out)]
        return Images(self.name, *pairs, self.classes)

    def only(self, first, last):
        """Images of the classes ``first`` to ``last``, excluding ``last``, labelled from 0."""

        def select(pair):
            images, labels = pair
            chosen = (labels >= first) & (labels < last)
            return images[chosen], labels[chosen] - first

        return Images(self.name, select(self.train), select(self.held_out), last - first)

    def steps(self, batch):
        """Batches of an epoch; what is left over at its end is dropped. Raises ValueError where there are none."""
        if len(self.train[1]) < batch:
            raise ValueError(f"{len(self.train[1])} images to train on are too few for a batch of {batch}")
        return len(self.train[1]) // batch

    def stream(self, batch, seed, first=0):
        """Yield batches for ever, from step ``first`` on; an epoch's order depends on ``seed`` and its number alone."""
        images, labels = self.train
        steps = self.steps(batch)
        epoch, skip = divmod(first, steps)
        while True:
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order = torch.randperm(len(labels), generator=generator)[: steps * batch]
            for indices in order.split(batch)[skip:]:
                yield images[indices], labels[indices]
            epoch, skip = epoch + 1, 0

    @torch.no_grad()
    def accuracy(self, model, batch=256):
        """Share of the held-out images that ``model`` in evaluation mode gets right; not finite counts as wrong."""
        was_training = model.training
        model.eval()
        right = 0
        for images, labels in zip(*(part.split(batch) for part in self.held_out), strict=True):
            logits = model(images)
            right += int(((logits.argmax(1) == labels) & logits.isfinite().all(1)).sum())
        model.train(was_training)
        return right / len(self.held_out[1])


def load(path=None):
    """Images of ``path``, or scikit-learn's digits.

    Args:
        path: None; or a folder with MNIST's files (``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and
            ``t10k-`` in place of ``train-`` for the held-out ones, each also as ``.gz``); or a folder with a folder of
            images for each class, or with two such folders, ``train`` and ``test`` (or ``val``).

    Raises:
        ValueError: what is there cannot be read, with the reason.
        ImportError: the library that reads it is missing, with its name.
    """
    if path is None:
        return _digits()
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder")
    if _idx_file(folder, "train", "images"):
        return _mnist(folder)
    if any(child.is_dir() for child in folder.iterdir()):
        return _folders(folder)
    raise ValueError(f"{path} holds neither train-images-idx3-ubyte[.gz] nor a folder of images for each class")


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ImportError("scikit-learn is missing: pip install scikit-learn, or name images with --data") from missing
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return _split("scikit-learn's digits", images, torch.as_tensor(digits.target), 10, Digits.HELD_OUT)


def _split(name, images, labels, classes, held_out):
    """Hold out the last ``held_out`` of a fixed shuffle."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order].long()
    cut = len(labels) - held_out
    return Images(name, (images[:cut], labels[:cut]), (images[cut:], labels[cut:]), classes)


def _idx_file(folder, part, kind):
    """The path of one of MNIST's files under the names in use; None where there is none."""
    dimensions = 3 if kind == "images" else 1
    for separator in "-.":
        for suffix in ("", ".gz"):
            file = folder / f"{part}-{kind}{separator}idx{dimensions}-ubyte{suffix}"
            if file.is_file():
                return file
    return None


def read_idx(file):
    """The uint8 tensor in an IDX file, gzipped or not (http://yann.lecun.com/exdb/mnist). Raises ValueError."""
    content = Path(file).read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError) as damaged:
        raise ValueError(f"{file} is damaged: {damaged}") from damaged
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an IDX file of unsigned bytes: it starts with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{file} ends within its header")
    sizes = struct.unpack(f">{content[3]}I", content[4:start])
    expected = 1
    for size in sizes:
        expected *= size
    if len(content) - start != expected:
        raise ValueError(f"{file} holds {len(content) - start} bytes, its header says {'×'.join(map(str, sizes))}")
    if expected == 0:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(sizes)


def _idx_pair(folder, part):
    images, labels = _idx_file(folder, part, "images"), _idx_file(folder, part, "labels")
    if images is None or labels is None:
        raise ValueError(f"{folder} lacks {part}-{'images' if images is None else 'labels'}-idx*-ubyte[.gz]")
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.dim() != 3 or classes.dim() != 1 or len(pixels) != len(classes):
        raise ValueError(f"{images} and {labels} hold {tuple(pixels.shape)} and {tuple(classes.shape)}: no N images")
    return pixels.unsqueeze(1).float() / 255, classes.long()


def _mnist(folder):
    train = _idx_pair(folder, "train")
    if not len(train[1]):
        raise ValueError(f"{folder} holds no images")
    classes = int(train[1].max()) + 1
    if _idx_file(folder, "t10k", "images") is None:
        return _split(str(folder), *train, classes, len(train[1]) // 6)
    held_out = _idx_pair(folder, "t10k")
    return Images(str(folder), train, held_out, max(classes, int(held_out[1].max()) + 1))


def _folders(folder):
    held_out = [folder / name for name in HELD_OUT_NAMES if (folder / name).is_dir()]
    if (folder / "train").is_dir() and held_out:
        names = _class_names(folder / "train")
        pairs = [_read_classes(part, names) for part in (folder / "train", held_out[0])]
        return Images(str(folder), *pairs, len(names))
    names = _class_names(folder)
    images, labels = _read_classes(folder, names)
    return _split(str(folder), images, labels, len(names), len(labels) // 6)


def _class_names(folder):
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"{folder} needs a folder for each of two or more classes, found {names}")
    return names


def _read_classes(folder, names):
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as missing:
        raise ImportError("Pillow is missing, which reads images: pip install pillow") from missing
    images, labels = [], []
    for label, name in enumerate(names):
        for file in sorted((folder / name).glob("**/*")):
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                with Image.open(file) as opened:
                    image = opened.convert("RGB").resize((FOLDER_SIZE, FOLDER_SIZE), Image.Resampling.BILINEAR)
            except (UnidentifiedImageError, OSError) as unreadable:
                raise ValueError(f"{file} is not an image that Pillow reads: {unreadable}") from unreadable
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            images.append(pixels.reshape(FOLDER_SIZE, FOLDER_SIZE, 3).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return torch.stack(images).float() / 255, torch.tensor(labels)
