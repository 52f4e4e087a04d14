"""Tests of files with a wrong extension: other formats, bombs, pipes, loops, damaged ends.  Each is one sentence."""

import gzip
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from scipy.io import savemat

from fedkern.data import load
from fedkern.data.images.detections import BoxesFile
from fedkern.data.images.image_files import FORMATS, ImageFiles, list_images, open_image, read_mask
from fedkern.data.sources.table import gunzip
from fedkern.errors import UserError
from fedkern.files.filesystem import open_regular, parse_json
from fedkern.models.teachers.clip import read_prompts
from fedkern.run import main
from python_tests.in_time import in_time


def picture(path, number=0, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_folders(root, classes="ab", images=6):
    for i, name in enumerate(classes):
        for j in range(images):
            picture(root / name / f"{j}.png", 10 * i + j)
    return root


def open_set(name, root, **options):
    return load(name, root=root, clients=2, partition="iid", options={"size": 8, **options})


# -- formats and sizes -------------------------------------------------------------------------------------------------


def test_postscript_in_a_png_starts_no_other_program(tmp_path, monkeypatch):
    """Pillow would hand such a file to Ghostscript, a programming language."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: called.append(given))
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    with pytest.raises(UserError, match=r"cannot read the image .*image\.png \(it is none of JPEG, PNG"):
        ImageFiles([path], 8, "folder").read()
    with pytest.raises(UserError, match="none of JPEG, PNG"):
        read_mask(path, path, "segmentation", size=8)
    assert not called


def test_six_formats_are_decoded_whatever_a_file_is_called(tmp_path):
    Image.init()
    refused = []
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN) - {"SPIDER"}):  # which would take the ending for its own
        path = tmp_path / f"{kind}.png"
        try:
            Image.new("RGB", (8, 8), (200, 0, 0)).save(path, format=kind)
        except Exception:  # what needs a library that is not here, or other modes
            continue
        if kind in FORMATS:
            assert ImageFiles([path], 8, "folder").read()[0].shape == (1, 3, 8, 8)
        elif kind not in ("MPO", "APNG"):  # a JPEG with several pictures is a JPEG
            refused.append(kind)
            with pytest.raises(UserError, match="none of JPEG"):
                ImageFiles([path], 8, "folder").read()
    assert {"EPS", "PPM", "TGA", "ICO"} <= set(refused)


def huge_png(path, width=30_000, height=30_000):
    """Return a PNG's header alone, of a picture that would be decoded from a few hundred kilobytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [7_100, 10_000, 30_000])  # above ours; where Pillow warns; where it raises
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path, side):
    path = tmp_path / "huge.png"
    huge_png(path, side, side)
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=rf"has {side}x{side} pixels, more than 50,0.*--max-image-pixels {side**2}"):
            ImageFiles([path], 8, "folder").read()
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_can_be_raised_beyond_pillows_own(tmp_path):
    huge_png(tmp_path / "huge.png", 20_000, 10_000)
    with open_image(tmp_path / "huge.png", 200_000_000) as image:
        assert image.size == (20_000, 10_000)
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("name", ["folder", "segmentation"])
def test_the_limit_is_an_option_of_every_set_of_images(tmp_path, name):
    if name == "folder":
        class_folders(tmp_path)
    else:
        for j in range(8):
            picture(tmp_path / "images" / f"{j}.png", j)
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks" / f"{j}.png")
    settings = {"clients": 2, "partition": "iid"}
    with pytest.raises(UserError, match=r"pixels, more than 60: .*--max-image-pixels"):
        load(name, root=tmp_path, options={"size": 8, "max_image_pixels": 60}, **settings)
    load(name, root=tmp_path, options={"size": 8, "max_image_pixels": 240}, **settings)


def test_the_limit_is_a_flag(tmp_path, capsys):
    class_folders(tmp_path / "data")
    words = ["fedavg", "--data", "folder", "--data-root", str(tmp_path / "data"), "--partition", "iid",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*words, "--max-image-pixels", "63"]) == 2
    assert "has 8x8 pixels, more than 63" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["fedavg", "--data", "digits", "--max-image-pixels", "63"]) == 2
    assert 'data set "digits" has no option "max_image_pixels"' in capsys.readouterr().err


# -- gzip --------------------------------------------------------------------------------------------------------------


def unzip(content, due=None, header=0):
    path = unzip.folder / "x.gz"
    path.write_bytes(content)
    with open_regular(path) as file:
        return gunzip(file, due or (lambda head: 1 << 30), header)


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    unzip.folder = tmp_path


def test_gzip_of_one_member_or_several():
    rng = np.random.default_rng(0)
    noise, zeros = rng.bytes(1_500_000), bytes(3_000_000)
    for content in (b"", b"a", noise, zeros, noise + zeros + noise):
        assert unzip(gzip.compress(content)) == content
        assert unzip(gzip.compress(content), lambda head, content=content: len(content)) == content
        assert unzip(gzip.compress(content[:7]) + gzip.compress(b"") + gzip.compress(content[7:])) == content
    heads = []
    assert unzip(gzip.compress(noise), lambda head: heads.append(head) or len(noise), 16) == noise
    assert heads == [noise[:16]]
    assert unzip(gzip.compress(b"short"), lambda head: 1 / 0, 16) == b"short"


