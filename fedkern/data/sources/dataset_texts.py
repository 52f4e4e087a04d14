"""Captions of PyTorch data sets, from items or an attribute ``texts``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from fedkern.data.forms import SampleForm
from fedkern.data.sources.items import MapStyle
from fedkern.messages.leaves import Keywords, split_targets


class Captioned:
    """Images of a data set, with a hash of the text as class.

    ``texts`` fills as items are read.  ``group_key`` names an item's entry that is no network input.
    """

    def __init__(self, dataset: MapStyle, group_key: str) -> None:
        self.dataset, self.stated, self.group_key = dataset, stated_texts(dataset), group_key
        self.texts = [""] * len(dataset)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> tuple[object, int]:
        image, text = split_targets(self.dataset[row])
        if isinstance(image, Keywords):
            image.pop(self.group_key, None)
        if self.stated is not None and not isinstance(text, str):
            text = self.stated[row]
        if not isinstance(text, str) or not text.strip():
            raise ValueError("it has no text: give items (image, text), or an attribute texts with one text per item")
        self.texts[row] = str(text)
        return image, int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")


def stated_texts(dataset: Any) -> Sequence[str] | None:
    """Return a data set's attribute ``texts``, one per item, or None."""
    if type(dataset) is Subset:
        texts_below = stated_texts(dataset.dataset)
        return None if texts_below is None else [texts_below[row] for row in dataset.indices]
    if type(dataset) is ConcatDataset:
        parts = [part for part in map(stated_texts, dataset.datasets) if part is not None]
        return [*chain(*parts)] if len(parts) == len(dataset.datasets) else None
    with suppress(Exception):  # a property of the user's may raise anything
        texts: Sequence[str] = dataset.texts
        return texts if len(texts) == len(dataset) and isinstance(texts[0], str) else None
    return None


def texts_of(dataset: object) -> list[str]:
    """Return the texts of :class:`Captioned` sets, also concatenated."""
    if isinstance(dataset, ConcatDataset):
        return [*chain(*map(texts_of, dataset.datasets))]
    assert isinstance(dataset, Captioned)
    return dataset.texts


def are_captioned(dataset: object, batch: object, beside_classes: bool) -> bool:
    """Return whether items are images with texts, from a batch of two.

    ``beside_classes``: whether an attribute ``texts`` counts for items with targets.
    """
    targets = split_targets(batch)[1]
    in_items = isinstance(targets, (list, tuple)) and isinstance(targets[0], str)
    counts = targets is None or beside_classes
    return SampleForm.of(batch).image_shape is not None and (in_items or (counts and stated_texts(dataset) is not None))
