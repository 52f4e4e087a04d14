"""Federated data from arrays in memory."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedkern.data.forms import ImageForm
from fedkern.data.labels.spelling import check_several
from fedkern.data.split import MAX_PIXEL_CLASSES, Split, are_classes
from fedkern.errors import UserError, first_of, format_value, quote_value
from fedkern.tasks import task_of
from fedkern.tasks.partition_statistics import PartitionStatistics

NAME = "arrays"
MEAN, STD = 0.5, 0.25
"""Default normalisation of images."""
ArrayPair = tuple[Any, Any]
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing"])
"""Names of the splits of a data set."""
K = TypeVar("K")
T = TypeVar("T")


def parts_of_arrays(
    clients: Mapping[str, ArrayPair] | Sequence[ArrayPair],
    test: ArrayPair | Mapping[str, ArrayPair] | None,
    validation: ArrayPair | None,
    classes: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    augment: str,
    task: str,
) -> dict[str, object]:
    """Return the attributes for :meth:`fedkern.data.FederatedData.from_arrays`."""
    # A sequence only numbers its clients: they have no names to show.
    changes: list[float] = []
    if isinstance(clients, str) or not isinstance(clients, Iterable):
        raise UserError(f"clients must be pairs (images, labels), by name or in a list, not {type(clients).__name__}.")
    pairs: Mapping[Any, ArrayPair] = clients if isinstance(clients, Mapping) else dict(enumerate(clients))
    named = key_by_text(pairs, "clients", 'clients=[d["train"]]')
    if not named:
        raise UserError("clients must hold at least one client, but is empty.")
    splits = {name: _split(pair, f"client {name}", changes, task) for name, pair in named.items()}
    test_pairs = {} if test is None else key_by_text(test, "test sets") if isinstance(test, Mapping) else {"": test}
    tests = {name: _split(pair, f"the test set {name}".rstrip(), changes, task) for name, pair in test_pairs.items()}
    if not tests:
        raise UserError("There is no test set: give test=(images, labels), or such pairs by name.")
    # One warning for all sets, of the largest change.
    model = next(iter(splits.values()))
    shape = model.images.shape[1:]
    empty = torch.arange(0)
    validation_split = model.subset(empty) if validation is None else _split(validation, "validation", changes, task)
    if (change := max(changes, default=0.0)) > 0:
        warnings.warn(
            "Images in floats are kept in 8 bits, as multiples of 1/255: the largest change of a value is "
            f"{change:.2g}.",
            stacklevel=3,
        )
    # A network has one input shape and one loss, so every set must fit the first client's.
    parts = {**{f"client {name}": split for name, split in splits.items()}, **tests, "validation": validation_split}
    for name, split in parts.items():
        if split.images.shape[1:] != shape or split.task != model.task:
            raise UserError(
                f"{name or 'test'}: images must have shape {list(shape)} and labels {model.labels.dim()} axes like the "
                f"first client's, but have {list(split.images.shape[1:])} and {split.labels.dim()}."
            )
    # A class may occur in a test set alone, so all sets decide the names.
    if classes is not None:
        check_names(classes)
    names = NAMES[model.task.target](parts, classes, task)
    channels = int(shape[0])
    sites = tuple(named) if isinstance(clients, Mapping) else None
    labels = [split.labels.numpy() for split in splits.values()]
    statistics = PartitionStatistics.of(labels, names, "attribute", model.task)
    return {
        "name": NAME,
        "classes": names,
        "clients": tuple(splits.values()),
        "validation": validation_split,
        "tests": tests,
        "form": ImageForm(
            (channels, *shape[1:]),
            tuple(mean) if mean is not None else (MEAN,) * channels,
            tuple(std) if std is not None else (STD,) * channels,
            augment,
        ),
        "statistics": replace(statistics, names=sites),
        "client_names": sites,
    }


def key_by_text(sets: Mapping[K, T], noun: str, training: str = "") -> dict[str, T]:
    """Return the sets by their keys as texts, or raise UserError for equal texts.

    ``training`` is advice for a dict of a data set's own splits, which are no clients.
    """
    named: dict[str, T] = {}
    for key, dataset in sets.items():
        if str(key) in named:
            called = quote_value(str(key))
            raise UserError(f"Two of the {noun} are called {called}, as their keys are the same text: give other keys.")
        named[str(key)] = dataset
    words = [name.lower() for name in named] if training else []
    splits = SPLITS.intersection(words)
    similar = [word for word in words if re.split("[^a-z]", word)[0] in SPLITS]
    if splits and (len(splits) == len(words) or (splits & {"train", "training"} and len(similar) > 1)):
        raise UserError(
            f"The {noun} are called {first_of([*named], 4)}, as the splits of one data set d, all of which would be "
            f'trained on: give {training}, validation=d["validation"] and test=d["test"], or call them otherwise.'
        )
    return named


def check_names(classes: Sequence[str]) -> None:
    names = [] if isinstance(classes, str) or not isinstance(classes, Iterable) else [*classes]
    if not all(isinstance(name, str) and name.strip() for name in names) or len({*names}) < len(names) or not names:
        raise UserError(f"classes must be a list of different names, none of them empty, not {format_value(classes)}.")


def class_names(splits: Mapping[str, Split], classes: Sequence[str] | None, task: str) -> tuple[str, ...]:
    """Return the class names, by default numbers up to the largest label."""
    count = 1 + max(int(split.labels.max()) for split in splits.values() if split.labels.numel())
    names = tuple(str(number) for number in range(count)) if classes is None else tuple(classes)
    if len(names) < max(2, count):
        raise UserError(f"classes must name at least {max(2, count)} classes, but has {len(names)}.")
    return names


def _pixel_names(splits: Mapping[str, Split], classes: Sequence[str] | None, task: str) -> tuple[str, ...]:
    values = sorted({value for split in splits.values() for value in split.labels.unique().tolist() if value >= 0})
    if classes is None and not are_classes(values):
        raise UserError(
            f"labels of pixels hold {first_of([*map(str, values)], 6)}, expected class numbers from 0 to at most "
            f"{MAX_PIXEL_CLASSES - 1} without a gap: name all classes with classes=[...], or number them."
        )
    return class_names(splits, classes, task)


def _label_names(splits: Mapping[str, Split], classes: Sequence[str] | None, task: str) -> tuple[str, ...]:
    count = next(iter(splits.values())).labels.shape[1]
    if count < 2:
        raise UserError(
            f"labels of several labels an image must have two or more columns, but have {count}: give labels [n] for a "
            "single class an image."
        )
    for name, split in splits.items():
        if split.labels.shape[1] != count:
            raise UserError(
                f"{name or 'test'}: labels must have {count} columns like the first client's, but have "
                f"{split.labels.shape[1]}."
            )
    names = tuple(str(number) for number in range(count)) if classes is None else tuple(classes)
    if len(names) != count:
        raise UserError(f"classes must name the {count} labels, a name for every column, but has {len(names)}.")
    counts = [count for split in splits.values() for count in split.labels.sum(1).tolist()]
    shape = list(next(iter(splits.values())).labels.shape)
    way_out = "give labels [n] of whole numbers, such as labels.argmax(1)"
    check_several(counts, task, f"labels {shape}", way_out, 'give task="multilabel".')
    return names


NAMES = {"class": class_names, "pixels": _pixel_names, "labels": _label_names}
"""Functions that name the classes, by kind of labels (`fedkern.tasks.Task.target`)."""


def _split(pair: ArrayPair, name: str, changes: list[float], task: str) -> Split:
    try:
        images, labels = pair
    except (TypeError, ValueError):
        raise UserError(f"{name}: expected a pair (images, labels).") from None
    try:
        images, labels = _images(images, changes), _tensor(labels)
        kind = task_of(labels, said=task)
        return Split(images, kind.convert_labels(labels), task=kind)
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.array(value)
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ValueError(f"expected numbers, given {array.dtype}") from None


def _images(value: object, changes: list[float]) -> Tensor:
    """Return images uint8 ``[n, C, H, W]`` from any accepted layout.

    The largest change by rounding floats is appended to ``changes``, 0 within the dtype's own precision.
    """
    images = _tensor(value)
    if images.dim() not in (3, 4) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"images must be uint8, or floats in [0, 1], of shape [n, C, H, W], [n, H, W, C] or [n, H, W], but are "
            f"{kind} {list(images.shape)}"
        )
    if images.dim() == 3:
        images = images[:, None]
    elif images.shape[1] not in (1, 3) and images.shape[3] in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)
    if images.is_floating_point():
        if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("floating images must lie in [0, 1]; give images of 0 to 255 as uint8")
        rounded = (images.double() * 255).round()
        change = float((images.double() - rounded / 255).abs().max()) if images.numel() else 0.0
        changes.append(change if change > torch.finfo(images.dtype).eps else 0.0)
        images = rounded.to(torch.uint8)
    return images.contiguous()
