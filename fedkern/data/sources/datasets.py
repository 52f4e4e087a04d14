"""Federated data of PyTorch data sets: checks, tasks, texts, groups (patient or site of every item) and sharing."""

from __future__ import annotations

import sys
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from fedkern.data.forms import SampleForm, Scale
from fedkern.data.labels.spelling import clean_cell, parse_number, sort_names
from fedkern.data.sharing.groups import grouped_rows, hash_names, training_cases, unit_noun
from fedkern.data.sharing.partition import parse_partition, share_samples
from fedkern.data.sources.arrays import check_names, key_by_text
from fedkern.data.sources.items import Items, MapStyle, draw_rows, locate, name_cause
from fedkern.errors import RAISED, UserError, first_of, format_value
from fedkern.messages.leaves import TARGETS, Keywords, leaves, split_targets
from fedkern.streams import stream
from fedkern.tasks import CLASSIFICATION, RETRIEVAL, OwnClassification, OwnTask, Task
from fedkern.tasks.partition_statistics import PartitionStatistics
from fedkern.tasks.user_tasks import INTEGERS, torch_loss
from fedkern.usercode.registry import check_hooks


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


WAY = "give the name of an attribute, a column or a key of items, or a function of an item's index"


class GroupReader:
    """Reader of the groups of data sets.

    ``rule`` names an attribute, a column or an item's key, or is a function of an item's index in the data set below
    subsets and concatenations, whose groups are then distinct.  ``key`` is the item key to hide from the network, into
    whose inputs torch's collation would put it.
    """

    def __init__(self, rule: object, collate: object) -> None:
        if not callable(rule) and not (isinstance(rule, str) and rule):
            raise UserError(f"groups is {format_value(rule)}: {WAY}.")
        self.key = rule if isinstance(rule, str) and rule not in TARGETS and collate is default_collate else ""
        self.names: dict[int, str] = {}
        self._rule: Any = rule
        self._places, self._known = dict[int, int](), dict[int, list[object]]()

    def read(self, split: Items) -> Tensor:
        """Return the hash of every item's group for a whole data set, int64 ``[n]``.

        An item without a group is a group of its own.  Equal numbers are one group, however written.
        """
        try:
            names = [*map(_name, self._values(split))]
        except RAISED as error:  # the user's own code
            rule = format_value(self._rule)
            raise UserError(f"groups={rule} of {split.name} cannot be read ({name_cause(error)}): {WAY}.") from error
        hashes = hash_names(f"patient/{name}" if name else f"item/{split.name}/{row}" for row, name in enumerate(names))
        self.names |= dict(zip(hashes.tolist(), names, strict=True))
        return torch.from_numpy(hashes)

    def _values(self, split: Items) -> list[object]:
        if callable(self._rule):
            return [self._call(*locate(split.dataset, row)) for row in range(len(split))]
        if (values := self._column(split.dataset)) is not None:
            return values
        values = [self._value_of_key(item) for item in replace(split, group_key="").read(range(len(split)), 0)]
        way = "give the data set an attribute or a column of this name"
        warnings.warn(f"All {len(split)} items of {split.name} are read once for their groups: {way}.", stacklevel=7)
        self._known[id(split.dataset)] = values
        return values

    def _call(self, dataset: object, row: int) -> object:
        place, value = self._places.setdefault(id(dataset), len(self._places)), self._rule(row)
        return value if place == 0 or value is None else f"{value} (data set {place})"

    def _value_of_key(self, item: object) -> object:
        if not isinstance(item, Mapping) or self._rule not in item:
            raise UserError("it has no attribute or column of this name, and an item no such key")
        return item[self._rule]

    def _column(self, dataset: Any) -> list[object] | None:
        """Return stated groups of a data set or of those below, or None."""
        if id(dataset) in self._known:
            return self._known[id(dataset)]
        is_column = self._rule in (getattr(dataset, "column_names", None) or ())
        values = dataset[self._rule] if is_column else getattr(dataset, self._rule, None)
        if values is not None:
            values = [*map(values.__getitem__, range(len(dataset)))] if isinstance(values, Mapping) else [*values]
            if len(values) != len(dataset):
                raise UserError(f"there are {len(values)} for {len(dataset)} items")
            return values
        if type(dataset) is Subset:
            below = self._column(dataset.dataset)
            return below and [below[row] for row in dataset.indices]
        parts = [self._column(part) for part in dataset.datasets] if type(dataset) is ConcatDataset else [None]
        return None if None in parts else [value for part in parts for value in part or ()]


