"""Tests of images in a file in place of a tensor: the same values, and rows that are read when needed."""

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkern.data import Split, normalise
from fedkern.data.images.transforms import cut_central_windows
from fedkern.data.split import join_splits
from fedkern.files import image_rows as module
from fedkern.files.image_rows import ImageRows, ImageStore, PixelClasses, in_parts, load_rows
from python_tests.image_files import count_gathered

COUNT, CHANNELS, HEIGHT, WIDTH = 12, 3, 6, 8


def make_store(path, channels=CHANNELS):
    """Return a store of random images, and the tensor that a reader would make."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, HEIGHT, WIDTH, channels), dtype=np.uint8)
    path.write_bytes(images.tobytes())
    store = ImageStore(os.open(path, os.O_RDONLY), images.shape)
    plain = np.empty((COUNT, channels, HEIGHT, WIDTH), dtype=np.uint8)
    plain[:] = images.transpose(0, 3, 1, 2)
    return store, torch.from_numpy(plain)


@pytest.fixture
def pair(tmp_path):
    """Return images in a file, and the same images in memory."""
    store, plain = make_store(tmp_path / "images")
    return ImageRows.of(store, torch.arange(COUNT)), plain


@pytest.fixture
def read(monkeypatch):
    """Return the list of images per read."""
    return count_gathered(monkeypatch)


def test_it_looks_like_a_tensor_and_reads_nothing_for_that(pair, read):
    rows, plain = pair
    assert isinstance(rows, torch.Tensor)
    assert rows.shape == plain.shape
    assert (rows.dtype, rows.device, rows.dim(), len(rows), rows.numel()) == (
        plain.dtype, plain.device, plain.dim(), len(plain), plain.numel()
    )  # fmt: skip
    assert (rows.element_size(), rows.is_floating_point(), rows.is_cpu, rows.is_meta) == (1, False, True, False)
    assert repr(rows) == "ImageRows(shape=[12, 3, 6, 8])"
    assert read == []


KEYS = [
    torch.tensor([3, 0, 3]), torch.tensor([], dtype=torch.int64), torch.arange(COUNT) % 3 == 0, slice(2, 9, 3), 4, -1,
    [1, 2], np.array([5, 1]), (slice(0, 4), 1), (3, 0), (slice(None), slice(None), slice(1, 4)),
    (..., slice(2, 5)), (torch.tensor([0, 1]), torch.tensor([1, 2])), None, torch.tensor([[0, 1], [2, 3]]),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_choosing(pair, key):
    rows, plain = pair
    assert torch.equal(rows[key], plain[key])


def test_selecting_rows_reads_nothing(pair, read):
    rows, plain = pair
    index = torch.tensor([3, 0, 3])
    found = rows.index_select(0, index)
    assert read == []
    assert torch.equal(found, plain[index])
    assert torch.equal(rows.index_select(1, index[1:2]), plain[:, :1])


@pytest.mark.parametrize("channels", [1, 3])
def test_values_and_strides_are_those_of_a_tensor_in_memory(tmp_path, channels):
    store, plain = make_store(tmp_path / "images", channels)
    rows = ImageRows.of(store, torch.arange(COUNT))
    scale = [0.5] * channels, [0.2] * channels
    for found, expected in (
        (rows.plain(), plain),
        (rows.contiguous(), plain),
        (rows[2:5].permute(0, 2, 3, 1), plain[2:5].permute(0, 2, 3, 1)),
        (normalise(rows[1:4], *scale), normalise(plain[1:4], *scale)),
        (torch.where(rows > 100, rows, 0), torch.where(plain > 100, plain, 0)),
        (torch.stack([rows, rows]), torch.stack([plain, plain])),
        (torch.cat([rows, plain]), torch.cat([plain, plain])),
        (torch.cat([rows, rows], 1), torch.cat([plain, plain], 1)),
        (rows.float().mean(0), plain.float().mean(0)),
    ):
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    np.testing.assert_array_equal(rows.numpy(), plain.numpy())
    np.testing.assert_array_equal(np.asarray(rows), plain.numpy())


def test_splits_are_divided_joined_and_cut_without_reading(pair, read):
    rows, plain = pair
    labels = torch.arange(COUNT)
    lazy, eager = Split(rows, labels), Split(plain, labels)
    chosen = torch.tensor([7, 2, 11])
    parts = [[split.subset(chosen), split.subset(torch.arange(3))] for split in (lazy, eager)]
    made = [cut_central_windows(join_splits(part), (4, 5)) for part in parts]
    again = [cut_central_windows(split, (3, 3)) for split in made]
    assert cut_central_windows(made[0], (4, 5)) is made[0]
    assert read == []
    for found, expected in (made, again):
        assert isinstance(found.images, ImageRows)
        assert torch.equal(found.images, expected.images)
    assert read == [6, 6]
    with pytest.raises(ValueError, match="sides: expected at most 6 x 8, got 7 x 8"):
        cut_central_windows(lazy, (7, 8))


def test_one_image_at_a_time(pair, read):
    rows, plain = pair
    assert all(torch.equal(a, b) for a, b in zip(rows, plain, strict=True))
    assert read == [1] * COUNT


def test_images_of_two_files_are_joined_in_memory(tmp_path):
    store_a, two = (make_store(tmp_path / name)[0] for name in ("a", "b"))
    joined = torch.cat([ImageRows.of(store, torch.tensor([1])) for store in (store_a, two)])
    assert type(joined) is torch.Tensor
    assert torch.equal(joined[0], joined[1])


CHANGES = [
    lambda rows: rows.add_(1),
    lambda rows: rows.__setitem__(0, 1),
    lambda rows: rows.fill_(0),
    lambda rows: torch.relu_(rows),
]


@pytest.mark.parametrize("change", CHANGES)
def test_nobody_changes_them(pair, change):
    rows, plain = pair
    with pytest.raises(TypeError, match="in a file and cannot be changed"):
        change(rows)
    assert torch.equal(rows, plain)
    with pytest.raises(TypeError, match="have no address"):
        rows.data_ptr()


def test_pickled_while_the_file_has_no_name(tmp_path, read):
    store, plain = make_store(tmp_path / "images")
    (tmp_path / "images").unlink()
    rows = ImageRows.of(store, torch.tensor([4, 1]), (1, 2, 3, 4))
    loaded = pickle.loads(pickle.dumps((rows, rows[:1])))
    assert loaded[0]._store is loaded[1]._store is not store
    assert copy.deepcopy(rows)._store is store
    assert read == []
    assert torch.equal(loaded[0], plain[torch.tensor([4, 1]), :, 1:4, 2:6])


def test_a_file_that_is_too_short(tmp_path):
    (tmp_path / "images").write_bytes(b"12345")
    with pytest.raises(ValueError, match="mmap length"):
        ImageStore(os.open(tmp_path / "images", os.O_RDONLY), (2, 1, 3, 1))


STATUS = Path("/proc/self/status")


def resident():
    """Return the bytes of mapped files that count as this process's memory."""
    with STATUS.open() as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssFile:"))


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux")
def test_mapped_pages_are_given_back(tmp_path, monkeypatch):
    shape = (64, 256, 256, 3)
    monkeypatch.setattr(module, "RESIDENT_BYTES", 1 << 20)
    with (tmp_path / "images").open("wb") as file:
        file.truncate(64 * 256 * 256 * 3)
    store = ImageStore(os.open(tmp_path / "images", os.O_RDONLY), shape)
    before = resident()
    for row in range(64):
        store.gather(np.array([row]))
    assert resident() - before < 4 << 20


