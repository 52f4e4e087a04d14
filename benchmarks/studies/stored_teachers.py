"""Disk and error of a teacher of Fed-LPFM that is stored at few of 100 classes.

    python -m benchmarks.studies.stored_teachers --data-root DIR

A class is a two-digit number.  Writes ``benchmarks/studies/results/stored_teachers.json``.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

import fedkern
from benchmarks.page import RESULTS
from benchmarks.recorded import recorded_versions
from fedkern.data.sources.idx import open_idx
from fedkern.data.types import Pool, Source, memory_pool
from fedkern.models.teachers.teacher_cache import LogitsCache, by_key, pack_top, read_file, unpack_top
from fedkern.ops._distill.sparse import fill_classes

KEPT = (0, 16, 8, 4, 2, 1)
TEMPERATURES = (1.0, 4.0)
SETTINGS: dict[str, Any] = {
    "clients": 5, "partition": "iid", "train_samples": 3000, "public_samples": 3000, "model": "cnn", "rounds": 1,
    "seed": 0, "teacher": "pretrained:cnn/32",
}  # fmt: skip


def make_numbers(root: Path) -> Source:
    """Return numbers 00 to 99 as uint8 ``[n, 1, 28, 28]``: two digits of MNIST side by side, at half their width."""
    mnist = open_idx("mnist", root)
    train, validation, test = map(
        join_digits, (mnist.train, mnist.validation, mnist.tests[""]), ("train", "val", "test")
    )
    names = tuple(f"{number:02}" for number in range(100))
    return replace(mnist, classes=names, train=train, validation=validation, tests={"": test})


def join_digits(pool: Pool, name: str) -> Pool:
    count = len(pool.labels) // 2
    narrow = avg_pool2d(pool.read(torch.arange(2 * count))[0].float(), (1, 2)).to(torch.uint8)
    labels = pool.labels[: 2 * count].unflatten(0, (count, 2))
    return memory_pool(torch.cat([narrow[::2], narrow[1::2]], 3), 10 * labels[:, 0] + labels[:, 1], name)


def measure_stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Return, by number of stored classes, bytes an image on disk and the distance to the whole teacher.

    The distance is half the sum over classes of the differences of probabilities, its mean over the images, at each of
    :data:`TEMPERATURES`: so far may a gradient be from the whole teacher's, in parts of the largest.
    """
    (path,) = folder.glob("logits-cnn*")
    stored, cache, figures = read_file(path), LogitsCache(folder / "stored", (0.0,), (1.0,)), {}
    logits = stored["logits"]
    for kept in KEPT:
        identity, apart = {"top": kept}, []
        for t in TEMPERATURES:
            packed = pack_top(logits, kept, t) if kept else logits
            values, classes = unpack_top(packed) if kept else (logits / t, torch.arange(100).expand_as(logits))
            full = fill_classes(values, classes.long(), 100, "spread")
            apart.append(float((full.softmax(1) - (logits / t).softmax(1)).abs().sum(1).mean() / 2))
        cache.write_logits(identity, by_key({**stored, "logits": packed}))
        figures[f"{kept}"] = {"bytes": cache.path("logits", identity).stat().st_size / len(logits), "apart": apart}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", required=True)
    given = {**SETTINGS, "data": f"{__file__}:make_numbers", "data_root": parser.parse_args().data_root}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "teachers"
        run = fedkern.simulate("fedlpfm", **given, teacher_cache=cache, out=Path(folder) / "run", pictures=False)
        rows, accuracy = measure_stored(cache), run.metrics["teacher_accuracy"]
    content = {"settings": SETTINGS, "teacher_accuracy": accuracy, "temperatures": TEMPERATURES, "kept": rows}
    text = json.dumps({**content, "versions": recorded_versions()}, indent=1)
    (RESULTS / "stored_teachers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
