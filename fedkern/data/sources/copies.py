"""Images of equal content under several names among the user's own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedkern.data.identity import Sets
from fedkern.data.labels.spelling import SHOWN
from fedkern.data.split import Split
from fedkern.errors import UserError, first_of

OWN = ("folder", "csv", "segmentation", "pairs", "reports")
"""Data sets of the user's own images: copies in published ones are known and stay."""


@dataclass(frozen=True)
class _Image:
    """A sample: its name, set and split, its rows there, and the site that holds it (``""``: none is known)."""

    name: str
    where: str
    split: Split
    rows: slice
    site: str

    @property
    def labels(self) -> Tensor:
        return self.split.labels[self.rows]

    def plain(self) -> bool:
        """Whether every channel has a single value: such pictures are alike without being copies."""
        pixels = self.split.images[self.rows].transpose(0, 1).flatten(1)
        return bool((pixels == pixels[:, :1]).all())


def copies(
    data: str, classes: Sequence[str], sets: Sets, pixels: Sequence[bytes], sites: Sequence[str], tiles: int
) -> list[str]:
    """Looks for images whose decoded pixels are equal and whose names differ.

    Args:
        sets: the samples by the name of their set; the first parts of the training set are the clients.
        pixels: a hash of every row's image, in the order of the sets.
        sites: the clients' names, where the data name them.
        tiles: the rows of an image, see `tiles.tiled`.  Whole images are compared, because single tiles
            are often alike; one that does not have all of its tiles in a part of a set is not compared.

    Returns:
        A sentence with the images that are there several times, or nothing.

    Raises:
        UserError: one image has two labels or two masks.
    """
    told: list[tuple[bool, str]] = []
    for group in _groups(sets, pixels, sites, tiles):
        first, other = group[0], next((each for each in group[1:] if each.name != group[0].name), None)
        if other is None:
            continue
        labels: dict[bytes, _Image] = {}
        for each in group:
            labels.setdefault(each.labels.numpy().tobytes(), each)
        remarks = []
        if len(labels) > 1:
            first, other = [*labels.values()][:2]
            both = first.split.task.both_labels((first.labels[0], other.labels[0]), classes)
            if not first.plain():
                raise UserError(
                    f'data set "{data}": {first.name} and {other.name} are the same image with {both}; '
                    "leave one of the two out"
                )
            remarks.append(f"with {both}")
        for values, words in (
            ([each.site for each in group if each.site], "at the clients {}"),
            ([each.where for each in group], "in the sets {}"),
        ):
            if len(distinct := [*dict.fromkeys(values)]) > 1:
                remarks.append(words.format(" and ".join(distinct)))
        about = f" ({', '.join(remarks)})" if remarks else ""
        told.append((not remarks, f"{first.name} and {other.name}{about}"))
    if not told:
        return []
    told.sort(key=lambda each: each[0])
    return [f"Equal images under several names count as often: {first_of([text for _, text in told], SHOWN, '; ')}."]


def _groups(sets: Sets, pixels: Sequence[bytes], sites: Sequence[str], tiles: int) -> Iterator[list[_Image]]:
    """The samples of equal images, in their order, wherever there are two."""
    ids = [name for splits in sets.values() for part in splits for name in part.ids or [""] * len(part)]
    names = dict(enumerate(ids))  # by the first row of every image
    if tiles > 1:
        stems = [name.rpartition("#")[0] for name in ids]
        ends = zip(ids, ids[tiles - 1 :], stems, strict=False)
        names = {
            row: stem
            for row, (first, last, stem) in enumerate(ends)
            if (first, last) == (f"{stem}#0", f"{stem}#{tiles - 1}")
        }
    rows = np.array([*names], dtype=np.int64)
    hashes = np.frombuffer(b"".join(pixels), dtype="<u8").reshape(len(pixels), -1)
    hashes = hashes[rows[:, None] + np.arange(tiles)].reshape(len(rows), -1)
    order = np.lexsort(hashes.T)
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    parts = [
        (name.strip(), part, sites[k] if name == "train" and k < len(sites) else "")
        for name, splits in sets.items()
        for k, part in enumerate(splits)
    ]
    starts = np.cumsum([0, *(len(part) for _, part, _ in parts)])

    def image(at: int) -> _Image:
        k = int(np.searchsorted(starts, at, side="right")) - 1
        name, part, site = parts[k]
        row = at - int(starts[k])
        home = -1 if part.homes is None else int(part.homes[row])
        return _Image(names[at], name, part, slice(row, row + tiles), sites[home] if home >= 0 and sites else site)

    edges = np.flatnonzero(np.diff(same, prepend=False, append=False))  # where a run of equal hashes begins and ends
    for low, high in edges.reshape(-1, 2).tolist():
        yield [image(at) for at in sorted(rows[order[low : high + 1]].tolist())]
