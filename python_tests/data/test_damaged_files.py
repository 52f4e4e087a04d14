"""Tests of every loader on truncated, overwritten and hostile files: success or one sentence, in little memory."""

import gzip
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from scipy.io import savemat

from fedkern.data import load
from fedkern.data.images.detections import BoxesFile, Detections
from fedkern.data.images.image_files import FORMATS, ImageFiles, list_images, open_image, read_mask
from fedkern.data.sources.table import gunzip
from fedkern.data.split import Split
from fedkern.engine.store.artifacts import read as read_shown
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.files.filesystem import open_regular, parse_json
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.teachers.clip import read_prompts
from fedkern.run import main
from fedkern.settings.config import load_settings
from python_tests.in_time import in_time
from python_tests.papers_data import BRATS, open_all

JSON = (
    "", "null", "[]", "{}", "1", '"x"', "NaN", "[[[", "[" * 50_000, '{"a":' * 50_000, "9" * 5000, "1e999", "\ufeff{}",
    '{"boxes": null}', '{"boxes": []}', '{"boxes": {"a": 1}}', '{"boxes": {"a": [1]}}', '{"boxes": {"a": [[1]]}}',
    '{"boxes": {"a": ["abcd"]}}', '{"boxes": {"a": [[1, 2, 3, NaN]]}}', '{"boxes": {"a": [[1, 2, 3, "4"]]}}',
    '{"boxes": {"a": [[1, 2, 3, 1e999]]}}', '{"boxes": {"\\ud800": [[1, 2, 3, 4]]}}', '{"boxes": {"": [{}]}}',
    '{"boxes": {"a": [[1, 2, [3], {}]]}}', '{"boxes": {"a": [[1, 2, 3, ' + "9" * 400 + "]]}}", '{"a": null, "b": "x"}',
    '{"a": [], "b": "x"}', '{"a": [1], "b": "x"}', '{"a": {"b": 1}, "b": "x"}', '{"size": []}',
    '{"size": {"height": "x"}}',
    '{"size": -1}', '{"resample": []}', '{"image_mean": 3}', '{"image_mean": ["x"]}', '{"rescale_factor": 0}',
    '{"format": 1}', '{"format": 1, "entries": 3}', '{"format": 1, "entries": [3]}', '{"format": [], "entries": []}',
    '{"format": 1, "entries": [{}]}', '{"format": 1, "entries": [{"round": {}, "sum": []}]}',
)  # fmt: skip
TEXT = (
    "", "\n", "\0", "a", ",", "path,label\n", "path,label\na.png\n", "path,label\n,\n", "path,path\na,a\n",
    '"', 'path,"label\n',
    "path,label\n\0,\0\n", "path,label\n" + "x" * 200_000 + ",1\n", "path;label\n../../../etc;1\n",
    "\x85\u2028,\u2028\n",
    "image,text\n.,.\n", "image,mask\n/,/\n", "image,report\n~nobody,\x1b[2J\n", "n1\nn1\n", "n1\n../..\n",
    "[a\n", "a = 1\n",
    "a = [" * 5000, "method = 3\n", 'method = "fedavg"\nrounds = 1e999\n', 'method = "fedavg"\noptions = 1\n',
    'method = "fedavg"\ndata_root = "\\u0000"\n', "{class}\n", "#\n", "x" * 200_000,
)  # fmt: skip


def variants(content: bytes, rng: np.random.Generator, count: int) -> list[bytes]:
    """Return damaged copies: cut off, overwritten, a stretch removed, doubled or zeroed, more at the end."""
    made = [b"", content[:1], content + content, content + b"\0", bytes(len(content)), b"\xff" * 64]
    kinds = rng.integers(0, 6, count)
    for kind in kinds.tolist():
        raw = bytearray(content)
        at = int(rng.integers(len(raw)))
        length = int(rng.integers(1, 64))
        if kind == 0:
            raw = raw[:at]
        elif kind == 1:  # in the header, where sizes are
            raw[int(rng.integers(min(len(raw), 400)))] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            for place in rng.integers(0, len(raw), length).tolist():
                raw[place] = int(rng.integers(256))
        elif kind == 3:
            del raw[at : at + length]
        elif kind == 4:
            raw[at : at + length] = bytes(len(raw[at : at + length]))
        else:
            raw[at:at] = rng.bytes(length)
        made.append(bytes(raw))
    return made