@pytest.mark.parametrize("harm", [
    lambda made: made[:-8] + bytes([made[-8] ^ 1]) + made[-7:],  # checksum
    lambda made: made[:-1] + bytes([made[-1] ^ 1]),  # length
    lambda made: made[:-8], lambda made: made[:-1], lambda made: made[: len(made) // 2], lambda made: made[:5],
    lambda made: b"", lambda made: made + b"more", lambda made: made + made[:20],
    lambda made: made[:40] + bytes([made[40] ^ 255]) + made[41:],
])  # fmt: skip
def test_gzip_that_is_damaged_or_goes_on(harm):
    made = gzip.compress(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"."):
        unzip(harm(made))


def test_no_more_is_decompressed_than_is_due():
    bomb = gzip.compress(bytes(200_000_000), compresslevel=1)
    seen = []
    for header, due in ((0, 1000), (8, 1000), (16, 3)):
        with pytest.raises(ValueError, match=f"more than the {due:,} bytes that are due"):
            unzip(bomb, lambda head, due=due: seen.append(len(head)) or due, header)
    assert seen == [0, 8, 16]
    with pytest.raises(ValueError, match="more than the 5 bytes"):
        unzip(gzip.compress(b"abc") * 2, lambda head: 5)


# -- IDX, SVHN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "words"), [
    ((2**32 - 1, 2**32 - 1, 2**32 - 1), "expected 7922816"), ((2**31, 2**31, 4), "expected 1844"),
    ((2**16, 2**16, 2**32 - 1), "expected 184"), ((0, 28, 28), "announces 0x28x28, which is nothing"),
    ((3, 0, 2**32 - 1), "which is nothing"),
])  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_sizes_whose_product_wraps(tmp_path, write_idx, sizes, words, compressed):
    write_idx(tmp_path)
    name = "train-images-idx3-ubyte"
    raw = struct.pack(">4I", 0x803, *sizes)
    (tmp_path / name).unlink()
    (tmp_path / (name + ".gz" * compressed)).write_bytes(gzip.compress(raw) if compressed else raw)
    with pytest.raises(UserError, match=words):
        load("mnist", root=tmp_path)


def test_an_idx_bomb(tmp_path, write_idx):
    write_idx(tmp_path)
    name = "train-images-idx3-ubyte"
    (tmp_path / name).unlink()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(struct.pack(">4I", 0x803, 120, 28, 28) + bytes(100_000_000)))
    with pytest.raises(UserError, match="more than the 94,096 bytes that are due"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize(("labels", "words"), [
    (np.array([1.0, np.nan]), "the label nan"), (np.array([1.5, 2]), "the label 1.5"),
    (np.array([np.inf, 2]), "the label inf"), (np.array([1 + 2j, 2]), "labels of complex128"),
    (np.array([11, 1]), "the label 11"), (np.array([-1, 1], np.int16), "the label -1"),
    (np.array(["1", "2"], object), "labels of object"), (np.array([300, 1], np.uint16), "the label 300"),
])  # fmt: skip
def test_svhn_labels_that_are_no_digits(tmp_path, labels, words):
    pixels = np.zeros((32, 32, 3, 2), np.uint8)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / name, {"X": pixels, "y": labels[:, None]})
    with pytest.raises(UserError, match=words):
        load("svhn", root=tmp_path)


def test_svhn_of_more_images_than_there_can_be(tmp_path):
    """The sizes are checked before anything is decompressed."""
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(tmp_path / name, {"X": np.zeros((1, 1), np.uint8), "y": np.ones((2, 1))})
    raw = (tmp_path / "train_32x32.mat").read_bytes()
    at = raw.index(struct.pack("<4I", 5, 8, 1, 1))
    (tmp_path / "train_32x32.mat").write_bytes(raw[:at] + struct.pack("<4i", 5, 8, 2**16, 2**16) + raw[at + 16 :])
    with pytest.raises(UserError, match="announces more than 1,000,000 images"):
        load("svhn", root=tmp_path)


# -- pipes and devices -------------------------------------------------------------------------------------------------


def write_captions(root, count=8):
    for j in range(count):
        picture(root / f"{j}.png", j)
        (root / f"{j}.txt").write_text(f"caption {j}")
    return root


def test_a_caption_is_a_regular_file_or_a_link_to_one(tmp_path):
    root = write_captions(tmp_path / "pairs")
    (root / "0.txt").rename(tmp_path / "elsewhere")
    (root / "0.txt").symlink_to(tmp_path / "elsewhere")
    assert len(open_set("pairs", root).image_ids) == 8
    (root / "0.txt").unlink()
    os.mkfifo(root / "0.txt")
    assert "0.txt: it is a named pipe, not a regular file" in in_time(lambda: open_set("pairs", root))
    for target, words in (("/dev/zero", "a device"), (str(tmp_path), "a folder"), ("nowhere", "has no text 0.txt")):
        (root / "0.txt").unlink()
        (root / "0.txt").symlink_to(target)
        assert words in in_time(lambda: open_set("pairs", root))


