"""Images in files: every layout gives the same pixels and classes; what cannot be is refused."""

import io
import json
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from distill.config import ConfigError
from distill.datasets import listing, pictures
from distill.datasets.config import DataConfig
from distill.datasets.files import ImageFiles
from distill.datasets.images import ImageStream, in_parts, load_images, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 2, 0]
DATA = DataConfig(name="folder", channels=3, size=8, num_classes=3)
NOTES: list[str] = []


def encoded(array, kind="PNG", **settings):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind, **settings)
    return buffer.getvalue()


def opened(path, **settings):
    return ImageFiles(replace(DATA, path=str(path), **settings), NOTES.append)


def pairs(images):
    """(label, bytes of the pixels) of all images, sorted."""
    found = images.read(np.arange(len(images))).transpose(0, 2, 3, 1)
    return sorted(
        (int(label), one.tobytes()) for label, one in zip(images.labels, found, strict=True)
    )


EXPECTED = sorted((label, one.tobytes()) for label, one in zip(LABELS, PIXELS, strict=True))


def class_folders(root, names=("ape", "bee", "cat")):
    root.mkdir()
    for index, (label, one) in enumerate(zip(LABELS, PIXELS, strict=True)):
        (root / names[label]).mkdir(exist_ok=True)
        (root / names[label] / f"{index}.png").write_bytes(encoded(one))
    return root


def imagenet_layout(root):
    root.mkdir()
    class_folders(root / "train", ("n01", "n02", "n03"))
    (root / "val").mkdir()
    (root / "val" / "x.JPEG").write_bytes(b"")
    return root


def edm_zip(root, compression=zipfile.ZIP_STORED):
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        names = [f"00000/img{index:08d}.png" for index in range(6)]
        for name, one in zip(names, PIXELS, strict=True):
            archive.writestr(name, encoded(one))
        archive.writestr(
            "dataset.json", json.dumps({"labels": list(zip(names, LABELS, strict=True))})
        )
    return path


def packed_zip(root):
    return edm_zip(root, zipfile.ZIP_DEFLATED)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tars(root, label=lambda value: (".cls", str(value).encode())):
    root.mkdir()
    for shard in (0, 1):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as archive:
            for index in range(3 * shard, 3 * shard + 3):
                add(archive, f"{index:05d}.png", encoded(PIXELS[index]))
                extension, content = label(LABELS[index])
                add(archive, f"{index:05d}{extension}", content)
    return root


def tars_with_json(root):
    return tars(root, lambda value: (".json", json.dumps({"label": value}).encode()))


def hugging_face(root):
    root.mkdir()
    (root / "data").mkdir()
    images = [{"bytes": encoded(one), "path": None} for one in PIXELS]
    for split, part in (("train", slice(0, 6)), ("test", slice(0, 2))):
        table = pyarrow.table({"image": images[part], "label": LABELS[part]})
        parquet.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def npz(root, save=np.savez, **arrays):
    path = root.with_suffix(".npz")
    save(path, **(arrays or {"images": PIXELS, "labels": np.array(LABELS, np.uint8)}))
    return path


def packed_npz(root):
    return npz(root, np.savez_compressed)


def downsampled_imagenet(root):
    """Rows of planes, classes from 1, in parts, and one for validation."""
    root.mkdir()
    rows = PIXELS.transpose(0, 3, 1, 2).reshape(6, -1)
    for part in (0, 1):
        chosen = slice(3 * part, 3 * part + 3)
        arrays = {"data": rows[chosen], "labels": np.array(LABELS[chosen]) + 1, "mean": rows[0]}
        np.savez(root / f"train_data_batch_{part + 1}.npz", **arrays)
    np.savez(root / "val_data.npz", data=rows[:1], labels=np.array([1]))
    return root