def harmless(work, *given):
    """Call ``work``, and return whether it succeeded.

    Any error but a UserError of a readable length is a failure.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            work(*given)
            return True
        except UserError as error:
            said = str(error)
    assert 0 < len(said) <= 4000
    return False


def picture(path: Path, number: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(root: Path) -> list[Path]:
    kinds = ("png", "jpg", "gif", "bmp", "webp", "tif")
    for name in "ab":
        for j in range(6):
            picture(root / name / f"{j}.{kinds[j]}", j + 6 * (name == "b"))
    return [root / "a" / f"{j}.{kinds[j]}" for j in range(6)]


def mnist(root: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 10)):
        images = b"\0\0\x08\x03" + np.array([count, 8, 8], ">u4").tobytes() + rng.bytes(64 * count)
        labels = b"\0\0\x08\x01" + np.array([count], ">u4").tobytes() + bytes(i % 10 for i in range(count))
        for name, raw in (("images-idx3", images), ("labels-idx1", labels)):
            (root / f"{split}-{name}-ubyte").write_bytes(raw)
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress((root / "train-images-idx3-ubyte").read_bytes()))
    (root / "train-images-idx3-ubyte").unlink()
    return [root / "train-images-idx3-ubyte.gz", root / "train-labels-idx1-ubyte"]


def svhn(root: Path) -> list[Path]:
    for name in ("train_32x32.mat", "test_32x32.mat"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        savemat(root / name, {"X": pixels, "y": np.arange(20)[:, None] % 10 + 1.0}, do_compression=name[1] == "r")
    return [root / "train_32x32.mat", root / "test_32x32.mat"]


def cifar(root: Path) -> list[Path]:
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (root / name).write_bytes(b"".join(bytes([i]) + bytes([i]) * 3072 for i in range(10)))
    return [root / "data_batch_1.bin"]


def brats(root: Path) -> list[Path]:
    nibabel = pytest.importorskip("nibabel", reason="writes volumes with nibabel (the extra medical)")
    for i in range(6):
        (root / f"c{i}").mkdir()
        for name in ("t1", "seg"):
            values = np.random.default_rng(i).integers(0, 2, (6, 5, 4)).astype(np.uint8 if name == "seg" else np.int16)
            ending = ".nii" if i == 1 else ".nii.gz"
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / f"c{i}" / f"c{i}_{name}{ending}")
    return [root / "c0" / "c0_seg.nii.gz", root / "c0" / "c0_t1.nii.gz", root / "c1" / "c1_seg.nii"]


def segmentation(root: Path) -> list[Path]:
    for j in range(8):
        picture(root / "images" / f"{j}.png", j)
        picture(root / "masks" / f"{j}.png", j, "1")
    return [root / "masks" / "0.png"]


def pairs(root: Path) -> list[Path]:
    for j in range(8):
        picture(root / f"{j}.png", j)
        (root / f"{j}.txt").write_text(f"caption {j}")
    return [root / "0.txt"]


def csv(root: Path) -> list[Path]:
    folder(root)
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("?/*"))]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows))
    return [root / "list.csv"]


MAKERS = {"folder": folder, "mnist": mnist, "svhn": svhn, "cifar10": cifar, BRATS: brats,
          "segmentation": segmentation, "pairs": pairs, "csv": csv}  # fmt: skip


@pytest.fixture
def _papers(registries):
    open_all()


@pytest.mark.usefixtures("_papers")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("name", MAKERS, ids=[make.__name__ for make in MAKERS.values()])
def test_data_files(tmp_path, name, seed):
    options = {"size": 8} if name in ("folder", BRATS, "segmentation", "pairs", "csv") else {}
    options |= {"modalities": "t1"} if name == BRATS else {}
    count = 150 if seed else 3 if name in ("folder", BRATS) else 8
    files = MAKERS[name](tmp_path)

    def open_data() -> None:
        load(name, root=tmp_path, clients=2, partition="iid", options=options)

    assert harmless(open_data)
    rng = np.random.default_rng(seed)
    refused = 0
    for path in files:
        content = path.read_bytes()
        for variant in [*variants(content, rng, count), *(text.encode() for text in TEXT if path.suffix == ".csv")]:
            path.write_bytes(variant)
            try:
                refused += not harmless(open_data)
            except Exception as error:
                raise AssertionError(f"{path.name}: {type(error).__name__}: {error}; {variant[:400]!r}") from error
        path.write_bytes(content)
    assert refused


class Blind:
    """Detector that sees nothing."""

    identity: ClassVar = {"model": "blind"}

    def detect(self, images, name):
        return [torch.zeros(0, 4)] * len(images)


def detections(path: Path) -> None:
    made = Detections(Blind(), cache=path.parent)
    made.path = path
    split = Split(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    made.boxes(split, ["a"])


READERS = {
    "boxes.json": lambda path: BoxesFile(path, ["a"]),
    "boxes.csv": lambda path: BoxesFile(path, ["a"]),
    "prompts.json": lambda path: read_prompts(str(path), ["a", "b"]),
    "prompts.txt": lambda path: read_prompts(str(path), ["a", "b"]),
    "detections.json": detections,
    "preprocessor_config.json": lambda path: Preprocessing.read(path.parent, (0.5,), (0.5,), 8),
    "manifest.json": lambda path: Checkpoints(path.parent.parent).peek(),
    "config.toml": lambda path: load_settings(path.parent),
    "metrics.jsonl": lambda path: read_metrics(path.parent),
    "summary.json": lambda path: read_summary(path.parent),
    "shown.safetensors": lambda path: read_shown(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_texts(tmp_path, name):
    path = tmp_path / ("checkpoints" if name == "manifest.json" else "x") / name
    path.parent.mkdir()
    contents = [text.encode(errors="surrogatepass") for text in (*JSON, *TEXT)] + [b"\xff\xfe", b"\x80", bytes(100)]
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            refused += not harmless(READERS[name], path)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}; {content[:200]!r}") from error
    assert refused or name == "summary.json"  # which is then None, and the run goes on to write it


# -- hostile files -----------------------------------------------------------------------------------------------------


def class_folders(root, classes="ab", images=6):
    for i, name in enumerate(classes):
        for j in range(images):
            picture(root / name / f"{j}.png", 10 * i + j)


def open_set(name, root):
    return load(name, root=root, clients=2, partition="iid", options={"size": 8})


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


def huge_png(path, side):
    """Return a PNG's header alone, of a picture that would be decoded from a few hundred kilobytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [7_100, 10_000, 30_000])  # above ours; where Pillow warns; where it raises
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path, side):
    path = tmp_path / "huge.png"
    huge_png(path, side)
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=rf"has {side}x{side} pixels, more than 50,0.*--max-image-pixels {side**2}"):
            ImageFiles([path], 8, "folder").read()
    with open_image(path, side**2) as image:
        assert image.size == (side, side)
    assert before == Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("name", ["folder", "segmentation"])
