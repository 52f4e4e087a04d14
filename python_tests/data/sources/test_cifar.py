"""Tests of CIFAR binary files: layouts, content, and errors of damaged files."""

import gzip
from pathlib import Path

import numpy as np
import pytest

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
