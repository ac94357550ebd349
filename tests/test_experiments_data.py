"""Images that ``bench experiment --data`` reads."""

import gzip
import struct
import sys

import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.experiments import data
from bench.training import Digits


def idx(tensor, kind=8):
    """A uint8 tensor as an IDX file."""
    return struct.pack(f">BBBB{tensor.dim()}I", 0, 0, kind, tensor.dim(), *tensor.shape) + bytes(
        tensor.flatten().tolist()
    )


def write_mnist(folder, counts=(24, 6), separator="-", compress=False):
    """MNIST's files with random images; returns {"train", "t10k"}: (images, labels)."""
    generator, written = torch.Generator().manual_seed(0), {}
    for part, count in zip(("train", "t10k"), counts, strict=True):
        images = torch.randint(256, (count, 5, 5), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 3
        written[part] = images, labels
        for kind, tensor in (("images", images), ("labels", labels)):
            name = f"{part}-{kind}{separator}idx{tensor.dim()}-ubyte" + (".gz" if compress else "")
            (folder / name).write_bytes(gzip.compress(idx(tensor)) if compress else idx(tensor))
    return written


def write_folders(folder, classes=("cat", "dog"), count=6, suffix=".png"):
    """A folder of images of one grey each, uneven in size, for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            grey = 40 * label + number
            Image.new("L", (4 + number, 7), grey).save(folder / name / f"{number}{suffix}")


def test_the_digits_are_those_of_the_demo():
    images = data.load()
    digits = Digits(8)
    assert images.train[0].shape == (1500, 1, 8, 8)
    assert torch.equal(torch.cat([images.train[1], images.held_out[1]]), digits._labels)
    assert images.train[0].min() == 0
    assert images.train[0].max() == 1
    standardised = images.standardised().train[0]
    assert standardised.mean().abs() < 1e-5
    assert abs(standardised.std() - 1) < 1e-5


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("separator", "-.")
def test_idx_files(separator, compress, tmp_path):
    written = write_mnist(tmp_path, separator=separator, compress=compress)
    images = data.load(tmp_path)
    assert images.classes == 3
    for part, (pixels, labels) in (("train", images.train), ("t10k", images.held_out)):
        assert torch.equal((pixels * 255).round().squeeze(1).to(torch.uint8), written[part][0])
        assert torch.equal(labels, written[part][1].long())


def test_some_are_held_out_where_no_file_has_them(tmp_path):
    write_mnist(tmp_path)
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    images = data.load(tmp_path)
    assert (len(images.train[1]), len(images.held_out[1])) == (20, 4)


def rewrite(name, change):
    def damage(folder):
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(IMAGES, lambda content: b"PNG" + content), "is not an IDX file of unsigned bytes"),
        (rewrite(IMAGES, lambda content: content[:2] + b"\x0d" + content[3:]), "is not an IDX file of unsigned bytes"),
        (rewrite(IMAGES, lambda content: content[:-1]), r"holds 599 bytes, its header says 24×5×5"),
        (rewrite(IMAGES, lambda content: content[:9]), "ends within its header"),
        (rewrite(IMAGES, lambda content: b""), "is not an IDX file"),
        (rewrite(IMAGES, lambda content: gzip.compress(content)[:-20]), "is damaged"),
        (rewrite(LABELS, lambda content: idx(torch.zeros(23, dtype=torch.uint8))), "no N images"),
        (lambda folder: (folder / LABELS).unlink(), "lacks train-labels-idx"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "lacks t10k-labels-idx"),
    ],
)
def test_damaged_idx_files(damage, message, tmp_path):
    write_mnist(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


def test_empty_idx_files(tmp_path):
    write_mnist(tmp_path, (0, 0))
    with pytest.raises(ValueError, match="holds no images"):
        data.load(tmp_path)


def test_a_folder_for_each_class(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    images = data.load(tmp_path)
    assert images.shape == (3, data.FOLDER_SIZE, data.FOLDER_SIZE)
    assert (len(images.train[1]), len(images.held_out[1]), images.classes) == (10, 2, 2)
    for pixels, labels in (images.train, images.held_out):
        greys = (pixels * 255).round()
        assert (greys == greys[:, :1, :1, :1]).all()
        assert torch.equal((greys[:, 0, 0, 0] >= 40).long(), labels)


def test_folders_of_train_and_test(tmp_path):
    write_folders(tmp_path / "train", count=4)
    write_folders(tmp_path / "val", count=2, suffix=".jpg")
    images = data.load(tmp_path)
    assert (len(images.train[1]), len(images.held_out[1])) == (8, 4)
    assert images.held_out[1].tolist() == [0, 0, 1, 1]


def test_folders_that_hold_no_images(tmp_path):
    with pytest.raises(ValueError, match="holds neither train-images-idx3-ubyte"):
        data.load(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"two or more classes, found \['cat'\]"):
        data.load(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        data.load(tmp_path)
    (tmp_path / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png is not an image that Pillow reads"):
        data.load(tmp_path)


@pytest.mark.parametrize(("library", "message"), [("PIL", "pip install pillow"), ("sklearn.datasets", "scikit-learn")])
def test_a_library_that_is_missing(library, message, tmp_path, monkeypatch, capsys):
    write_folders(tmp_path / "images")
    monkeypatch.setitem(sys.modules, library, None)
    source = ["--data", str(tmp_path / "images")] if library == "PIL" else []
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "family", "--out", str(tmp_path / "out"), *source])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("write", [write_mnist, lambda folder: write_folders(folder, count=24)], ids=["idx", "folders"])
def test_an_experiment_on_images_of_ones_own(write, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write(folder)
    small = ["--seeds", "1", "--epochs", "1", "--width", "4", "--size", "6", "--batch", "5"]
    arguments = ["experiment", "inference", *small, "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert str(folder) in (tmp_path / "out" / "inference.json").read_text()


def test_batches_depend_on_seed_and_step_alone():
    images = data.load().limited(50)
    stream = images.stream(8, seed=3)
    batches = [next(stream) for _ in range(3 * images.steps(8))]
    for first in (0, 1, 5, 6, 13):
        later = images.stream(8, 3, first)
        for x, y in batches[first:]:
            again = next(later)
            assert torch.equal(x, again[0])
            assert torch.equal(y, again[1])
    labels = [torch.cat([y for _, y in batches[at : at + 6]]) for at in (0, 6)]
    assert not torch.equal(*labels)
    assert not torch.equal(next(images.stream(8, 4))[0], batches[0][0])


def test_classes_are_selected_and_numbered_again():
    images = data.load()
    upper = images.only(5, 10)
    assert upper.classes == 5
    for whole, part in ((images.train, upper.train), (images.held_out, upper.held_out)):
        chosen = whole[1] >= 5
        assert torch.equal(part[1], whole[1][chosen] - 5)
        assert torch.equal(part[0], whole[0][chosen])
