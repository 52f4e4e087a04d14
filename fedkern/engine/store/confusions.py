"""Confusion matrices of the final network (confusion.json)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedkern.engine.store.checkpoints import check_results
from fedkern.files import atomic
from fedkern.files.filesystem import describe_file_kind, read_json, report_damage

FILE = "confusion.json"
LARGEST = 1 << 53
"""First count that other programs' JSON cannot hold exactly; no test set is as large."""


@dataclass(frozen=True)
class Confusions:
    """Confusion matrices of a run's final network.

    Attributes:
        classes: class names, in label order.
        matrices: int64 [C, C] by test set: number of images by true class (row) and predicted class (column).
    """

    classes: tuple[str, ...]
    matrices: Mapping[str, npt.NDArray[np.int64]]


def write(out: Path, classes: Sequence[str], matrices: Mapping[str, Tensor]) -> None:
    sets = {name: matrix.tolist() for name, matrix in matrices.items()}
    atomic.write_bytes(out / FILE, (json.dumps({"classes": list(classes), "test_sets": sets}) + "\n").encode())


def read(out: Path) -> Confusions | None:
    """Return the matrices of a run folder, or None."""
    path = out / FILE
    check_results(out, FILE)
    if describe_file_kind(path) == "missing":
        return None
    with report_damage(f"{path} is damaged", "delete it, only a picture is lost"):
        content = read_json(path)
        classes, sets = content["classes"], content["test_sets"]
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError("its classes are no list of names")
        if not (isinstance(sets, dict) and all(_square(rows, len(classes)) for rows in sets.values())):
            raise ValueError("a matrix does not have a count for every two classes")
        matrices = {name: np.array(rows, dtype=np.int64).reshape(len(classes), -1) for name, rows in sets.items()}
    return Confusions(tuple(classes), matrices)


def _square(rows: object, side: int) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == side
        and all(isinstance(row, list) and len(row) == side for row in rows)
        and all(type(count) is int and 0 <= count < LARGEST for row in rows for count in row)
    )
