"""Images of equal content under several names among the user's own files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedkern.data.identity import Sets
from fedkern.data.labels.spelling import SHOWN
from fedkern.data.split import Split
from fedkern.errors import UserError, first_of


class _Image(NamedTuple):
    """A sample: its name, its set, the site that holds it (``""``: none is known), and its rows in a split."""

    name: str
    where: str
    site: str
    split: Split
    rows: slice


def copies(
    data: str,
    classes: Sequence[str],
    sets: Sets,
    pixels: Sequence[bytes],
    sites: Sequence[str],
    tiles: int,
    outside: str,
) -> list[str]:
    """Looks for images whose decoded pixels are equal and whose names differ.

    Args:
        sets: the samples by the name of their set; the first parts of the training set are the clients.
        pixels: a hash of every row's image, in the order of the sets.
        sites: the clients' names, where the data name them.
        tiles: the rows of an image, see `tiles.tiled`.  Whole images are compared, because single tiles
            are often alike; one that does not have all of its tiles in a part of a set is not compared.
        outside: what to say of a wrong window, see `fedkern.data.forms.ImageForm`.

    Returns:
        A sentence with the images that are there several times, or nothing.

    Raises:
        UserError: one image has two labels or two masks.
    """
    sentences: list[tuple[bool, str]] = []
    for group in _groups(sets, pixels, sites, tiles):
        first, other = group[0], next((image for image in group if image.name != group[0].name), None)
        if other is None:
            continue
        labels: dict[bytes, _Image] = {}
        for image in group:
            labels.setdefault(image.split.labels[image.rows].numpy().tobytes(), image)
        remarks = []
        if len(labels) > 1:
            first, other = [*labels.values()][:2]
            both = first.split.task.both_labels([each.split.labels[each.rows][0] for each in (first, other)], classes)
            channels = first.split.images[first.rows].transpose(0, 1).flatten(1)
            if not (channels == channels[:, :1]).all():  # pictures of a single colour are alike without being copies
                raise UserError(
                    f'data set "{data}": {first.name} and {other.name} are the same image with {both}; '
                    f"{outside or 'leave one of the two out'}"
                )
            remarks.append(f"with {both}")
        for places, words in (
            ([image.site for image in group if image.site], "at the clients {}"),
            ([image.where for image in group], "in the sets {}"),
        ):
            if len(distinct := [*dict.fromkeys(places)]) > 1:
                remarks.append(words.format(" and ".join(distinct)))
        about = f" ({', '.join(remarks)})" if remarks else ""
        sentences.append((not remarks, f"{first.name} and {other.name}{about}"))
    if not sentences:
        return []
    sentences.sort(key=lambda each: each[0])
    texts = first_of([text for _, text in sentences], SHOWN, "; ")
    return [f"Equal images under several names count as often: {texts}."]


def _groups(sets: Sets, pixels: Sequence[bytes], sites: Sequence[str], tiles: int) -> Iterator[list[_Image]]:
    """The samples of equal images, in their order, wherever there are two."""
    parts = [(where.strip(), k, part) for where, splits in sets.items() for k, part in enumerate(splits)]
    places: dict[bytes, list[tuple[int, int]]] = {}  # number of the part and row in it, by the image's hash
    start = 0
    for number, (_, _, part) in enumerate(parts):
        for row in _first_rows(part, tiles):
            places.setdefault(b"".join(pixels[start + row : start + row + tiles]), []).append((number, row))
        start += len(part)

    def image(number: int, row: int) -> _Image:
        where, k, part = parts[number]
        home = -1 if part.homes is None or not sites else int(part.homes[row])
        client = sites[k] if where == "train" and k < len(sites) else ""
        name = part.ids[row] if part.ids else ""
        name = name.removesuffix("#0") if tiles > 1 else name
        return _Image(name, where, sites[home] if home >= 0 else client, part, slice(row, row + tiles))

    return ([image(*place) for place in group] for group in places.values() if len(group) > 1)


def _first_rows(part: Split, tiles: int) -> Sequence[int]:
    """The first row of every image that has all of its tiles in the part."""
    if tiles == 1:
        return range(len(part))
    ids = part.ids or ()
    ends = enumerate(zip(ids, ids[tiles - 1 :], strict=False))
    return [row for row, (first, last) in ends if first.endswith("#0") and last == f"{first[:-1]}{tiles - 1}"]