def test_the_limit_is_an_option_of_every_set_of_images(tmp_path, name):
    MAKERS[name](tmp_path)
    settings = {"clients": 2, "partition": "iid"}
    with pytest.raises(UserError, match=r"pixels, more than 60: .*--max-image-pixels"):
        load(name, root=tmp_path, options={"size": 8, "max_image_pixels": 60}, **settings)
    load(name, root=tmp_path, options={"size": 8, "max_image_pixels": 480}, **settings)


def test_the_limit_is_a_flag(tmp_path, capsys):
    class_folders(tmp_path / "data")
    words = ["fedavg", "--data", "folder", "--data-root", str(tmp_path / "data"), "--partition", "iid",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert main([*words, "--max-image-pixels", "63"]) == 2
    assert "has 20x24 pixels, more than 63" in capsys.readouterr().err
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


def test_a_caption_is_a_regular_file_or_a_link_to_one(tmp_path):
    root = tmp_path / "pairs"
    pairs(root)
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
    assert "it is a named pipe, not a regular file" in in_time(lambda: READERS[name](tmp_path / name))


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
        pairs(root)
        link(root / "0.png", root / "9.png")
        (root / "9.txt").write_text("another caption")
    elif name == "pairs that loop":
        pairs(root)
        (root / "again").symlink_to(".")
    elif name == "segmentation":
        segmentation(root)
        link(root / "images" / "0.png", root / "images" / "9.png")
        link(root / "masks" / "0.png", root / "masks" / "9.png")
    else:
        class_folders(root)
        link(root / "a" / "0.png", root / "b" / "6.png")
        rows = [(f"{name}/{j}.png", name) for name in "ab" for j in range(6)] + [("b/6.png", "b")]
        header = {"csv": "path,label", "table of pairs": "image,text"}[name]
        text = "" if name == "csv" else "heart of normal size number "
        (root / "list.csv").write_text(f"{header}\n" + "".join(f"{path},{text}{label}\n" for path, label in rows))


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [
    "folder", "split folders", "pairs", "pairs that loop", "segmentation", "csv", "table of pairs",
])  # fmt: skip
def test_one_image_under_two_names(tmp_path, name, link):
    twice(tmp_path, name, link)
    data = {"split folders": "folder", "pairs that loop": "pairs", "table of pairs": "pairs"}.get(name, name)
    with pytest.raises(UserError, match=r"are one file, .*remove the link"):
        open_set(data, tmp_path)


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
