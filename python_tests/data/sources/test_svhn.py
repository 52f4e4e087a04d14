"""Tests of SVHN's MATLAB files: layouts, content, and errors of damaged files."""

import numpy as np
import pytest
import torch
from scipy.io import savemat

from fedkern.data import load
from fedkern.errors import UserError


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
