"""Real images: range, shape, and a sentence when files are missing or cut."""

import gzip

import numpy as np
import pytest
import torch

from distill.config import ConfigError
from distill.datasets import sets
from distill.datasets.config import DataConfig
from distill.datasets.images import load_images

FASHION = DataConfig(name="fashion", channels=1, size=32, num_classes=10)


def write_fashion(folder, count, monkeypatch):
    """A folder that looks like Fashion-MNIST with `count` images."""
    monkeypatch.setattr(sets, "FASHION_COUNT", count)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(header + array.tobytes())
    return pixels, labels


def test_digits_are_all_there_in_range():
    images, labels = load_images(DataConfig(name="digits", channels=1, size=8, num_classes=10))
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_unconditional_labels_are_none():
    _, labels = load_images(DataConfig(name="digits", channels=1, size=8))
    assert (labels == -1).all()


def test_fashion_is_read_and_padded_with_black(tmp_path, monkeypatch):
    pixels, labels = write_fashion(tmp_path, 20, monkeypatch)
    data = DataConfig(name="fashion", path=str(tmp_path), channels=1, size=32, num_classes=10)
    images, found = load_images(data)
    assert images.shape == (20, 1, 32, 32)
    back = ((images[:, 0, 2:-2, 2:-2] + 1) * 127.5).round().byte().numpy()
    assert (back == pixels).all()
    assert (images[:, :, :2] == -1).all()
    assert found.tolist() == labels.tolist()


def test_absent_files_name_the_package(tmp_path):
    data = DataConfig(name="fashion", path=str(tmp_path), channels=1, size=32, num_classes=10)
    with pytest.raises(ConfigError, match=r"apt-get install dataset-fashion-mnist.*data\.path"):
        load_images(data)


def test_cut_files_are_refused(tmp_path, monkeypatch):
    write_fashion(tmp_path, 20, monkeypatch)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    data = DataConfig(name="fashion", path=str(tmp_path), channels=1, size=32, num_classes=10)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="cut or damaged"):
        load_images(data)
    path.write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match="cut or damaged"):
        load_images(data)
    with gzip.open(path, "wb") as file:
        file.write(gzip.decompress(content)[:-5])
    with pytest.raises(ConfigError, match=r"15691 bytes, expected 15696"):
        load_images(data)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"channels": 3}, "data.channels=3, but digits has 1"),
        ({"size": 7}, "data.size=7 must be 8"),
        ({"size": 9}, "data.size=9 must be 8"),
        ({"num_classes": 12}, "data.num_classes=12 must be 0 or 10"),
    ],
)
def test_settings_that_do_not_describe_the_images(change, match):
    settings = {"name": "digits", "channels": 1, "size": 8, "num_classes": 10} | change
    with pytest.raises(ConfigError, match=match):
        load_images(DataConfig(**settings))


def test_latents_have_no_images():
    data = DataConfig(name="latents", channels=4, size=32, num_classes=1000)
    with pytest.raises(ConfigError, match="no images to train a teacher on"):
        load_images(data)
    with pytest.raises(ConfigError, match=r"data.channels=3: grey and RGB images.*data.name=npz"):
        DataConfig(name="latents", channels=3, size=32)


@pytest.mark.skipif(
    not sets.FASHION_FOLDER.exists(), reason="the package dataset-fashion-mnist is not here"
)
def test_the_debian_package():
    images, labels = load_images(FASHION)
    assert images.shape == (60_000, 1, 32, 32)
    assert torch.bincount(labels).tolist() == [6000] * 10
