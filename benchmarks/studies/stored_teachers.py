"""Fed-LPFM at 100 classes with teachers that are stored at few of them: disk, error and accuracy.

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
from torch import Tensor
from torch.nn.functional import avg_pool2d

import fedkern
from benchmarks.page import RESULTS
from benchmarks.recorded import recorded_versions
from fedkern.data.sources.idx import open_idx
from fedkern.data.types import Pool, Source, memory_pool
from fedkern.models.teachers.teacher_cache import pack_top, read_file, unpack_top
from fedkern.ops._distill.sparse import fill_classes

KEPT = (0, 16, 8, 4, 2, 1)
SEEDS = (0, 1, 2)
TEMPERATURES = (1.0, 4.0)
SETTINGS = {
    "clients": 5, "partition": "classes:20", "train_samples": 5000, "public_samples": 5000, "test_samples": 2000,
    "model": "cnn", "width": 16, "rounds": 20, "local_epochs": 1, "batch_size": 32, "lr": 0.05, "momentum": 0.9,
    "eval_every": 20, "grad_cam": 0, "teacher": "pretrained:resnet8/32", "lambda": 0.9, "temperature": 4.0,
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


def measure_stored(folder: Path) -> dict[int, dict[str, float]]:
    """Return, by number of stored classes, bytes an image on disk and the distance to the whole teacher.

    The distance is half the sum over classes of the differences of probabilities, its mean over the images, at each of
    :data:`TEMPERATURES`: so far may a gradient be from the whole teacher's, in parts of the largest.
    """
    files = {read_file(path)["logits"].shape[1]: path for path in folder.glob("logits-resnet8*")}
    logits = read_file(files[100])["logits"]
    figures = {}
    for kept in KEPT:
        path = files[2 * kept or 100]
        full = fill_classes(*_stored(logits, kept), 100, "spread") if kept else logits
        apart = [(full / t).softmax(1).sub((logits / t).softmax(1)).abs().sum(1).mean() / 2 for t in TEMPERATURES]
        figures[kept] = {"bytes": path.stat().st_size / len(logits), "apart": [float(x) for x in apart]}
    return figures


def _stored(logits: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    values, classes = unpack_top(pack_top(logits, kept))
    return values, classes.long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", required=True)
    root = parser.parse_args().data_root
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            common = {**SETTINGS, "data": f"{__file__}:make_numbers", "data_root": root, "seed": seed}
            cache = Path(folder) / f"teachers-{seed}"
            for name, options in {"FedAvg": {"lambda": 0.0}, **{f"{k}": {"teacher_top_k": k} for k in KEPT}}.items():
                given = {**common, **options, "teacher_cache": cache, "out": Path(folder) / f"{name}-{seed}"}
                run = fedkern.simulate("fedlpfm", progress=False, pictures=False, **given)
                rows.setdefault(name, {"accuracy": []})["accuracy"].append(run.metrics["accuracy"])
                print(seed, name, run.metrics, flush=True)
            if seed == SEEDS[0]:
                for kept, figures in measure_stored(cache).items():
                    rows[f"{kept}"].update(figures)
    content = {"settings": SETTINGS, "seeds": SEEDS, "temperatures": TEMPERATURES, "rows": rows}
    text = json.dumps({**content, "versions": recorded_versions()}, indent=1)
    (RESULTS / "stored_teachers.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
