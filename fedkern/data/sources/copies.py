"""Equal images under several names among the user's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedkern.data.identity import Sets
from fedkern.data.labels.spelling import SHOWN
from fedkern.data.split import Split
from fedkern.errors import UserError, first_of


class _Image(NamedTuple):
    """Sample with its site (``""`` if unknown) and row in a split."""

    name: str
    where: str
    site: str
    split: Split
    row: int


def find_copies(
    data: str, classes: Sequence[str], sets: Sets, pixels: Sequence[bytes], sites: Sequence[str], outside: str
) -> list[str]:
    """Describe images with equal decoded pixels and different names in at most one sentence.

    ``pixels`` are hashes in the order of ``sets``, whose first training parts are the clients.  ``outside`` is advice
    on a wrong window.
    """
    sentences: list[tuple[bool, str]] = []
    for group in _groups(sets, pixels, sites):
        model, twin = group[0], next((image for image in group if image.name != group[0].name), None)
        if twin is None:
            continue
        labels: dict[bytes, _Image] = {}
        for image in group:
            labels.setdefault(image.split.labels[image.row].numpy().tobytes(), image)
        remarks = []
        if len(labels) > 1:
            model, twin = [*labels.values()][:2]
            pair = [image.split.labels[image.row] for image in (model, twin)]
            conflict = model.split.task.both_labels(pair, classes)
            channels = model.split.images[model.row].flatten(1)
            if not (channels == channels[:, :1]).all():  # pictures of one colour are equal without being copies
                raise UserError(
                    f'data set "{data}": {model.name} and {twin.name} are the same image with {conflict}; '
                    f"{outside or 'leave one of the two out'}"
                )
            remarks.append(f"with {conflict}")
        for places, phrase in (
            ([image.site for image in group if image.site], "at the clients {}"),
            ([image.where for image in group], "in the sets {}"),
        ):
            if len(distinct := [*dict.fromkeys(places)]) > 1:
                remarks.append(phrase.format(" and ".join(distinct)))
        about = f" ({', '.join(remarks)})" if remarks else ""
        sentences.append((not remarks, f"{model.name} and {twin.name}{about}"))
    if not sentences:
        return []
    sentences.sort(key=lambda each: each[0])
    texts = first_of([text for _, text in sentences], SHOWN, "; ")
    return [f"Equal images under several names count as often: {texts}."]


def _groups(sets: Sets, pixels: Sequence[bytes], sites: Sequence[str]) -> Iterator[list[_Image]]:
    """Yield the samples of each image that occurs more than once."""
    parts = [(where.strip(), k, part) for where, splits in sets.items() for k, part in enumerate(splits)]
    places: dict[bytes, list[tuple[int, int]]] = {}  # number of the part and row in it, by the image's hash
    rows = ((number, row) for number, (_, _, part) in enumerate(parts) for row in range(len(part)))
    for place, pixel_hash in zip(rows, pixels, strict=True):
        places.setdefault(pixel_hash, []).append(place)

    def image(number: int, row: int) -> _Image:
        where, k, part = parts[number]
        home = -1 if part.homes is None or not sites else int(part.homes[row])
        client = sites[k] if where == "train" and k < len(sites) else ""
        return _Image(part.ids[row] if part.ids else "", where, sites[home] if home >= 0 else client, part, row)

    return ([image(*place) for place in group] for group in places.values() if len(group) > 1)
