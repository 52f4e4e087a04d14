"""Tests of decoded images in a cache folder or a temporary file: the same data, decoded once, never broken."""

import errno
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkern.data import load
from fedkern.data.images import image_cache
from fedkern.data.images.image_files import ImageFiles
from fedkern.errors import UserError
from fedkern.files.image_rows import ImageRows
from python_tests.image_files import watch_decoded

IMAGES, SIDE = 24, 16


@pytest.fixture
def root(tmp_path):
    """Write 24 images of random sizes and colours, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / "root" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(5, 30, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return tmp_path / "root"


@pytest.fixture
def decodes(monkeypatch):
    return watch_decoded(monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKERN_CACHE_DIR", str(tmp_path / "home"))


def open_set(root, cache=None, name="folder", **settings):
    options = {"size": SIDE, **settings.pop("options", {})}
    return load(name, root=root, clients=2, partition="iid", options=options, cache=cache, **settings)


def splits(data):
    return [*data.clients, data.validation, *data.tests.values(), *([data.public] if data.public is not None else [])]


def assert_same(found, expected):
    for got, wanted in zip(splits(found), splits(expected), strict=True):
        assert isinstance(got.images, ImageRows)
        assert not isinstance(wanted.images, ImageRows)
        for name in ("images", "labels", "sizes"):
            assert torch.equal(getattr(got, name), getattr(wanted, name))
        assert (got.ids, got.texts) == (wanted.ids, wanted.texts)


def names(folder):
    return sorted(path.suffix for path in folder.iterdir())


def test_small_data_without_a_cache_stay_in_memory(root, tmp_path):
    assert not any(isinstance(split.images, ImageRows) for split in splits(open_set(root)))
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("colour", ["rgb", "grey"])
def test_a_cache_gives_the_same_data_and_decodes_once(root, tmp_path, decodes, colour):
    options = {"colour": colour}
    expected = open_set(root, options=options)
    decodes.clear()
    said = []
    assert_same(open_set(root, tmp_path / "cache", options=options, notice=said.append), expected)
    assert sorted(decodes) == sorted(root.rglob("*.png"))
    assert said == [f"decoding 24 images (0.0 MB) into {tmp_path / 'cache'}"]
    assert names(tmp_path / "cache") == [".images", ".lock", ".sizes"]
    for seed in (0, 1):
        decodes.clear()
        again = open_set(root, tmp_path / "cache", options=options, seed=seed, notice=said.append)
        assert decodes == []
        assert_same(again, open_set(root, options=options, seed=seed))
    assert "24 decoded images are read from" in said[-1]


def test_large_data_are_in_a_file_that_vanishes(root, tmp_path, monkeypatch):
    expected = open_set(root)
    monkeypatch.setattr(image_cache, "MEMORY_BYTES", IMAGES * 3 * SIDE**2)
    assert not isinstance(open_set(root).clients[0].images, ImageRows)
    monkeypatch.setattr(image_cache, "MEMORY_BYTES", IMAGES * 3 * SIDE**2 - 1)
    said = []
    data = open_set(root, notice=said.append)
    assert_same(data, expected)
    assert list((tmp_path / "home" / "images").iterdir()) == []
    assert said[0].endswith("with --cache DIR later runs need not decode them again")


def test_only_the_wanted_images_are_decoded(root, tmp_path, decodes):
    expected = open_set(root, train_samples=4, public_samples=3, options={"test_samples": 2})
    wanted = sorted(decodes)
    assert len(wanted) < IMAGES
    decodes.clear()
    data = open_set(root, tmp_path / "cache", train_samples=4, public_samples=3, options={"test_samples": 2})
    assert_same(data, expected)
    assert sorted(decodes) == wanted
    decodes.clear()
    full = open_set(root, tmp_path / "cache")
    assert sorted([*decodes, *wanted]) == sorted(root.rglob("*.png"))
    assert_same(full, open_set(root))


def test_a_changed_image_is_decoded_again(root, tmp_path, decodes):
    open_set(root, tmp_path / "cache")
    before = (root / "a" / "0.png").stat()
    Image.new("RGB", (7, 7), (1, 2, 3)).save(root / "a" / "0.png")
    os.utime(root / "a" / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    decodes.clear()
    data = open_set(root, tmp_path / "cache")
    assert root / "a" / "0.png" in decodes
    assert_same(data, open_set(root))


def test_an_interrupted_decoding_goes_on(root, tmp_path, monkeypatch, decodes):
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 5 * 3 * SIDE**2)
    read, times = ImageFiles.read, []

    def stop(files, rows):
        times.append(1)
        if len(times) == 3:
            raise KeyboardInterrupt
        return read(files, rows)

    monkeypatch.setattr(ImageFiles, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        open_set(root, tmp_path / "cache")
    assert len(decodes) == 10
    data = open_set(root, tmp_path / "cache")
    assert sorted(decodes) == sorted(root.rglob("*.png"))
    monkeypatch.setattr(ImageFiles, "read", read)
    assert_same(data, open_set(root))


def edit(ending, change):
    """Return a function that damages a file, in which an image or its size takes so many bytes."""

    def damage(path):
        content = bytearray(path.with_suffix(ending).read_bytes())
        change(content, len(content) // IMAGES)
        path.with_suffix(ending).write_bytes(content)

    return damage


def lose_sizes(path):
    """Lose the sizes, as in a power cut before they are written."""
    edit(".sizes", lambda content, _: content.__setitem__(HEAD, bytes(len(content[HEAD]))))(path)
    path.write_bytes(bytes(path.stat().st_size))


def change_header(path):
    edit(".sizes", lambda content, _: content.__setitem__(0, ord("x")))(path)
    path.write_bytes(bytes(path.stat().st_size))


def flip_bits(content, size):
    content[5] ^= 1
    content[-1] ^= 128


def swap_images(content, size):
    content[: 2 * size] = content[size : 2 * size] + content[:size]


def rotate_images(content, size):
    content[:] = content[size:] + content[:size]


HEAD = slice(image_cache.HEADER_BYTES, None)
LOST = {
    "images cut": edit(".images", lambda content, _: content.pop()),
    "sizes cut": edit(".sizes", lambda content, _: content.pop()),
    "no images": lambda path: path.unlink(),
    "no sizes": lambda path: path.with_suffix(".sizes").unlink(),
    "uncommitted": lose_sizes,
    "another header": change_header,
}
DAMAGED = {
    "bits": (edit(".images", flip_bits), 2),
    "zeros": (edit(".images", lambda content, size: content.__setitem__(slice(size, 3 * size), bytes(2 * size))), 2),
    "two for one another": (edit(".images", swap_images), 2),
    "all for others": (edit(".images", rotate_images), IMAGES),
    "a size": (edit(".sizes", lambda content, _: content.__setitem__(HEAD.start, content[HEAD.start] ^ 2)), 1),
}


@pytest.mark.parametrize("name", [*LOST, *DAMAGED])
def test_a_damaged_cache_is_mended(root, tmp_path, decodes, name):
    damage, count = DAMAGED[name] if name in DAMAGED else (LOST[name], IMAGES)
    open_set(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*.images")
    damage(path)
    decodes.clear()
    told = []
    data = open_set(root, tmp_path / "cache", notice=told.append)
    assert len(decodes) == count
    assert (f"{count} images in {path} are damaged and are decoded again" in told) == (name in DAMAGED)
    assert_same(data, open_set(root))
    decodes.clear()
    open_set(root, tmp_path / "cache")
    assert not decodes


def test_a_cache_that_is_made_anew_leaves_readers_their_images(root, tmp_path):
    data = open_set(root, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*.sizes"):
        path.unlink()
    open_set(root, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert_same(data, open_set(root))


def test_two_runs_at_once_decode_once(root, tmp_path, monkeypatch, decodes):
    entered, go = threading.Event(), threading.Event()
    read = ImageFiles.read

    def slow(files, rows):
        entered.set()
        assert go.wait(20)
        return read(files, rows)

    monkeypatch.setattr(ImageFiles, "read", slow)
    found, said = [], []

    def notice(text):
        said.append(text)
        if "waits" in text:
            go.set()

    workers = [
        threading.Thread(target=lambda: found.append(open_set(root, tmp_path / "cache", notice=notice)))
        for _ in range(2)
    ]
    workers[0].start()
    assert entered.wait(20)
    workers[1].start()
    for worker in workers:
        worker.join(30)
    assert len(decodes) == IMAGES
    assert sum("waits for it" in text for text in said) == 1
    monkeypatch.setattr(ImageFiles, "read", read)
    assert len(found) == 2
    for data in found:
        assert_same(data, open_set(root))


def test_progress(root, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 10 * 3 * SIDE**2)
    monkeypatch.setattr(image_cache, "NOTICE_SECONDS", 0.0)
    said = []
    open_set(root, tmp_path / "cache", notice=said.append)
    assert said[1:] == [f"decoding images: {done} of 24, about 1 min left" for done in (10, 20, 24)]


def test_an_image_with_several_texts_is_decoded_once(tmp_path, decodes):
    rows = ["image,text"]
    for number in range(12):
        Image.new("RGB", (30, 20), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,text {number}", f"{number}.png,words {number}"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    options = {"crop": 8}
    expected = open_set(tmp_path / "table.csv", name="pairs", options=options)
    decodes.clear()
    data = open_set(tmp_path / "table.csv", tmp_path / "cache", name="pairs", options=options)
    assert len(decodes) == len(set(decodes)) == 12
    assert data.form.shape == (3, 8, 8)
    assert data.clients[0].images.shape[2:] == (16, 16)
    assert_same(data, expected)


# what a user can get wrong


def test_an_image_that_cannot_be_read_leaves_no_images(root, tmp_path):
    (root / "a" / "0.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png"):
        open_set(root, tmp_path / "cache")
    assert names(tmp_path / "cache") == [".lock"]


@pytest.mark.parametrize("cache", [True, False])
def test_too_little_space(root, refuses, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(image_cache, "MEMORY_BYTES", 0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2000, 1000, 1000))
    with refuses(r"take 0\.0 MB and .* has 0\.0 MB left: free some space.*--cache DIR", "cache"):
        open_set(root, tmp_path / "cache" if cache else None)


@pytest.mark.parametrize("cache", [True, False])
def test_a_disk_that_becomes_full(root, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(image_cache, "MEMORY_BYTES", 0)
    monkeypatch.setattr(image_cache, "CHUNK_BYTES", 5 * 3 * SIDE**2)
    write, times = image_cache._write, []

    def full(*args):
        times.append(1)
        if len(times) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(image_cache, "_write", full)
    with pytest.raises(UserError, match=r"do not fit on the disk of .*: free some space"):
        open_set(root, tmp_path / "cache" if cache else None)
    folder = tmp_path / "cache" if cache else tmp_path / "home" / "images"
    assert names(folder) == ([".lock"] if cache else [])


def test_a_folder_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .* \(it is a file\)"):
        open_set(root, tmp_path / "file")
    for cache in (tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(UserError, match=r"cannot be written to .*: name another folder with --cache DIR"):
            open_set(root, cache)


def test_a_broken_pipe_of_the_display_is_no_trouble_of_the_disk(root, tmp_path):
    def notice(text):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        open_set(root, tmp_path / "cache", notice=notice)


@pytest.mark.parametrize("name", ["digits", "colordigits", "captions"])
def test_data_without_image_files_say_that_no_cache_is_used(tmp_path, name):
    said = []
    load(name, clients=2, train_samples=40, cache=tmp_path / "cache", notice=said.append)
    assert [text for text in said if "--cache is not used" in text] == said != []
    assert not (tmp_path / "cache").exists()
