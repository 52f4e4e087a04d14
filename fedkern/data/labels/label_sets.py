"""Several labels per image, from cells of a CSV file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedkern.data.labels.spelling import classes_of, clean_cell, describe_missing
from fedkern.errors import UserError

COLUMN = "labels"
"""Column with several labels per image; a column ``label`` with one class per image takes precedence."""
SEPARATOR = "|"


def check_several(counts: Sequence[int], task: str, where: str, single: str, several: str) -> None:
    """Raise UserError for one-hot labels that the user has not declared as several labels per image.

    They look like classes, which have another loss and other metrics and methods.  ``single`` and ``several``: advice
    for both cases.
    """
    if task == "auto" and len(counts) and set(counts) == {1}:
        raise UserError(
            f"{where}: every image has exactly one label; where these are classes, {single}; where an image may have "
            f"several labels or none, {several}"
        )


def parse_label_sets(
    cells: Sequence[str], where: str, data: str, order: str = ""
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8], list[str]]:
    """Return label names, uint8 ``[n, L]`` (1 where the row has the label), and notices on spelling.

    ``order`` is as in `classes_of`.
    """
    parts = [[part.strip() for part in cell.split(SEPARATOR)] for cell in cells]
    split = [[part for part in row if clean_cell(part)] for row in parts]
    names, numbers, notices = classes_of([name for row in split for name in row], where[:1].upper() + where[1:], order)
    if not names:
        raise UserError(f'data set "{data}": {where} names no label, expected two or more, joined by "{SEPARATOR}"')
    notices = [*describe_missing((part for row in parts for part in row), f"Labels of {where}"), *notices]
    sets = np.zeros((len(split), len(names)), dtype=np.uint8)
    sets[np.repeat(np.arange(len(split)), [len(row) for row in split]), numbers] = 1
    return names, sets, notices
