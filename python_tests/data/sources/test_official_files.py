"""Tests of files of CIFAR, MNIST, Fashion-MNIST and SVHN: layouts, content, and errors of damaged files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from fedkern.data import load
from fedkern.data.sources.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_COARSE_CLASSES
from fedkern.errors import UserError

PIXELS = 3072


def records(count: int, label_counts: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, len(label_counts) + PIXELS), dtype=np.uint8)
    for column, classes in enumerate(label_counts):
        rows[:, column] = (np.arange(count) * (column + 1) + seed) % classes
    return rows


def write_cifar10(folder: Path, compressed: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    content = {f"data_batch_{i}.bin": records(12, (10,), i) for i in range(1, 6)}
    content["test_batch.bin"] = records(9, (10,), 6)
    for name, rows in content.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(rows.tobytes()))
        else:
            rows.tofile(folder / name)
    return content


@pytest.mark.parametrize("layout", ["", "cifar10", "cifar-10-batches-bin"])
@pytest.mark.parametrize("compressed", [False, True])
def test_cifar10(tmp_path: Path, layout: str, compressed: bool) -> None:
    content = write_cifar10(tmp_path / layout, compressed)
    data = load("cifar10", root=tmp_path, clients=4, partition="iid")
    assert data.form.shape == (3, 32, 32)
    assert data.classes == CIFAR10_CLASSES
    assert data.form.augment == "crop-flip"
    assert sum(data.client_sizes) + len(data.validation) == 60
    train = np.concatenate([content[f"data_batch_{i}.bin"] for i in range(1, 6)])
    for split in (*data.clients, data.validation):
        rows = [int(name.removeprefix("train/")) for name in split.ids]
        np.testing.assert_array_equal(split.labels.numpy(), train[rows, 0])
        np.testing.assert_array_equal(split.images.numpy().reshape(len(rows), -1), train[rows, 1:])
    np.testing.assert_array_equal(data.tests[""].labels.numpy(), content["test_batch.bin"][:, 0])


@pytest.mark.parametrize(("labels", "column", "classes"), [("fine", 1, 100), ("coarse", 0, 20)])
def test_cifar100(tmp_path: Path, labels: str, column: int, classes: int) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    train, test = records(40, (20, 100), 1), records(8, (20, 100), 2)
    train.tofile(folder / "train.bin")
    test.tofile(folder / "test.bin")
    data = load("cifar100", root=tmp_path, clients=3, partition="iid", options={"labels": labels})
    assert len(data.classes) == classes
    assert data.statistics.counts.shape == (3, classes)
    np.testing.assert_array_equal(data.tests[""].labels.numpy(), test[:, column])
    np.testing.assert_array_equal(data.tests[""].images.numpy().reshape(8, -1), test[:, 2:])


def test_class_names() -> None:
    assert len(set(CIFAR100_CLASSES)) == 100
    assert len(set(CIFAR100_COARSE_CLASSES)) == 20
    assert list(CIFAR100_CLASSES) == sorted(CIFAR100_CLASSES)


def test_missing_batch(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3.bin.*is missing"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("data_batch_2.bin", lambda raw: raw[:-1], rf"holds {12 * 3073 - 1} bytes.*records of 3073 bytes"),
    ("test_batch.bin", lambda raw: b"", "holds 0 bytes"),
    ("data_batch_1.bin", lambda raw: bytes([77]) + raw[1:], "holds label 77, expected 0 to 9"),
])  # fmt: skip
def test_a_damaged_batch_is_named_with_its_damage(tmp_path: Path, name: str, change, words: str) -> None:
    write_cifar10(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match=f"{name} {words}"):
        load("cifar10", root=tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file data_batch_1.bin.*DIR/cifar-10-batches-bin"):
        load("cifar10", root=tmp_path)


# -- idx ---------------------------------------------------------------------------------------------------------------


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("layout", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("compressed", [False, True])
def test_layouts_and_content(tmp_path: Path, write_idx, layout: str, compressed: bool) -> None:
    content = write_idx(tmp_path / layout, compressed=compressed)
    data = load("mnist", root=tmp_path, clients=3, partition="iid")
    assert data.form.shape == (1, 28, 28)
    assert data.classes == tuple("0123456789")
    assert sum(data.client_sizes) == 100
    assert len(data.validation) == 20
    np.testing.assert_array_equal(data.tests[""].images[:, 0].numpy(), content["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.tests[""].labels.numpy(), content["t10k-labels-idx1-ubyte"])
    # Every training and validation image is the file's image of that row, and each row is used exactly once.
    used: list[int] = []
    for split in (*data.clients, data.validation):
        rows = [int(name.removeprefix("train/")) for name in split.ids]
        np.testing.assert_array_equal(split.images[:, 0].numpy(), content[TRAIN_IMAGES][rows])
        np.testing.assert_array_equal(split.labels.numpy(), content[TRAIN_LABELS][rows])
        used += rows
    assert sorted(used) == list(range(120))


def test_the_own_folder_wins_over_a_flat_root(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, test=10)
    write_idx(tmp_path / "FashionMNIST" / "raw", test=20)
    assert len(load("fashionmnist", root=tmp_path, clients=2, partition="iid").tests[""]) == 20
    assert len(load("mnist", root=tmp_path, clients=2, partition="iid").tests[""]) == 10


def test_no_root_and_one_without_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"mnist" is read from files such as train-images.*--data-root'):
        load("mnist", clients=2)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load("mnist", root=tmp_path / "nowhere", clients=2)
    with pytest.raises(UserError, match=rf"no file {TRAIN_IMAGES}.*DIR/MNIST/raw"):
        load("mnist", root=tmp_path, clients=2)


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_one_missing_file_is_named(tmp_path: Path, write_idx, name: str) -> None:
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name}.*is missing"):
            load("mnist", root=tmp_path, clients=2)
        (tmp_path / name).mkdir(exist_ok=True)  # a folder in its place


FULL = 16 + 120 * 784
DAMAGES = {
    "truncated": (TRAIN_IMAGES, lambda raw: raw[:-100], f"holds {FULL - 100} bytes, expected {FULL} for the 120x28x28"),
    "trailing bytes": (TRAIN_LABELS, lambda raw: raw + b"x", "holds 129 bytes, expected 128"),
    "another magic": (
        TRAIN_IMAGES,
        lambda raw: b"\x89PNG" + raw[4:],
        "starts with magic 0x89504e47, expected 0x00000803",
    ),
    "no header": (TRAIN_IMAGES, lambda raw: b"\0\0\x08", "has 3 bytes, fewer than the 16 of an IDX header"),
    "too few labels": (
        TRAIN_LABELS,
        lambda raw: struct.pack(">2I", 0x801, 7) + bytes(7),
        "announces 120 images but .* 7 labels",
    ),
    "a label out of range": (
        TRAIN_LABELS,
        lambda raw: struct.pack(">2I", 0x801, 120) + bytes(119) + b"\x0a",
        "holds label 10, expected 0 to 9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_its_damage(tmp_path: Path, write_idx, damage: str) -> None:
    name, change, words = DAMAGES[damage]
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        load("mnist", root=tmp_path, clients=2)
    assert name in str(caught.value) or damage == "too few labels"


def test_damaged_gzip(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path, compressed=True)
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{TRAIN_IMAGES}.gz is not a complete gzip file"):
        load("mnist", root=tmp_path, clients=2)


@pytest.mark.parametrize(("name", "balanced"), [("mnist", True), ("fashionmnist", False)])
def test_files_of_the_other_set_are_refused(tmp_path: Path, name: str, balanced: bool) -> None:
    # 1x1 images keep the 60,000 rows of the official size small.
    labels = np.arange(60_000) % 10
    if not balanced:
        labels[0] = 1
    for stem, part in (("train", labels), ("t10k", labels[:10])):
        images = struct.pack(">4I", 0x803, len(part), 1, 1) + bytes(len(part))
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">2I", 0x801, len(part)) + part.astype(np.uint8).tobytes())
        )
    with pytest.raises(UserError, match=rf'"{name}": the files in .* are not'):
        load(name, root=tmp_path, clients=2)


def test_pixels_are_owned(tmp_path: Path, write_idx) -> None:
    write_idx(tmp_path)
    images = load("mnist", root=tmp_path, clients=2, partition="iid").clients[0].images
    before = images.clone()
    images.zero_()
    again = load("mnist", root=tmp_path, clients=2, partition="iid").clients[0].images
    assert torch.equal(again, before)


# -- svhn --------------------------------------------------------------------------------------------------------------


def write(folder, name, count, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]  # 10 is the digit 0
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / name, {"X": pixels, "y": labels}, do_compression=True)
    return pixels, labels[:, 0]


@pytest.mark.parametrize("layout", ["", "svhn", "SVHN"])
def test_content(tmp_path, layout):
    train = write(tmp_path / layout, "train_32x32.mat", 100, 0)
    test = write(tmp_path / layout, "test_32x32.mat", 20, 1)
    data = load("svhn", root=tmp_path, clients=3, partition="iid")
    assert data.classes == tuple("0123456789")
    assert sum(data.client_sizes) + len(data.validation) == 100
    assert torch.equal(data.tests[""].images, torch.from_numpy(test[0].transpose(3, 2, 0, 1).copy()))
    assert data.tests[""].labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    for split in (*data.clients, data.validation):
        rows = [int(name.split("/")[1]) for name in split.ids]
        assert torch.equal(split.images, torch.from_numpy(train[0][..., rows].transpose(3, 2, 0, 1).copy()))
        assert split.labels.tolist() == [int(train[1][row]) % 10 for row in rows]
    assert sorted(data.validation.labels.tolist()) == list(range(10))  # class shares are kept


def damage(path, kind):
    raw = path.read_bytes()
    if kind == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "names":
        savemat(path, {"images": np.zeros(3)})
    elif kind == "shape":
        savemat(path, {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((5, 1))})
    elif kind == "label":
        savemat(path, {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.full((4, 1), 11)})
    elif kind == "class":
        savemat(path, {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((4, 1))})
        raw = bytearray(path.read_bytes())
        raw[144] = 0  # what kind of an array X is: none that there is
        path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "names", "shape", "label", "class"])
def test_a_damaged_file_is_one_sentence(tmp_path, kind):
    write(tmp_path, "train_32x32.mat", 40, 0)
    write(tmp_path, "test_32x32.mat", 10, 1)
    damage(tmp_path / "test_32x32.mat", kind)
    with pytest.raises(UserError, match=r"test_32x32\.mat (is damaged|holds)") as caught:
        load("svhn", root=tmp_path, clients=2, partition="iid")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, "train_32x32.mat", 40, 0)
    with pytest.raises(UserError, match=r"test_32x32\.mat .* is missing"):
        load("svhn", root=tmp_path)
    with pytest.raises(UserError, match="--data-root DIR"):
        load("svhn")
