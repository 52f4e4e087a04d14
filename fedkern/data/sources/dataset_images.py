"""Image splits from PyTorch data sets whose items are images with a class or text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from fedkern.data.forms import MASK, ImageForm, SampleForm
from fedkern.data.labels.spelling import ANY
from fedkern.data.sources.arrays import MEAN, STD, class_names
from fedkern.data.sources.datasets import texts_of
from fedkern.data.sources.items import DRAWING, EQUAL, Items, RowStore
from fedkern.data.split import Split
from fedkern.errors import UserError
from fedkern.messages.leaves import Keywords, leaves, split_targets
from fedkern.tasks import Task
from fedkern.tasks.classification import UNLABELLED
from fedkern.tasks.partition_statistics import PartitionStatistics
from fedkern.tasks.user_tasks import INTEGERS

if TYPE_CHECKING:
    from fedkern.data.types import FederatedData

MOST_CLASSES = 1 << 20
"""Most classes: larger labels are other numbers."""
READ = 256
"""Items read at once."""
Columns = tuple[Tensor, Tensor | None, Tensor | None]
"""Images, classes and masks of a data set."""


def can_be_images(data: FederatedData) -> bool:
    """Return whether items are single tensors ``[C, H, W]``, uint8 or float32, with a class or text."""
    form = data.form
    is_plain = isinstance(data.validation, Items) and data.clients[0].collate is default_collate
    return is_plain and form.image_shape is not None and (data.task.target == "class" or "pairs" in data.task.offers)


def as_images(data: FederatedData, reason: str, *, is_raw: bool, limit: int | None) -> FederatedData:
    """Convert inspected items to images, reading every item, and raise UserError if they are random or too large.

    Some items are read twice: :class:`RowStore` decides whether rows may replace items.  ``reason`` is what needs
    images.  Networks get images unchanged if ``is_raw``, else scaled and normalised.  ``limit``: most bytes of all
    images.
    """
    # Each data set is read once, however many splits use it, and refused beforehand if too large.
    sets = {id(split.dataset): _used_items(split, data.splits) for split in data.splits if len(split)}
    shape = data.form.image_shape
    assert shape is not None
    total = sum(map(len, sets.values())) * math.prod(shape) * getattr(torch, data.form.dtype).itemsize
    if limit is not None and total > limit:
        raise UserError(
            f"{reason} needs images in memory, and these take {total / 2**30:.1f} GiB of at most {limit / 2**30:.0f}: "
            "give --keep-items memory, or fewer samples."
        )
    # Repeated reads are spread over the data sets, `EQUAL` in all.
    again = -(-EQUAL // len(sets))
    columns = {key: _columns(split, reason, again) for key, split in sets.items()}
    form = _image_form(data.form, is_raw)
    for key, (images, *_) in columns.items():
        if wrong := _fault(images, form, data.clients[0].name):
            raise UserError(f"Images of {sets[key].name} {wrong}.")
    is_captioned = "pairs" in data.task.offers

    def rows_of(split: Items) -> Split:
        if not len(split):
            no_labels = torch.zeros(0, dtype=torch.int64)
            return Split(blank, no_labels, texts=() if is_captioned else None, task=data.task)
        images, labels, masks = columns[id(split.dataset)]
        if labels is None:
            raise UserError(f"{reason} needs classes, whole numbers, and items of {split.name} have none.")
        used = sets[id(split.dataset)].rows
        rows: Any = slice(None) if split.rows is None else split.rows
        rows = rows if used is None or split.rows is None else torch.searchsorted(used, split.rows)
        if is_captioned:
            return _add_texts(images[rows], split)
        low, high = map(int, labels[rows].aminmax())
        if low < 0 or high >= MOST_CLASSES:
            raise UserError(f"{reason} needs classes from 0, below {MOST_CLASSES}: {split.name} has {low} to {high}.")
        masks = None if masks is None else masks[rows]
        return Split(images[rows], labels[rows], masks, patients=split.patients, homes=split.homes, task=data.task)

    # Public images may have labels that are no classes of the run, so they do not count for the class names.
    blank = columns[id(data.clients[0].dataset)][0][:0]
    made = replace(data, public=None).with_splits(rows_of)
    labelled = {f"client {k}": split for k, split in enumerate(made.clients)} | made.tests
    labelled["validation"] = made.validation
    classes = (ANY,) if is_captioned else class_names(labelled, data.classes or None, "auto")
    public = data.public
    if public is not None:
        public = rows_of(public) if is_captioned else _public(public, columns[id(public.dataset)], len(classes))
    labels = [split.labels.numpy() for split in made.clients]
    statistics = PartitionStatistics.of(labels, classes, data.statistics.partition, data.task)
    statistics = replace(statistics, names=data.statistics.names)
    return replace(made, classes=classes, form=form, statistics=statistics, public=public)


def _add_texts(images: Tensor, split: Items) -> Split:
    """Combine images with their texts, see :class:`fedkern.data.sources.datasets.Captioned`."""
    texts = texts_of(split.dataset)
    texts = texts if split.rows is None else [texts[row] for row in split.rows.tolist()]
    names = [blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in images]
    ids = tuple(names) if len({*names}) < len(names) else None  # images with several texts
    labels = torch.zeros(len(images), dtype=torch.int64)
    patients, homes = split.patients, split.homes
    return Split(images, labels, None, ids, None, tuple(texts), patients=patients, homes=homes, task=split.task)


def _public(split: Items, columns: Columns, classes: int) -> Split:
    """Return public images, unlabelled unless all labels are the run's classes."""
    images, labels, masks, task = *columns, split.task
    if labels is None or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        labels, task = torch.full((len(images),), -1), UNLABELLED
    return Split(images, labels, masks, patients=split.patients, homes=split.homes, task=task)