MEANING = torch.arange(256)
MEANING[255], MEANING[7] = 1, -100


@pytest.fixture
def classes(tmp_path):
    """Return classes of pixels in a file, and the same classes in memory."""
    masks = np.random.default_rng(1).choice(np.array([0, 3, 7, 255], dtype=np.uint8), (COUNT, HEIGHT, WIDTH, 1))
    (tmp_path / "masks").write_bytes(masks.tobytes())
    store = ImageStore(os.open(tmp_path / "masks", os.O_RDONLY), masks.shape)
    plain = torch.from_numpy(masks[..., 0]).long()
    plain[plain == 255], plain[plain == 7] = 1, -100
    return PixelClasses.of(store, torch.arange(COUNT), MEANING), plain


def test_classes_of_pixels_look_like_a_tensor_and_are_read_when_needed(classes, read):
    rows, plain = classes
    assert (rows.shape, rows.dtype, rows.device, rows.dim(), len(rows)) == (
        plain.shape, plain.dtype, plain.device, plain.dim(), len(plain)
    )  # fmt: skip
    assert (rows.element_size(), rows.numel(), rows.is_cpu) == (8, plain.numel(), True)
    lazy = Split(torch.zeros(COUNT, 1, HEIGHT, WIDTH, dtype=torch.uint8), rows)
    eager = Split(lazy.images, plain)
    chosen = torch.tensor([7, 2, 11])
    found, expected = (join_splits([split.subset(chosen), split.subset(torch.arange(3))]) for split in (lazy, eager))
    assert read == []
    assert isinstance(found.labels, PixelClasses)
    assert torch.equal(found.labels, expected.labels)
    assert load_rows(found.labels).stride() == expected.labels.stride()
    assert read == [6, 6]
    loaded = pickle.loads(pickle.dumps((rows, rows[:1])))
    assert torch.equal(loaded[0], plain)
    assert loaded[0]._store is loaded[1]._store
    with pytest.raises(TypeError, match="in a file and cannot be changed"):
        rows.fill_(0)


