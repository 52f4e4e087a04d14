"""Units: samples of one patient, volume or picture, which stay together at one client and in one split."""

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
    """Return the unit of every row, int64 ``[n]`` from 0, or None if every row is its own unit.

    A unit is a patient, case or image, the first that is known; images are numbered by first appearance of their names.
    """
    units = cases if patients is None else patients
    if units is None:
        numbers: dict[str, int] = {}
        images = [numbers.setdefault(name, len(numbers)) for name in names or ()]
        return np.array(images, dtype=np.int64) if len(numbers) < len(images) else None
    position = np.unique(units.numpy(), return_inverse=True)[1].astype(np.int64)
    return position if position.max(initial=-1) + 1 < len(position) else None


def hash_names(names: Iterable[str]) -> Rows:
    """Hash every name to int64 ``[n]``, so that draws keyed by a hash depend on no other name."""
    hashes = b"".join(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest() for name in names)
    return np.frombuffer(hashes, dtype="<i8").astype(np.int64)


def unit_noun(cases: Tensor | None, patients: Tensor | None) -> str:
    return "patients" if patients is not None else "different images" if cases is None else "cases"


def rows_of_units(units: Rows) -> list[Rows]:
    """Return every unit's rows, ascending, from its numbers int64 ``[n]`` without gaps."""
    return np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])


def rows_by_owner(owners: Rows, count: int) -> list[Rows]:
    """Return every owner's rows, ascending, without rows of numbers outside 0 to ``count`` - 1."""
    order = np.argsort(owners, kind="stable").astype(np.int64)
    cuts = np.searchsorted(owners[order], np.arange(count + 1))
    return [order[begin:end] for begin, end in pairwise(cuts.tolist())]


def drawn_rows(rng: np.random.Generator, count: int, units: Rows | None) -> list[Rows]:
    """Return rows 0 to ``count`` - 1 in random order, one array per unit."""
    order = rng.permutation(count if units is None else int(units.max()) + 1)
    if units is None:
        return list(order[:, None])
    pieces = rows_of_units(units)
    return [pieces[unit] for unit in order.tolist()]


def share_units(units: Rows, share: Callable[[Rows, Rows], list[Rows]]) -> list[Rows]:
    """Share rows out by unit, sorted per client.

    ``share`` maps each unit's first row and number of rows, int64 ``[m]``, to unit numbers per client.
    """
    first_rows = np.unique(units, return_index=True)[1].astype(np.int64)
    parts = share(first_rows, np.bincount(units))
    owners = np.full(len(first_rows), -1, dtype=np.int64)  # the client of every unit
    for k, part in enumerate(parts):
        owners[part] = k
    return rows_by_owner(owners[units], len(parts))


def share_cases(cases: Rows, labels: Rows, share: Callable[[Rows, Rows, Rows], list[Rows]]) -> list[Rows]:
    """Share rows out by case, sorted per client.

    A case has the class of most of its rows; class 0 counts only without any other.  ``share`` maps each case's class,
    first row and number of rows, int64 ``[m]``, to case positions per client.
    """
    names, position = np.unique(cases, return_inverse=True)
    counts = np.zeros((len(names), int(labels.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts, (position, labels), 1)
    counts[:, 0] = counts[:, 1:].sum(1) == 0
    return share_units(position, lambda first_rows, sizes: share(counts.argmax(1), first_rows, sizes))


def training_cases(
    name: str, cases: Rows, count: int | None, public: int, seed: int, unit: str = "cases"
) -> tuple[Rows, Rows]:
    """Return the clients' training rows and the public rows, sorted and with no case in both.

    Cases are taken in random order.  ``count`` may cut the clients' last case.  ``public`` may cut a case too, whose
    other images then go to no client.
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