def _used_items(split: Items, splits: Sequence[Items]) -> Items:
    parts = [part.rows for part in splits if part.dataset is split.dataset and len(part)]
    known = [rows for rows in parts if rows is not None]
    rows = torch.cat(known).unique() if len(known) == len(parts) else None
    return replace(split, rows=None if rows is None or len(rows) == len(split.dataset) else rows)


def _columns(split: Items, reason: str, again: int) -> Columns:
    """Read all items and ``again`` of them twice, and return images, classes and masks."""
    count = len(split)
    if split.is_deterministic:
        return _split_batch(split, split.batch(np.arange(count), 0))
    if split.rows is not None and split.unkept != DRAWING:  # a store of the used rows only
        split = replace(split, dataset=Subset(split.dataset, split.rows.tolist()), rows=None)
        split.store = RowStore(count, None)
    store = split.store
    if store is None:
        raise _unkept(reason, split.name, split.unkept or "its rows take more memory than a run keeps")
    unread = np.flatnonzero(store.reads == 0)
    # Rows that are read again: all data sets together reach `EQUAL` equal items.
    left = max(0, again - store.equal)
    repeats = np.resize(np.linspace(0, count - 1, min(count, max(1, left))).astype(np.int64), left)
    for rows in [*_in_batches(unread), *_in_batches(repeats)]:
        if len(rows):
            split.batch(rows, 0)
        if store.reason:
            raise _unkept(reason, split.name, store.reason)
    return _split_batch(split, store.take(torch.arange(count)))


def read_images(task: Task, dataset: Dataset[object]) -> Tensor:
    """Return the images of a data set outside the run, or raise UserError."""
    split = Items(dataset, "the samples", task, default_collate)
    if not len(split):
        raise UserError("There are no samples: give a data set that has some.")
    batches = (split.batch(rows, 0) for rows in _in_batches(np.arange(len(split))))
    return torch.cat([batch if isinstance(batch, Tensor) else _split_batch(split, batch)[0] for batch in batches])