LAYOUTS = [
    class_folders,
    imagenet_layout,
    edm_zip,
    packed_zip,
    tars,
    tars_with_json,
    hugging_face,
    npz,
    packed_npz,
    downsampled_imagenet,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_pixels_and_classes(layout, tmp_path):
    path = layout(tmp_path / "set")
    NOTES.clear()
    assert pairs(opened(path)) == EXPECTED
    assert len(NOTES) == 1 and "reads 6 images once" in NOTES[0]
    assert pairs(opened(path)) == EXPECTED and len(NOTES) == 1  # the manifest is there
    without = opened(path, num_classes=0)
    assert len(without) == 6 and without.labels.tolist() == [-1] * 6


def test_cifar10_from_its_binary_version_and_from_the_npm_package(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    labels = [3, 9, 0, 9]
    binary, package = tmp_path / "bin", tmp_path / "npm"
    binary.mkdir(), package.mkdir()
    for part in (0, 1):
        two = slice(2 * part, 2 * part + 2)
        planes = pixels[two].transpose(0, 3, 1, 2).reshape(2, -1)
        records = np.concatenate([np.array(labels[two], np.uint8)[:, None], planes], axis=1)
        (binary / f"data_batch_{part + 1}.bin").write_bytes(records.tobytes())
        rows = encoded(pixels[two].reshape(2, 1024, 3))
        (package / f"data_batch_{part + 1}.png").write_bytes(rows)
    (package / "train_lables.json").write_text(json.dumps(labels))
    data = {"name": "cifar10", "size": 32, "num_classes": 10}
    for path in (binary, package):
        images = opened(path, **data)
        assert (images.read(np.arange(4)).transpose(0, 2, 3, 1) == pixels).all()
        assert images.labels.tolist() == labels
        assert "cifar10 has 50,000 images, here are 4" in images.notes
    (binary / "data_batch_1.bin").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="not the files of which"):
        opened(binary, **data)


# -----------------------------------------------------------------------------------------------
# Classes: four counts that are not the same


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        ([1, 2, 3, 3, 2, 1], {"num_classes": 3}, [0, 1, 2, 2, 1, 0]),  # can only be from 1
        ([1, 3, 3, 3, 3, 1], {"num_classes": 3}, [0, 2, 2, 2, 2, 0]),
        ([0, 1, 1, 0, 0, 1], {"num_classes": 3}, [0, 1, 1, 0, 0, 1]),  # a subset lacks the last one
        ([2, 3, 3, 3, 3, 2], {"num_classes": 9}, [2, 3, 3, 3, 3, 2]),
        ([1, 2, 2, 2, 2, 1], {"num_classes": 3, "first_label": 0}, [1, 2, 2, 2, 2, 1]),
        ([1, 2, 2, 2, 2, 1], {"num_classes": 3, "first_label": 1}, [0, 1, 1, 1, 1, 0]),
        ([5.0, 0, 1, 2, 3, 4], {"num_classes": 6}, [5, 0, 1, 2, 3, 4]),
        ([[5], [0], [1], [2], [3], [4]], {"num_classes": 6}, [5, 0, 1, 2, 3, 4]),  # Keras
    ],
)
def test_labels_are_classes(labels, settings, expected, tmp_path):
    path = npz(tmp_path / "set", images=PIXELS, labels=np.array(labels))
    assert opened(path, **settings).labels.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "classes", "match"),
    [
        (
            [1, 2, 3, 3, 2, 1],
            4,
            r"1 \.\. 3 .*count from 1, set data\.num_classes=3; .*first_label=0",
        ),
        ([0, 1, 2, 3, 4, 5], 5, r"0 \.\. 5, data\.num_classes=5 has 0 \.\. 4; set .*num_classes=6"),
        ([-1, 1, 2, 3, 4, 5], 6, r"labels are -1|no classes"),
        ([1.5, 1, 2, 3, 4, 5], 6, "`labels` must be 6 whole numbers"),
        (
            np.eye(6, dtype=int),
            6,
            r"set\.npz: `labels` must be.*one-hot rows become them by labels\.argmax\(1\)",
        ),
        (["a"] * 6, 6, "`labels` must be 6 whole numbers"),
        ([1, 2], 2, r"`labels` must be 6 whole numbers \[N\].*int64 \[2\]"),
    ],
)
def test_labels_that_can_not_be_classes_are_refused(labels, classes, match, tmp_path):
    path = npz(tmp_path / "set", images=PIXELS, labels=np.array(labels))
    with pytest.raises(ConfigError, match=match):
        opened(path, num_classes=classes)