@pytest.mark.parametrize("key", [*KEYS, "pixels"], ids=str)
def test_choosing_classes(classes, key):
    rows, plain = classes
    if isinstance(key, tuple) and len(key) == 3:
        key = key[:2]
    if isinstance(key, str):
        key = plain >= 0
    assert torch.equal(rows[key], plain[key])
    assert torch.equal(rows >= 0, plain >= 0)


def test_masks_of_other_meanings_are_joined_in_memory(classes):
    rows, plain = classes
    remapped = PixelClasses.of(rows._store, torch.arange(2), torch.arange(256))
    joined = torch.cat([rows[:2], remapped])
    assert type(joined) is torch.Tensor
    assert torch.equal(joined[:2], plain[:2])
    assert isinstance(torch.cat([rows[:2], rows[3:]]), PixelClasses)


def test_the_largest_class_of_every_image_is_found_in_parts(classes, read, monkeypatch):
    rows, plain = classes
    monkeypatch.setattr(module, "PART_BYTES", 3 * HEIGHT * WIDTH * 8)
    images = torch.zeros(COUNT, 1, HEIGHT, WIDTH, dtype=torch.uint8)
    assert torch.equal(Split(images, rows).image_labels, Split(images, plain).image_labels)
    assert read == [3, 3, 3, 3]


def test_parts(classes, pair, monkeypatch):
    rows, plain = classes
    monkeypatch.setattr(module, "PART_BYTES", 5 * HEIGHT * WIDTH * 8)
    parts = list(in_parts(rows))
    assert [len(part) for part in parts] == [5, 5, 2]
    assert all(type(part) is torch.Tensor for part in parts)
    assert torch.equal(torch.cat(parts), plain)
    monkeypatch.setattr(module, "PART_BYTES", 1)
    assert [len(part) for part in in_parts(rows)] == [1] * COUNT
    assert [part.shape for part in in_parts(rows[:0])] == [(0, HEIGHT, WIDTH)]
    assert [part is plain for part in in_parts(plain)] == [True]
    monkeypatch.setattr(module, "PART_BYTES", 100)
    assert torch.equal(torch.cat(list(in_parts(pair[0]))), pair[1])
    assert load_rows(plain) is plain