def _in_batches(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(rows, -(-len(rows) // READ) or 1)


def _split_batch(split: Items, batch: object) -> Columns:
    inputs, targets = split_targets(batch)
    mask = inputs.get(MASK) if isinstance(inputs, Keywords) else None
    images, *extra = [leaf for leaf in leaves(inputs) if leaf is not mask and getattr(leaf, "ndim", 0) == 4] or [None]
    if images is None or extra:
        raise UserError(f"Items of {split.name} have {'several images' if extra else 'no image'}: give one [C, H, W].")
    if mask is not None:
        mask = mask.squeeze(1) if mask.dim() == 4 else mask
        if mask.shape != (len(images), *images.shape[2:]):
            raise UserError(
                f"The mask of an item of {split.name} is {list(mask.shape[1:])}, not {list(images.shape[2:])} as the "
                "image: give one value per pixel."
            )
        if not bool(((mask == 0) | (mask == mask.max())).all() & (mask.max() >= 0)):
            raise UserError(f"The mask of an item of {split.name} has more than two values: give 0 and 1.")
        mask = mask != 0
    has_classes = isinstance(targets, Tensor) and targets.dtype in INTEGERS and targets.shape == images.shape[:1]
    return images.detach(), targets.to(torch.int64) if has_classes else None, mask


def _fault(images: Tensor, form: ImageForm, usual: str) -> str:
    """Explain why images do not fit the form of the first client, ``usual``, or return ``""``."""
    words = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape[1:])}"
    if images.shape[1:] != form.shape or words.split()[0] != form.dtype:
        return f"are {words}, not {form.dtype} {list(form.shape)} as those of {usual}: give all sets one form"
    if form.shape[2] in (1, 3, 4) and form.shape[0] > 4:
        return f"are {words}, with channels last: give image.permute(2, 0, 1)"
    if form.dtype == "uint8":
        return ""
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        return "have values that are not finite: leave these images out"
    mean, std = torch.tensor(form.mean), torch.tensor(form.std)
    low, high = (low * std + mean).min(), (high * std + mean).max()
    if form.is_scaled and (low < -0.5 or high > 1.5):
        return f"have pixels from {low:.3g} to {high:.3g} by normalize: give mean and std of their own transform"
    return ""


def _image_form(form: SampleForm, is_raw: bool) -> ImageForm:
    shape, is_bytes = form.image_shape, form.dtype == "uint8"
    assert shape is not None
    if is_raw and is_bytes:
        if form.normalize is not None:
            raise UserError(
                "normalize is for float images, and a network of your own gets uint8 images as they are: leave it out."
            )
        scale: Any = ((0.0,), (1 / 255,))  # a network sees values from 0 to 255
    else:
        scale = form.normalize or (((MEAN,), (STD,)) if is_bytes else ((0.0,), (1.0,)))
    mean, std = (value * shape[0] if len(value) == 1 else value for value in scale)
    if not len(mean) == len(std) == shape[0]:
        raise UserError(
            f"normalize has {len(mean)} means and {len(std)} standard deviations for {shape[0]} channels: give one "
            "number for all channels, or one for each."
        )
    words = "as the data set gives them" if is_raw or not is_bytes else (
        f"scaled to [0, 1], mean {', '.join(f'{x:g}' for x in mean)} and deviation {', '.join(f'{x:g}' for x in std)}"
    )  # fmt: skip
    seen = f"images: {form.dtype} {list(shape)} of PyTorch data sets, {words}"
    is_scaled = is_bytes or form.normalize is not None
    return ImageForm(
        shape, mean, std, dtype=form.dtype, is_raw=is_raw or not is_bytes, is_scaled=is_scaled, seen=(seen,)
    )


def _unkept(reason: str, title: str, why: str) -> UserError:
    augmentation = " of the data set, and give --augment crop-flip" if "draw" in why else " of the data set"
    return UserError(
        f"{reason} needs images that are the same whenever they are read, and {title} has none, as {why}: leave random "
        f"transforms out{augmentation}."
    )
