"""Tests of MNIST and Fashion-MNIST files: layouts, content, and errors of damaged files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkern.data import load
from fedkern.errors import UserError

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


def test_no_root() -> None:
    with pytest.raises(UserError, match=r'"mnist" is read from files such as train-images.*--data-root'):
        load("mnist", clients=2)


def test_root_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load("mnist", root=tmp_path / "nowhere", clients=2)


def test_empty_root_says_where_it_looked(tmp_path: Path) -> None:
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
