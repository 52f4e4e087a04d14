"""Predictions of the final network for every test image (predictions.csv)."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkern.errors import UserError
from fedkern.files import atomic
from fedkern.tasks import Task

FILE = "predictions.csv"
COLUMNS = ("test_set", "sample", "true_class", "predicted_class")


def check(task: Task, *, told: bool) -> None:
    if not task.offers >= {"classes", "criterion"}:
        raise UserError(
            f"--predictions writes a class for every image, and these data are for {task.name}: leave it out, or take "
            "data for classification."
        )
    if not told:
        raise UserError(
            "--predictions writes the true class of every test image, and the records of this run are private: leave "
            "it out, or start the same run with --records all."
        )


def write(
    out: Path,
    names: Sequence[str],
    sets: Mapping[str, tuple[Sequence[str] | None, Tensor, Sequence[tuple[int | None, Tensor]]]],
) -> None:
    """Write a row per sample (and client, if clients have networks of their own), atomically.

    The columns are the test set, possibly the ``client``, the sample's name, its true class, the predicted class and
    the probability of every class (``p_NAME``), rounded to 8 digits.

    Args:
        sets: by test set the images' names (None: their row numbers), labels int64 [n], and the logits [n, C] of every
            network with its client.
    """
    clients = any(client is not None for _, _, outputs in sets.values() for client, _ in outputs)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [*COLUMNS, *(f"p_{name}" for name in names)]
    table.writerow([columns[0], "client", *columns[1:]] if clients else columns)
    for name, (ids, labels, outputs) in sets.items():
        for client, logits in outputs:
            before: list[Any] = [name, "" if client is None else client] if clients else [name]
            logits = logits.double()
            predicted = logits.argmax(1).tolist()
            for i, (label, values) in enumerate(zip(labels.tolist(), logits.softmax(1), strict=True)):
                row = [str(i) if ids is None else ids[i], names[label], names[predicted[i]]]
                table.writerow([*before, *row, *(f"{value:.8g}" for value in values.tolist())])
    atomic.write_bytes(out / FILE, text.getvalue().encode("utf-8", "backslashreplace"))
