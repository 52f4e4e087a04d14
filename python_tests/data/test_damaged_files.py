"""Tests of every loader on truncated, overwritten and hostile files: success or one sentence, and nothing else.

The quick version draws a few variants of every kind of file; the long one (``-m slow``) hundreds.
"""

import gzip
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from fedkern.data import load
from fedkern.data.images.detections import BoxesFile, Detections
from fedkern.data.split import Split
from fedkern.engine.store.artifacts import read as read_shown
from fedkern.engine.store.checkpoints import Checkpoints
from fedkern.engine.store.record_files import read_metrics, read_summary
from fedkern.errors import UserError
from fedkern.models.pretrained.preprocessing import Preprocessing
from fedkern.models.teachers.clip import read_prompts
from fedkern.settings.stored import load_settings
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


def ground(path: Path, number: int, mode: str = "RGB", **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **settings)


def folder(root: Path) -> list[Path]:
    kinds = ("png", "jpg", "gif", "bmp", "webp", "tif")
    for name in "ab":
        for j in range(6):
            ground(root / name / f"{j}.{kinds[j]}", j + 6 * (name == "b"))
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
        ground(root / "images" / f"{j}.png", j)
        ground(root / "masks" / f"{j}.png", j, "1")
    return [root / "masks" / "0.png"]


def pairs(root: Path) -> list[Path]:
    for j in range(8):
        ground(root / f"{j}.png", j)
        (root / f"{j}.txt").write_text(f"caption {j}")
    return [root / "0.txt"]


def csv(root: Path) -> list[Path]:
    folder(root)
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.glob("?/*"))]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows))
    return [root / "list.csv"]


MAKERS = {"folder": folder, "mnist": mnist, "svhn": svhn, "cifar10": cifar, BRATS: brats,
          "segmentation": segmentation, "pairs": pairs, "csv": csv}  # fmt: skip


def check_data(name: str, root: Path, count: int, seed: int) -> None:
    options = {"size": 8} if name in ("folder", BRATS, "segmentation", "pairs", "csv") else {}
    options |= {"modalities": "t1"} if name == BRATS else {}
    files = MAKERS[name](root)

    def open_data() -> None:
        load(name, root=root, clients=2, partition="iid", options=options)

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


@pytest.fixture
def _papers(registries):
    open_all()


@pytest.mark.usefixtures("_papers")
@pytest.mark.parametrize("name", MAKERS, ids=[make.__name__ for make in MAKERS.values()])
def test_data_files(tmp_path, name):
    check_data(name, tmp_path, count=3 if name in ("folder", BRATS) else 8, seed=0)


@pytest.mark.slow
@pytest.mark.usefixtures("_papers")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MAKERS, ids=[make.__name__ for make in MAKERS.values()])
def test_many_data_files(tmp_path, name, seed):
    check_data(name, tmp_path, count=150, seed=seed + 1)


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
