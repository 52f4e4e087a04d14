"""Images that belong together, of one patient, volume or picture: they are shared out and held out as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedkern.errors import UserError
from fedkern.streams import stream

Rows = npt.NDArray[np.int64]


def grouped_rows(names: Sequence[str] | None, cases: Tensor | None, patients: Tensor | None) -> Rows | None:
    """int64 ``[n]``, counted from 0: the patient, case or image of every row, the first of these that is known.

    Whoever is to know nothing of a row may have no other one of the same number; None where every row stands alone.  An
    image with several texts has a row for each of them under one name, numbered as they come first.
    """
    known = cases if patients is None else patients
    if known is None:
        numbers: dict[str, int] = {}
        images = [numbers.setdefault(name, len(numbers)) for name in names or ()]
        return np.array(images, dtype=np.int64) if len(numbers) < len(images) else None
    position = np.unique(known.numpy(), return_inverse=True)[1].astype(np.int64)
    return position if position.max(initial=-1) + 1 < len(position) else None


def drawn_rows(rng: np.random.Generator, count: int, units: Rows | None) -> list[Rows]:
    """The rows 0 to ``count`` in random order, an array for all of one unit; ``units`` as :func:`wholes` gives them."""
    order = rng.permutation(count if units is None else int(units.max()) + 1)
    if units is None:
        return list(order[:, None])
    pieces = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])
    return [pieces[unit] for unit in order.tolist()]


def share_units(units: Rows, share: Callable[[Rows], list[Rows]]) -> list[Rows]:
    """Shares out rows by what they are part of, as :func:`wholes` gives it.

    Args:
        share: shares out units by the first row of each, int64 ``[m]``: an array of unit numbers for every client.

    Returns:
        A sorted array of rows for every client.
    """
    first = np.unique(units, return_index=True)[1].astype(np.int64)
    return [np.flatnonzero(np.isin(units, part)) for part in share(first)]


def share_cases(cases: Rows, labels: Rows, share: Callable[[Rows, Rows], list[Rows]]) -> list[Rows]:
    """Shares out rows by their cases.

    Args:
        cases: int64 ``[n]``, the case of every row.
        labels: int64 ``[n]``; a case counts as the class that most of its rows have, among the objects (above 0) where
            it has any.
        share: shares out cases by their classes int64 ``[m]`` and the first row of each, int64 ``[m]``: a sorted array
            of case positions for every client.

    Returns:
        A sorted array of rows for every client.
    """
    _, first, position = np.unique(cases, return_index=True, return_inverse=True)
    counts = np.zeros((len(first), int(labels.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts, (position, labels), 1)
    counts[:, 0] = counts[:, 1:].sum(1) == 0
    return [np.flatnonzero(np.isin(position, part)) for part in share(counts.argmax(1), first)]


def training_cases(name: str, cases: Rows, count: int | None, public: int, seed: int) -> tuple[Rows, Rows]:
    """The rows that clients share out and the public ones, both sorted, which have no case in common.

    Cases are taken whole, in random order; the last one of the clients is cut where ``count`` says so.

    Raises:
        UserError: there are too few rows.
    """
    names, position = np.unique(cases, return_inverse=True)
    place = np.empty(len(names), dtype=np.int64)
    place[stream(seed, "train-samples").permutation(len(names))] = np.arange(len(names))
    order = np.argsort(place[position], kind="stable")
    shown = order[len(order) - public :]
    left = order[~np.isin(position[order], position[shown])]
    if len(left) == 0 or (count is not None and count > len(left)):
        wanted = f"give {count}" if count is not None else "train on the others"
        beside = f" beside {public} public ones, whose {len(order) - len(left)} images of the same cases no client gets"
        raise UserError(
            f'data set "{name}" has {len(order)} training images of {len(names)} cases, so it cannot {wanted}'
            f"{beside if public else ''}"
        )
    return np.sort(left[:count]), np.sort(shown)
