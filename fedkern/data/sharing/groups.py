"""Groups of samples that must stay together: images of one patient, volume or picture go to one client and one split.

A unit is such a group; :func:`grouped_rows` numbers the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedkern.errors import UserError
from fedkern.streams import stream

Rows = npt.NDArray[np.int64]


def grouped_rows(names: Sequence[str] | None, cases: Tensor | None, patients: Tensor | None) -> Rows | None:
    """Return the unit of every row, int64 ``[n]`` from 0: its patient, case or image, the first of these that is known.

    Rows with the same number belong to one patient, case or image and must stay in one split.  None means that every
    row stands alone.  An image with several texts has one row per text, all under one name; images are numbered in
    order of first appearance.
    """
    units = cases if patients is None else patients
    if units is None:
        numbers: dict[str, int] = {}
        images = [numbers.setdefault(name, len(numbers)) for name in names or ()]
        return np.array(images, dtype=np.int64) if len(numbers) < len(images) else None
    position = np.unique(units.numpy(), return_inverse=True)[1].astype(np.int64)
    return position if position.max(initial=-1) + 1 < len(position) else None


def hash_names(names: Iterable[str]) -> Rows:
    """Return a hash of every name, int64 ``[n]``, so that no other name changes a draw that depends on it."""
    hashes = b"".join(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest() for name in names)
    return np.frombuffer(hashes, dtype="<i8").astype(np.int64)


def unit_noun(cases: Tensor | None, patients: Tensor | None) -> str:
    """Return the noun for units of :func:`grouped_rows`, in the plural."""
    return "patients" if patients is not None else "different images" if cases is None else "cases"


def rows_of_units(units: Rows) -> list[Rows]:
    """Rows of every unit in ascending order.

    ``units``, int64 ``[n]``, counts from 0 without gaps.
    """
    return np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])


def rows_by_owner(owners: Rows, count: int) -> list[Rows]:
    """Rows of every owner in ascending order.

    Args:
        owners: int64 ``[n]``, the owner of every row; a row whose number is below 0 or not below ``count`` has none.
    """
    order = np.argsort(owners, kind="stable").astype(np.int64)
    cuts = np.searchsorted(owners[order], np.arange(count + 1))
    return [order[begin:end] for begin, end in pairwise(cuts.tolist())]


def _owners(parts: Sequence[Rows], count: int) -> Rows:
    """Return the client of every unit, int64 ``[count]``, from the units of every client.

    -1 where no client has the unit.
    """
    owners = np.full(count, -1, dtype=np.int64)
    for k, part in enumerate(parts):
        owners[part] = k
    return owners


def drawn_rows(rng: np.random.Generator, count: int, units: Rows | None) -> list[Rows]:
    """Rows 0 to ``count`` - 1 in random order, one array per unit.

    ``units`` comes from :func:`grouped_rows`.
    """
    order = rng.permutation(count if units is None else int(units.max()) + 1)
    if units is None:
        return list(order[:, None])
    pieces = rows_of_units(units)
    return [pieces[unit] for unit in order.tolist()]


def share_units(units: Rows, share: Callable[[Rows, Rows], list[Rows]]) -> list[Rows]:
    """Shares out rows by unit.

    Args:
        units: int64 ``[n]``, the unit of every row, from :func:`grouped_rows`.
        share: maps the first row of every unit and its number of rows, both int64 ``[m]``, to an array of unit numbers
            for every client.

    Returns:
        A sorted array of rows for every client.
    """
    first_rows = np.unique(units, return_index=True)[1].astype(np.int64)
    parts = share(first_rows, np.bincount(units))
    return rows_by_owner(_owners(parts, len(first_rows))[units], len(parts))


def share_cases(cases: Rows, labels: Rows, share: Callable[[Rows, Rows, Rows], list[Rows]]) -> list[Rows]:
    """Shares out rows by their cases.

    Args:
        cases: int64 ``[n]``, the case of every row.
        labels: int64 ``[n]``, the class of every row.  The class of a case is the class that most of its rows have;
            class 0 counts only where the case has no other.
        share: maps the class, the first row and the number of rows of every case, each int64 ``[m]``, to a sorted array
            of case positions for every client.

    Returns:
        A sorted array of rows for every client.
    """
    _, first_rows, position = np.unique(cases, return_index=True, return_inverse=True)
    counts = np.zeros((len(first_rows), int(labels.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts, (position, labels), 1)
    counts[:, 0] = counts[:, 1:].sum(1) == 0
    parts = share(counts.argmax(1), first_rows, np.bincount(position))
    return rows_by_owner(_owners(parts, len(first_rows))[position], len(parts))


def training_cases(
    name: str, cases: Rows, count: int | None, public: int, seed: int, unit: str = "cases"
) -> tuple[Rows, Rows]:
    """Return the training rows of all clients and the public rows, both sorted.

    No case has rows in both.

    Cases are taken in random order.  Clients get whole cases, but ``count`` may cut the last one.  ``public`` may cut a
    case too; the other images of that case go to no client.  ``unit`` is what a case is, from :func:`unit_noun`.

    Raises:
        UserError: there are too few rows.
    """
    names, position = np.unique(cases, return_inverse=True)
    place = np.empty(len(names), dtype=np.int64)
    place[stream(seed, "train-samples").permutation(len(names))] = np.arange(len(names))
    order = np.argsort(place[position], kind="stable")
    public_rows = order[len(order) - public :]
    pool = order[~np.isin(position[order], position[public_rows])]
    if len(pool) == 0 or (count is not None and count > len(pool)):
        request = f"give {count}" if count is not None else "train on the others"
        beside = f" beside {public} public ones, whose {len(order) - len(pool)} images of the same {unit} nobody gets"
        raise UserError(
            f'data set "{name}" has {len(order)} training images of {len(names)} {unit}, so it cannot {request}'
            f"{beside if public else ''}"
        )
    return np.sort(pool[:count]), np.sort(public_rows)