def test_four_channels_are_none_that_a_picture_has(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.channels=4: .* grey, 1, or RGB, 3"):
        opened(npz(tmp_path / "set"), channels=4)


def test_images_without_classes_are_no_class_and_no_table_of_them(tmp_path):
    path = npz(tmp_path / "set", images=PIXELS)
    with pytest.raises(ConfigError, match=r"have no classes; set data\.num_classes=0"):
        opened(path, num_classes=1)
    assert opened(path, num_classes=0).labels.tolist() == [-1] * 6


def test_the_downsampled_imagenet_counts_from_one_whatever_subset_it_is(tmp_path):
    rows = PIXELS.reshape(6, -1)
    path = npz(tmp_path / "set", data=rows, labels=np.array([1, 2, 2, 5, 5, 5]))
    images = opened(path, num_classes=1000)
    assert images.labels.tolist() == [0, 1, 1, 4, 4, 4]
    assert any("count from 1: 1 is taken off" in note for note in images.notes)


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (("0", "2", "10"), 3, [0, 1, 2]),  # as numbers, not as text
        (("0", "2", "10"), 11, [0, 2, 10]),
        (("1", "2", "3"), 3, [0, 1, 2]),
        (("1", "2", "9"), 9, [0, 1, 8]),
    ],
)
def test_folders_that_are_called_by_numbers(names, classes, expected, tmp_path):
    images = opened(class_folders(tmp_path / "set", names), num_classes=classes)
    assert sorted(set(images.labels.tolist())) == expected
    by_label = {label: one for label, one in pairs(images)}
    assert by_label[expected[0]] in {one.tobytes() for one in PIXELS[[1, 5]]}


def test_an_empty_class_folder_stays_a_class(tmp_path):
    root = class_folders(tmp_path / "set", ("ape", "cat", "dog"))
    (root / "bee").mkdir()
    images = opened(root, num_classes=4)
    assert sorted(set(images.labels.tolist())) == [0, 2, 3]
    assert "1 of 4 classes have no image" in images.notes
    with pytest.raises(ConfigError, match=r"has 4 class folders \(ape \.\. dog\).*num_classes=4"):
        opened(root, num_classes=3)


# -----------------------------------------------------------------------------------------------
# What is in a folder


def test_flat_pictures_and_other_files(tmp_path):
    for index, kind in enumerate(("PNG", "WEBP")):
        settings = {"lossless": True} if kind == "WEBP" else {}
        (tmp_path / f"{index}.{kind.lower()}").write_bytes(encoded(PIXELS[index], kind, **settings))
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    images = opened(tmp_path, num_classes=0)
    assert (images.read(np.arange(2)).transpose(0, 2, 3, 1) == PIXELS[:2]).all()
    assert "1 other files are left out, such as readme.txt" in images.notes
    with pytest.raises(ConfigError, match=r"have no classes; set data\.num_classes=0"):
        opened(tmp_path)


def mixed_modes(root):
    root.mkdir()
    grey, alpha = PIXELS[0, :, :, 0], np.full((8, 8, 4), (10, 20, 30, 0), np.uint8)
    Image.fromarray(PIXELS[1]).save(root / "a.png")
    Image.fromarray(grey).save(root / "b.png")
    Image.fromarray(alpha).save(root / "c.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(root / "d.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "e.png")
    return root


def test_other_modes_are_converted_left_out_or_refused_as_set(tmp_path):
    root = mixed_modes(tmp_path / "set")
    images = opened(root, num_classes=0)
    found = images.read(np.arange(5))
    assert (found[0].transpose(1, 2, 0) == PIXELS[1]).all()
    assert (found[[1, 4]] == PIXELS[0, :, :, 0]).all()  # 16 bits by their upper 8
    assert (found[2] == 255).all()  # transparent is white
    red, green, blue = found[3].reshape(3, -1).mean(axis=1)
    assert red > 200 and green < 60 and blue < 60
    said = "4 images are not RGB (1 L, 1 RGBA, 1 CMYK, 1 I;16) and converted"
    assert said in images.notes
    assert len(opened(root, num_classes=0, other_modes="skip")) == 1
    with pytest.raises(ConfigError, match=r"4 images are not RGB.*other_modes=convert, or skip"):
        opened(root, num_classes=0, other_modes="refuse")