@pytest.mark.parametrize(("target", "words"), [
    (None, "is a named pipe"), ("/dev/zero", "is a device"), ("nowhere", "is a link to nothing"),
    ("0.png", "is a link to nothing"),
])  # fmt: skip
def test_an_image_is_a_regular_file_or_a_link_to_one(tmp_path, target, words):
    class_folders(tmp_path)
    path = tmp_path / "a" / "0.png"
    path.rename(tmp_path / "kept")
    path.symlink_to(tmp_path / "kept")
    assert len(open_set("folder", tmp_path).image_ids) == 12
    path.unlink()
    os.mkfifo(path) if target is None else path.symlink_to(target)
    assert words in in_time(lambda: list_images(tmp_path / "a"))
    assert words in in_time(lambda: open_set("folder", tmp_path))
    table = tmp_path / "list.csv"
    table.write_text("path,label\n" + "".join(f"{name}/{j}.png,{name}\n" for name in "ab" for j in range(6)))
    assert words in in_time(lambda: open_set("csv", table))


@pytest.mark.parametrize("name", ["boxes.json", "boxes.csv", "prompts.txt", "prompts.json"])
def test_other_files_that_are_pipes(tmp_path, name):
    os.mkfifo(tmp_path / name)
    kind = (lambda path: BoxesFile(path, [])) if name.startswith("boxes") else (lambda path: read_prompts(path, ["a"]))
    assert "it is a named pipe, not a regular file" in in_time(lambda: kind(str(tmp_path / name)))


# -- one real file under two names -------------------------------------------------------------------------------------


def twice(root, name, link):
    """List one image of a data set under a second name."""
    if name == "folder":
        class_folders(root)
        link(root / "a" / "0.png", root / "b" / "6.png")
    elif name == "split folders":
        class_folders(root / "train")
        class_folders(root / "test", images=2)
        link(root / "train" / "a" / "0.png", root / "test" / "a" / "7.png")
    elif name == "pairs":
        write_captions(root)
        link(root / "0.png", root / "9.png")
        (root / "9.txt").write_text("another caption")
    elif name == "pairs that loop":
        write_captions(root)
        (root / "again").symlink_to(".")
    elif name == "segmentation":
        for j in range(8):
            picture(root / "images" / f"{j}.png", j)
            (root / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / "masks" / f"{j}.png")
        link(root / "images" / "0.png", root / "images" / "9.png")
        link(root / "masks" / "0.png", root / "masks" / "9.png")
    else:
        class_folders(root)
        link(root / "a" / "0.png", root / "b" / "6.png")
        rows = [(f"{name}/{j}.png", name) for name in "ab" for j in range(6)] + [("b/6.png", "b")]
        header = {"csv": "path,label", "table of pairs": "image,text"}[name]
        text = "" if name == "csv" else "heart of normal size number "
        (root / "list.csv").write_text(f"{header}\n" + "".join(f"{path},{text}{label}\n" for path, label in rows))
    return root


SETS = ["folder", "split folders", "pairs", "pairs that loop", "segmentation", "csv", "table of pairs"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", SETS)
def test_one_image_under_two_names(tmp_path, name, link):
    root = twice(tmp_path, name, link)
    data = {"split folders": "folder", "pairs that loop": "pairs", "table of pairs": "pairs"}.get(name, name)
    with pytest.raises(UserError, match=r"are one file, .*remove the link"):
        load(data, root=root, clients=2, partition="iid", options={"size": 8})


def test_one_image_in_two_splits(tmp_path):
    class_folders(tmp_path)
    rows = [f"{name}/{j}.png,{name},{'test' if j > 3 else 'train'}" for name in "ab" for j in range(6)]
    table = tmp_path / "list.csv"
    table.write_text("path,label,split\n" + "\n".join([*rows, "a/0.png,a,train"]))
    open_set("csv", table)  # a row that is there twice stays in its split
    table.write_text("path,label,split\n" + "\n".join([*rows, "./a/0.png,a,test"]))
    with pytest.raises(UserError, match=r"a/0\.png is in two splits, train \(line 2\) and test \(line 14\)"):
        open_set("csv", table)


def test_links_to_other_folders_are_followed(tmp_path):
    class_folders(tmp_path / "disk")
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "root").symlink_to(tmp_path / "data")
    linked, direct = open_set("folder", tmp_path / "disk"), open_set("folder", tmp_path / "root")
    assert all(torch.equal(a.images, b.images) for a, b in zip(linked.clients, direct.clients, strict=True))


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_of_any_depth_is_a_value_or_a_value_error():
    assert parse_json('{"a": [1]}') == {"a": [1]}
    for deep in ("[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5000, "", "{"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(deep)