def _name(value: Any) -> str:
    value = value.item() if getattr(value, "shape", None) == () else value
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(f"one is {format_value(value)}, neither a text nor a number nor None")
    name = clean_cell(str(value))
    amount = parse_number(name)
    return unicodedata.normalize("NFC", name) if amount is None else f"{amount.normalize():f}"


NAME, PAIRS = "datasets", "captioned"
Sets = MapStyle | Mapping[str, MapStyle] | Sequence[MapStyle]
"""Data set, or several by name or in order."""
Collate = Callable[[list[Any]], Any]
Normalize = tuple[float | Sequence[float], float | Sequence[float]]
LONGEST = 1 << 28
"""Most samples of a set: an epoch's permutation then takes 2 GB."""
COMPARED = 16
"""Items whose classes are compared with the stated ones."""


def items_like(pattern: Items, dataset: object, title: str) -> Items:
    """Wrap another data set with the task and collation of ``pattern``, or raise UserError."""
    samples: MapStyle = _check(dataset, title)
    samples = Captioned(samples, pattern.group_key) if isinstance(pattern.dataset, Captioned) else samples
    return Items(samples, title, pattern.task, pattern.collate, group_key=pattern.group_key)


def task_of_targets(
    batch: object,
    loss_fn: Callable[..., Tensor] | None,
    metrics: Mapping[str, object] | None,
    main: str | None,
    better: Literal["max", "min"] | None,
    batch_loss: Callable[..., Tensor] | None = None,
    classes: Sequence[str] | int | None = None,
) -> Task:
    """Return the task of a batch of two samples.

    Metrics, and losses of logits, keep the task classification: torch's cross-entropy or NLL, or any loss if
    ``classes`` are given.

    Raises:
        UserError: no loss is known for such targets.
    """
    user_task = None if loss_fn is batch_loss is None else OwnTask(loss_fn, metrics, main, better, batch_loss)
    _, truth = split_targets(batch)
    if truth is None and batch_loss is None:
        has = f"only {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "as a batch is no tuple"
        raise UserError(
            f"nothing of a sample is its target, {has}: give samples (inputs, targets) or with a key label, labels "
            "or targets, or batch_loss=FUNCTION of (model, batch)."
        )
    numbers = isinstance(truth, Tensor) and truth.dtype in INTEGERS
    labelled = numbers and truth.dim() == 1
    if user_task is not None:
        if labelled and batch_loss is None and (classes is not None or torch_loss(loss_fn) is not None):
            return OwnClassification(loss_fn, metrics, main, better)
        user_task.labelled = labelled
        return user_task
    if not numbers:
        kind = "texts" if isinstance(truth, (list, tuple)) and isinstance(truth[0], str) else "unknown"
        kind = f"{str(truth.dtype).removeprefix('torch.')} numbers" if isinstance(truth, Tensor) else kind
        raise UserError(
            f"a loss is needed, as the targets, an item's last part, are {kind}: give classes as whole numbers, "
            "loss_fn=FUNCTION of (outputs, targets), such as torch.nn.MSELoss(), or batch_loss=FUNCTION(model, batch)."
        )
    if labelled and metrics is main is better is None:
        return CLASSIFICATION
    return (OwnClassification if labelled else OwnTask)(metrics=metrics, main=main, better=better)


