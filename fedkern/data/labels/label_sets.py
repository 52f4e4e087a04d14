"""Several labels an image: what is taken for them, and cells of a CSV file that become 0 and 1 for every label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedkern.data.labels.spelling import classes_of, clean_cell, describe_missing
from fedkern.errors import UserError

COLUMN = "labels"
"""Column with the labels of an image; a column ``label`` with one class an image comes before it."""
SEPARATOR = "|"


def check_several(counts: Sequence[int], task: str, where: str, single: str, several: str) -> None:
    """Raise UserError where every image has exactly one label and nobody says that these are several labels an image.

    One label in every image is what a single class an image looks like (one-hot labels), which has another loss, other
    figures and other methods.

    Args:
        counts: labels of every image of all sets.
        task: the user's word for the task, or ``"auto"``.
        where: what holds the labels, in words.
        single, several: ways out, in words.
    """
    if task == "auto" and len(counts) and set(counts) == {1}:
        raise UserError(
            f"{where}: every image has exactly one label; where these are classes, {single}; where an image may have "
            f"several labels or none, {several}"
        )


def label_sets(
    cells: Sequence[str], where: str, data: str, order: str = ""
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8], list[str]]:
    """Return the labels of every row.

    Args:
        cells: the values of the column; an empty one has no label.
        where: the column and its file in words, for messages.
        order: as in `classes_of`.

    Returns:
        The names of the labels; uint8 ``[n, L]``, 1 where the row has the label; and sentences on labels that are
        written in several ways, or count as empty.

    Raises:
        UserError: the rows name no label.
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