def test_broken_files_are_refused_or_left_out_and_named(tmp_path):
    root = class_folders(tmp_path / "set")
    good = (root / "ape" / "1.png").read_bytes()
    (root / "ape" / "cut.png").write_bytes(good[:100])
    (root / "bee" / "text.jpg").write_text("no picture")
    (root / "cat" / "empty.png").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"3 of 9 images are broken \(.*cut\.png.*data\.broken=skip"
    ):
        opened(root)
    images = opened(root, broken="skip")
    assert pairs(images) == EXPECTED
    assert any("3 of 9 images are broken and left out" in note for note in images.notes)


def test_a_folder_of_mixed_sizes_asks_for_a_crop(tmp_path):
    for index, (width, height) in enumerate([(8, 8), (40, 20), (10, 30)]):
        Image.new("RGB", (width, height), (9, 9, 9)).save(tmp_path / f"{index}.png")
    with pytest.raises(ConfigError, match=r"2 of another size; set data\.crop=adm"):
        opened(tmp_path, num_classes=0)
    images = opened(tmp_path, num_classes=0, crop="adm")
    assert (images.read(np.arange(3)) == 9).all()
    enlarged = opened(tmp_path, num_classes=0, crop="adm", size=16)
    assert "2 images are smaller than data.size=16, enlarged" in enlarged.notes
    with pytest.raises(ConfigError, match=r"middle 140x140.*8 pixels"):
        opened(tmp_path, num_classes=0, crop="celeba")


def test_a_black_border_and_a_size_that_does_not_fit(tmp_path):
    path = npz(tmp_path / "set")
    wide = opened(path, size=10).read(np.arange(1))
    assert (wide[0, :, 1:-1, 1:-1].transpose(1, 2, 0) == PIXELS[0]).all()
    assert wide[:, :, 0].max() == 0
    for size in (7, 9, 6):
        with pytest.raises(ConfigError, match=rf"data\.size={size} .*has 8x8"):
            opened(path, size=size)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"pictures": PIXELS}, "cannot be read as an .npz with `images`"),
        ({"images": np.array([{}], dtype=object)}, r"they are object \[1\]"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, r"uint8 \[N, H, W, C\].*float32"),
        ({"images": np.zeros((2, 4, 4, 5), np.uint8)}, r"uint8 \[N, H, W, C\].*\[2, 4, 4, 5\]"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, r"uint8 \[0, 4, 4, 3\]"),
        ({"images": np.asfortranarray(PIXELS)}, "must be uint8"),
    ],
)
def test_an_npz_of_another_kind_is_refused(arrays, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        opened(npz(tmp_path / "set", **arrays))


def test_planes_grey_and_four_channels_of_an_npz(tmp_path):
    planes = npz(tmp_path / "planes", images=PIXELS.transpose(0, 3, 1, 2).copy())
    assert (opened(planes, num_classes=0).read(np.arange(6)).transpose(0, 2, 3, 1) == PIXELS).all()
    grey = npz(tmp_path / "grey", images=PIXELS[..., 0])
    images = opened(grey, num_classes=0, channels=1)
    assert (images.read(np.arange(6))[:, 0] == PIXELS[..., 0]).all()
    alpha = npz(tmp_path / "alpha", images=np.zeros((2, 8, 8, 4), np.uint8))
    assert (opened(alpha, num_classes=0).read(np.arange(2)) == 255).all()


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    return path


def test_files_that_are_cut_or_hold_no_images(tmp_path):
    root = tars(tmp_path / "tars")
    # A tar that ends where a member does, and in the middle of one
    for keep in (1024, 700):
        cut(root / "00001.tar", keep)
        with pytest.raises(ConfigError, match=r"00001\.tar is cut short|cut or damaged"):
            opened(root)
    for path, keep in ((edm_zip(tmp_path / "z"), 300), (npz(tmp_path / "n"), 100)):
        with pytest.raises(ConfigError, match=r"cut"):
            opened(cut(path, keep))
    table = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), table)
    with pytest.raises(ConfigError, match=r"column must hold images.*text, label none does"):
        opened(table)
    with pytest.raises(ConfigError, match="cut"):
        opened(cut(table, 50))
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, match in (
        (empty, "holds no image"),
        (tmp_path / "nowhere", "is not there; set it to a folder of pictures"),
        (tmp_path, r"holds .* npz and .* tar"),
    ):
        with pytest.raises(ConfigError, match=match):
            opened(path)