def parts_of_datasets(
    clients: Sets,
    test: Sets | None,
    *,
    validation: Sets | None = None,
    public: MapStyle | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    metrics: Mapping[str, object] | None = None,
    main: str | None = None,
    better: Literal["max", "min"] | None = None,
    batch_loss: Callable[..., Tensor] | None = None,
    task: Task | None = None,
    collate_fn: Collate | None = None,
    classes: Sequence[str] | int | None = None,
    normalize: Normalize | None = None,
    groups: object = None,
    partition: str = "iid",
    count: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    beside_classes: bool = False,
) -> dict[str, object]:
    """Return the attributes for :meth:`fedkern.data.FederatedData.from_datasets`.

    ``beside_classes``: see :func:`fedkern.data.sources.dataset_images.are_captioned`.
    """
    # A list, tuple or dict holds the clients' data sets; any other object is one data set to share out.
    _check_arrays(clients, "data")
    several = isinstance(clients, (Mapping, list, tuple)) and not is_dataset(clients)
    entries: Any = clients
    entries = clients if isinstance(clients, Mapping) else dict(enumerate(entries)) if several else {"": clients}
    named: dict[str, MapStyle] = key_by_text(entries, "clients", 'data=d["train"]')
    if not named:
        raise UserError("data must hold at least one client's data set, and is empty.")
    for name, dataset in named.items():
        _check(dataset, f"client {name}" if several else "data", LONGEST if samples is None else sys.maxsize)
    # The first two items decide the task, before any set is read for groups or classes.
    collate = collate_fn or default_collate
    if not callable(collate):
        raise UserError(f"collate_fn must be a function of a list of samples, not {format_value(collate)}.")
    reader = None if groups is None else GroupReader(groups, collate)
    key, group_names = ("", {}) if reader is None else (reader.key, reader.names)
    name, dataset = next(iter(named.items()))
    first_split = Items(dataset, f"client {name}" if several else "data", CLASSIFICATION, collate, group_key=key)
    batch = first_split.batch(range(min(2, len(first_split))), 0)
    has_loss = not (loss_fn is batch_loss is metrics is main is better is collate_fn is classes is None)
    is_captioned = not has_loss and are_captioned(first_split.dataset, batch, beside_classes)
    usual = RETRIEVAL if is_captioned else None
    learnt = task or usual or task_of_targets(batch, loss_fn, metrics, main, better, batch_loss, classes)
    if task and not (loss_fn is batch_loss is metrics is main is better is None and isinstance(learnt, Task)):
        raise UserError("task must be an object of fedkern.tasks.Task, without a loss, metrics, main and better.")
    check_hooks(type(learnt))
    if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in leaves(split_targets(batch)[0])):
        raise UserError("samples are float64, and networks are float32: return float32, as x.float() does.")

    # Wrap each captioned data set once, so that its splits share the texts; groups are read from the items below.
    is_captioned = "pairs" in learnt.offers
    wrappers: dict[int, Captioned] = {}

    def items(dataset: MapStyle, title: str) -> Items:
        parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
        inner: list[Any] = [part.dataset for part in parts if isinstance(part, Captioned)]
        is_wrapped = len(inner) == len(parts)
        plain = ConcatDataset(inner) if is_wrapped else dataset
        split = Items(plain, title, learnt, collate, group_key=key)
        groups = None if reader is None or not len(split) else reader.read(split)
        if is_captioned and len(split) and not is_wrapped:
            dataset = wrappers.setdefault(id(dataset), Captioned(dataset, key))
        return replace(split, dataset=dataset, groups=groups)

    if is_captioned:
        batch = items(first_split.dataset, first_split.name).batch(range(min(2, len(first_split))), 0)

    # Check the other sets before sharing out, which may read every item for its class.
    own_sets = {name: items(dataset, f"client {name}" if several else "data") for name, dataset in named.items()}
    tests, client_tests = _build_tests(test, named if isinstance(clients, Mapping) else {}, items)
    sets = validation if isinstance(validation, Mapping) else {} if validation is None else {"": validation}
    validations = key_by_text(sets, "validation sets")
    for name, dataset in validations.items():
        _check(dataset, f"validation {name}".strip())
    if public is not None:
        _check(public, "public")
    if classes is not None and not isinstance(classes, int):
        check_names(classes)
    names = tuple(map(str, range(classes) if isinstance(classes, int) else classes or ()))
    if len(names) == 1:
        raise UserError("classes must name at least 2 classes.")
    # Given clients have no class counts, because their labels are not read.
    sites = tuple(named) if isinstance(clients, Mapping) else None
    if several:
        splits = own_sets if samples is None else _subsample_clients(own_sets, samples, seed)
        sizes = tuple(map(len, splits.values()))
        no_counts = np.zeros((len(splits), 0), dtype=np.int64)
        counted = PartitionStatistics(no_counts, (), "attribute", names=sites, samples=sizes)
    else:
        if is_captioned and parse_partition(partition).info.needs_classes:
            raise UserError(f"partition={partition!r} needs classes, and images with texts have none: take iid.")
        splits, counted, names = _share_out(own_sets[""], names, partition, count, samples, seed, group_names)
        sites = counted.names
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"client {name} has no samples: leave it out, or share out another way.")
    # Where groups are the sites, the groups of held-out items become their homes.
    unseen = {f"test {name}": split for name, split in tests.items()}
    unseen["validation"] = items(_concatenate_sets([*validations.values()]), "the validation set")
    unseen |= {} if public is None else {"public": items(public, "the public samples")}
    for name, split in unseen.items():
        if sites and not several and split.groups is not None:
            homes = _places([group_names[value] for value in split.groups.tolist()], sites)
            unseen[name] = replace(split, groups=None, homes=torch.from_numpy(homes))
    return {
        "name": PAIRS if is_captioned else NAME,
        "classes": names,
        "clients": tuple(splits.values()),
        "validation": unseen["validation"],
        "drawn_validation": isinstance(validation, Mapping) and not {*validations}.isdisjoint(named),
        "tests": {name: unseen[f"test {name}"] for name in tests},
        "form": SampleForm.of(batch, not getattr(learnt, "takes_batches", False), _scale(normalize)),
        "statistics": counted,
        "public": unseen.get("public"),
        "client_tests": client_tests,
        "client_names": sites,
    }


def _scale(normalize: Normalize | None) -> Scale | None:
    """Return means and standard deviations, one each or one per channel."""
    if normalize is None:
        return None
    try:
        mean, std = (tuple(np.asarray(value, dtype=np.float64).reshape(-1).tolist()) for value in normalize)
    except (TypeError, ValueError):
        mean, std = (), ()
    if not mean or len(mean) != len(std) or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise UserError(
            f"normalize must be (mean, std), two numbers or two lists with one per channel, std above 0, not "
            f"{format_value(normalize)}."
        )
    return mean, std


def _build_tests(
    test: Sets | None, named: Mapping[str, MapStyle], items: Callable[[MapStyle, str], Items]
) -> tuple[dict[str, Items], tuple[Items, ...]]:
    """Return the test sets by name, and the clients' own."""
    if test is None or (isinstance(test, Mapping) and not test):
        raise UserError("There is no test set: give test=DATASET, or a dict of several by name.")
    tests = key_by_text(test, "test sets") if isinstance(test, Mapping) else {"": test}
    for name, dataset in tests.items():
        _check(dataset, f"test {name}".strip())
    if named and {*tests} & {*named}:
        if missing := [name for name in named if name not in tests]:
            raise UserError(f"client {missing[0]} has no test set in test, and others have: give all clients one.")
        if extra := [name for name in tests if name not in named]:
            raise UserError(f"test has sets of the clients and also {extra[0]}: give the clients' own sets, or others.")
        client_tests = tuple(items(tests[name], f"the test set of {name}") for name in named)
        return {"": items(_concatenate_sets([tested.dataset for tested in client_tests]), "the test set")}, client_tests
    return {name: items(tested, f"the test set {name}".strip()) for name, tested in tests.items()}, ()


def _concatenate_sets(sets: list[Any]) -> MapStyle:
    joined: MapStyle = sets[0] if len(sets) == 1 else ConcatDataset(sets) if sets else []
    return joined