def test_labels_that_a_part_of_a_tar_or_zip_lacks(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", encoded(PIXELS[0]))
        add(archive, "a.cls", b"1")
        add(archive, "b.png", encoded(PIXELS[1]))
    with pytest.raises(ConfigError, match="1 images have no label"):
        opened(path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded(PIXELS[0]))
        archive.writestr("dataset.json", json.dumps({"labels": [["b.png", 0]]}))
    with pytest.raises(ConfigError, match=r"dataset\.json has no label of a\.png"):
        opened(tmp_path / "a.zip")


# -----------------------------------------------------------------------------------------------
# The manifest


def test_a_file_that_changes_later_is_not_trained_on(tmp_path):
    root = class_folders(tmp_path / "set")
    images = opened(root)
    (root / "ape" / "1.png").write_bytes(encoded(PIXELS[3]))
    with pytest.raises(ConfigError, match=r"1\.png has changed since the manifest .*set\.manifest"):
        images.read(np.arange(6))
    (root / "ape" / "1.png").unlink()
    with pytest.raises(ConfigError, match="has not the files of which"):
        opened(root)


def test_a_manifest_elsewhere_and_one_that_is_damaged(tmp_path):
    path, place = npz(tmp_path / "set"), tmp_path / "elsewhere"
    assert pairs(opened(path, manifest=str(place))) == EXPECTED
    assert not (tmp_path / "set.npz.manifest").exists()
    about = json.loads((place / "manifest.json").read_text())
    assert (about["num_images"], about["modes"], about["sizes"]) == (6, {"RGB": 6}, {"8x8": 6})
    (place / "entries.npz").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"entries\.npz is damaged; delete"):
        opened(path, manifest=str(place))


def test_the_stream_and_the_reference_read_files_in_workers(tmp_path):
    data = replace(DATA, path=str(class_folders(tmp_path / "set")))
    images = open_images(data)
    for workers in (0, 2):
        stream = ImageStream(images, 0, 6, 0, 1, 0.0, workers=workers)
        batch = stream.read(3)
        shown = ((batch.states[:, 0, 1] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        found = zip(batch.condition.tolist(), shown, strict=True)
        assert sorted((label, one.tobytes()) for label, one in found) == EXPECTED
    parts = torch.cat(list(in_parts(data, images)))
    assert torch.equal(parts, torch.from_numpy(images.read(np.arange(6))))
    assert torch.equal(load_images(data)[0], parts.float() / 127.5 - 1)


# -----------------------------------------------------------------------------------------------
# Crops


def adm_center_crop(picture, size):
    """`center_crop_arr` of ADM's image_datasets.py, as it is published."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(500, 375), (64, 64), (333, 1000), (20, 31), (129, 128)])
def test_adm_crops_as_adm_does(shape):
    array = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    ours = pictures.pixels_of(picture, 3, 64, "adm").transpose(1, 2, 0)
    assert (ours == adm_center_crop(picture, 64)).all()


def test_celeba_takes_the_middle_140():
    array = np.zeros((218, 178, 3), np.uint8)
    array[39:179, 19:159] = 200
    assert (pictures.pixels_of(Image.fromarray(array), 3, 64, "celeba") == 200).all()
    array[39:179, 18:19] = 255  # one column further left is not seen
    assert (pictures.pixels_of(Image.fromarray(array), 3, 64, "celeba") == 200).all()


def test_hidden_files_of_a_mac_are_no_pictures(tmp_path):
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.png").write_bytes(b"")
    (tmp_path / "a.png").write_bytes(encoded(PIXELS[0]))
    assert listing.survey(tmp_path).files == ("a.png",)