def _share_out(
    pool: Items, names: tuple[str, ...], partition: str, count: int | None, samples: int | None, seed: int,
    group_names: Mapping[int, str],
) -> tuple[dict[str, Items], PartitionStatistics, tuple[str, ...]]:  # fmt: skip
    """Share a data set out among ``count`` clients, or one client per group of ``group_names``."""
    spec = parse_partition(partition)
    all_labels = classes_of(pool) if spec.info.needs_classes else None
    rows = np.arange(len(pool)) if samples is None else _draw_samples(len(pool), samples, seed, pool.groups)
    labels = np.zeros(len(rows), dtype=np.int64) if all_labels is None else all_labels.numpy()[rows]
    classes = 1 if all_labels is None else max(len(names), 1 + int(all_labels.max()))
    patients, sites, owners = None if pool.groups is None else pool.groups[rows], None, None
    if spec.info.by_groups:
        homes = [] if patients is None else [group_names[value] for value in patients.tolist()]
        if not all(homes) or not homes:
            raise UserError(
                f"partition={partition!r} needs the site of every item: give groups=, or a dict of clients."
            )
        owners, patients = _places(homes, sort_names(homes)), None
    if spec.name == "attribute":
        sites = sort_names(homes)
        if count not in (None, len(sites)):
            raise UserError(f"groups has {len(sites)} sites, not {count}: leave clients out, or partition another way.")
        count = len(sites)
    count = 5 if count is None else count
    shares = share_samples(spec, labels, count, seed, classes, patients=patients, owners=owners)
    pool = replace(pool, classes=all_labels, groups=None if spec.info.by_groups else pool.groups)
    splits = {
        name: replace(pool.subset(torch.from_numpy(rows[part])), name=f"client {name}")
        for name, part in zip(sites or map(str, range(count)), shares, strict=True)
    }
    sizes = tuple(map(len, splits.values()))
    if all_labels is None:
        no_counts = np.zeros((count, 0), dtype=np.int64)
        return splits, PartitionStatistics(no_counts, (), spec.text, names=sites, samples=sizes), names
    names = names or tuple(map(str, range(classes)))
    return splits, PartitionStatistics.of([labels[share] for share in shares], names, spec.text), names


def _places(homes: Sequence[str], sites: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the position of every item's site in ``sites``, int64 ``[n]``, or -1."""
    places = {site: k for k, site in enumerate(sites)}
    return np.array([places.get(home, -1) for home in homes], dtype=np.int64)


def _subsample_clients(splits: dict[str, Items], samples: int, seed: int) -> dict[str, Items]:
    ends = np.cumsum([0, *map(len, splits.values())])
    patients = [split.groups for split in splits.values() if split.groups is not None]
    rows = _draw_samples(int(ends[-1]), samples, seed, torch.cat(patients) if patients else None)
    return {
        name: split.subset(torch.from_numpy(rows[(rows >= begin) & (rows < end)] - begin))
        for (name, split), (begin, end) in zip(splits.items(), pairwise(ends), strict=True)
    }


def _draw_samples(count: int, samples: int, seed: int, patients: Tensor | None) -> npt.NDArray[np.int64]:
    if samples > count:
        raise UserError(f"train_samples must be at most {count}, the number of training samples, not {samples}.")
    units = grouped_rows(None, None, patients)
    if units is not None:
        return training_cases(NAME, units, samples, 0, seed, unit_noun(None, patients))[0]
    return draw_rows(stream(seed, "train-samples"), count, samples)


def classes_of(pool: Items) -> Tensor:
    """Return the class of every item, int64 ``[n]``, stated by the data set or read item by item.

    All items are read if some disagree with the stated classes.
    """
    count, classes = len(pool.dataset), stated_targets(pool.dataset, {})
    reason = "give the data set an attribute targets of whole numbers"
    if classes is not None:
        reason = "" if pool.is_deterministic else _difference(pool, classes)
    if reason and count > LONGEST:
        raise UserError(f'The classes of {count:,} items are too many to read, and {reason}: take partition="iid".')
    if reason:
        warnings.warn(f"All {count} items are read once for their classes: {reason}.", stacklevel=5)
        classes = _whole_numbers([split_targets(item)[1] for item in pool.read(range(count), 0)], count)
    if classes is None or int(classes.min()) < 0:
        raise UserError(
            "partition shares out by class, and the targets are no classes, whole numbers from 0, one a sample: take "
            'partition="iid", or give a dict of data sets by client.'
        )
    return classes


def stated_targets(dataset: Any, known: dict[int, Tensor | None]) -> Tensor | None:
    """Return the targets in a data set's attribute, int64 ``[n]``, without reading items.

    None without such an attribute of whole numbers.  ``known`` caches targets by the data set's ``id``.
    """
    if type(dataset) is Subset:
        targets = stated_targets(dataset.dataset, known)
        return None if targets is None else targets[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if type(dataset) is ConcatDataset:
        parts = [part for part in (stated_targets(part, known) for part in dataset.datasets) if part is not None]
        return torch.cat(parts) if len(parts) == len(dataset.datasets) else None
    if id(dataset) not in known:
        known[id(dataset)] = None
        with suppress(Exception):  # a property of the user's may raise anything
            candidates = [getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)]
            candidates += [dataset.tensors[-1]] if isinstance(dataset, TensorDataset) else []
            fitting = (values for values in candidates if hasattr(values, "__len__") and len(values) == len(dataset))
            known[id(dataset)] = _whole_numbers(next(fitting, ()), len(dataset))
    return known[id(dataset)]


def _whole_numbers(values: object, count: int) -> Tensor | None:
    try:
        numbers = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if numbers.shape != (count,) or numbers.is_floating_point() else numbers.to(torch.int64)


def _difference(pool: Items, classes: Tensor) -> str:
    """Describe an item that differs from its stated class, or return ``""``."""
    rows = np.unique(np.linspace(0, len(classes) - 1, COMPARED).astype(np.int64))
    for row, item in zip(rows.tolist(), pool.read(rows, 0), strict=True):
        target = _whole_numbers([split_targets(item)[1]], 1)
        if target is not None and target != classes[row]:
            return f"its attribute states the class {classes[row]} of item {row}, whose target is {target.item()}"
    return ""


def is_dataset(value: object) -> bool:
    if isinstance(value, (Tensor, np.ndarray, list, tuple, Mapping, str)):
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _check_arrays(value: object, title: str) -> None:
    arrays: list[Any] = [*value] if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if not all(isinstance(array, (np.ndarray, Tensor)) for array in arrays):
        return
    casts, words = {"float64": ".float()", "int32": ".long()"}, []
    for name, array in zip("Xy", arrays, strict=False):
        tensor = f"torch.from_numpy({name})" if isinstance(array, np.ndarray) else name
        words.append(tensor + casts.get(str(array.dtype).removeprefix("torch."), ""))
    raise UserError(
        f"{title} is {'a pair of arrays' if len(arrays) == 2 else 'an array'}: give "
        f"torch.utils.data.TensorDataset({', '.join([*words, 'y'][:2])})."
    )


def _check(dataset: Any, name: str, limit: int = LONGEST) -> MapStyle:
    """Return a map-style data set, or raise UserError."""
    _check_arrays(dataset, name)
    if isinstance(dataset, DataLoader):
        sampler = "" if dataset.sampler is None else f" and sampler ({type(dataset.sampler).__name__})"
        raise UserError(
            f"{name} is a DataLoader: give its dataset and collate_fn; its batch size ({dataset.batch_size}){sampler} "
            "are the run's own."
        )
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        raise UserError(f"{name} has no length and no order ({type(dataset).__name__}): give a map-style data set.")
    if isinstance(dataset, (list, tuple)) or (isinstance(dataset, Mapping) and 0 not in dataset):
        holds = f", of {first_of([*map(str, dataset)], 4)}" if isinstance(dataset, Mapping) else " of samples"
        raise UserError(f"{name} is a {type(dataset).__name__}{holds}: give a data set, a class with len and [index].")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            f"{name} must be a map-style data set, with len and [index], not an object of type "
            f"{type(dataset).__name__}."
        )
    try:
        count = len(dataset)
    except RAISED as error:  # the user's own code, or a result that is no length
        raise UserError(
            f"{name} has no length that is a whole number from 0 ({name_cause(error)}): mend its __len__."
        ) from error
    if count == 0:
        raise UserError(f"{name} has no samples: leave it out.")
    if count > limit:
        raise UserError(
            f"{name} has {count:,} samples, and at most {limit:,} fit into an epoch: take some of a client's with "
            "train_samples=N, and of another set with torch.utils.data.Subset."
        )
    checked: MapStyle = dataset
    return checked
