"""Types of a federated data set: pools of labelled images, sources and the federation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkern.data.forms import ImageForm, Scale
from fedkern.data.images.full_masks import FullMasks
from fedkern.data.sources.arrays import ArrayPair, parts_of_arrays
from fedkern.data.sources.datasets import Sets, parts_of_datasets
from fedkern.data.sources.items import Items
from fedkern.data.split import Split, describe, rows_of
from fedkern.files.filesystem import check_text
from fedkern.streams import stream
from fedkern.tasks import Task, task_of
from fedkern.tasks.partition_statistics import SKEW, PartitionStatistics
from fedkern.text_table import Table

LISTED = 12
"""Most clients in a notebook's table of the data."""
Labelled = tuple[Tensor, Tensor]
"""Images and their labels."""
AnySplit = Split | Items
"""Images or other samples, which `fedkern.engine.local.samples.reader` reads in batches."""


@dataclass(frozen=True)
class Pool:
    """Labelled images that may still be on disk.

    Only requested rows are read.

    Attributes:
        labels: int64 ``[n]``; for segmentation the largest object class of every image, which a partition may use; for
            several labels per image uint8 ``[n, L]``.
        ids: name of every image.
        read: maps int64 ``[m]`` rows to uint8 ``[m, C, H, W]`` images and, where they were resized, `Split.sizes`.
        groups: int64 ``[n]``, the client that the data set itself assigns to each image (a set of contexts), or None.
        targets: maps int64 ``[m]`` rows to the class of every pixel, int64 ``[m, H, W]`` (segmentation), or None.
        texts: caption or report of every image, or None.
        full, task: as in `Split`.
        cases, patients: int64 ``[n]``, as in `Split`; divided between clients only where the data set names the
            clients.
    """

    labels: Tensor
    ids: tuple[str, ...]
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    groups: Tensor | None = None
    targets: Callable[[Tensor], Tensor] | None = None
    texts: tuple[str, ...] | None = None
    cases: Tensor | None = None
    patients: Tensor | None = None
    full: FullMasks | None = None
    task: Task = None  # type: ignore[assignment]  # never None afterwards

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", self.task or task_of(self.labels, self.texts, self.targets))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """Read ``rows`` (int64 ``[m]``).

        Raises:
            ValueError: ``read`` returns images that are not uint8 ``[m, C, H, W]``.
        """
        images, sizes = self.read(rows)
        if images.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 [n, C, H, W], got {describe(images)}")
        labels = self.labels[rows] if self.targets is None else self.targets(rows)
        columns = {name: rows_of(getattr(self, name), rows) for name in ("ids", "texts", "cases", "patients", "full")}
        return Split(images, labels, sizes=sizes, homes=rows_of(self.groups, rows), task=self.task, **columns)


def memory_pool(
    images: Tensor, labels: Tensor, prefix: str, rows: Tensor | None = None, targets: Tensor | None = None
) -> Pool:
    """Return a pool over images in memory, named ``prefix/row``.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: of all images, see :class:`Pool`.
        rows: int64 ``[m]``, the images in the pool; None: all.
        targets: the classes of all pixels, int64 ``[N, H, W]`` (segmentation).
    """
    rows = torch.arange(len(labels)) if rows is None else rows
    return Pool(
        labels=labels[rows],
        ids=tuple(f"{prefix}/{i}" for i in rows.tolist()),
        read=lambda positions: (images[rows[positions]], None),
        targets=None if targets is None else lambda positions: targets[rows[positions]],
    )


@dataclass(frozen=True)
class Source:
    """Data set before it is federated: its fixed pools, which no seed changes.

    Attributes:
        classes: class names, in label order.
        train: training pool, shared out among the clients.
        validation: same distribution as ``train``, never trained on.
        tests: named test pools, as in `FederatedData`.
        mean, std: per channel, of images in [0, 1].
        augment: augmentation of training batches: a name in `fedkern.data.images.transforms.AUGMENTATIONS`.
        groups: number of clients that the data set's own attributes define, or None.
        crop: side of the image window that networks see; 0 for the whole image.
        sites: names of these clients, in order; empty without names.
        named_by: the column or layout that names the sites, in words.  Such sites are the clients unless the user asks
            for another partition.  Empty where ``attribute`` must be asked for.
        unnamed: number of training images without a site under ``named_by``; if there are any, no image has a group.
        lost: sites without a training image, because all their images were drawn into held-out sets.
        own_tests: whether ``groups`` of the only test pool assigns images to the clients' own test sets.
        notices: sentences for the user on values that were left out or read differently.
        drawn_validation: whether the validation images were drawn from those that clients would train on.
        files: ``grey_bits``, ``window``, ``seen``, ``outside`` and ``sites`` of `fedkern.data.forms.ImageForm`; empty
            without image files.
        compared: whether a run looks for equal images under several names; copies in published sets are known.
    """

    classes: tuple[str, ...]
    train: Pool
    validation: Pool
    tests: dict[str, Pool]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    groups: int | None = None
    crop: int = 0
    sites: tuple[str, ...] = ()
    named_by: str = ""
    unnamed: int = 0
    lost: tuple[str, ...] = ()
    own_tests: bool = False
    notices: tuple[str, ...] = ()
    drawn_validation: bool = False
    files: Mapping[str, Any] = field(default_factory=dict)
    compared: bool = False

    def with_pools(self, change: Callable[[Pool], Pool]) -> Source:
        """Return the data set with ``change`` applied to every pool."""
        tests = {name: change(pool) for name, pool in self.tests.items()}
        return replace(self, train=change(self.train), validation=change(self.validation), tests=tests)


@dataclass(frozen=True)
class DataRequest:
    """Request of a run to a data set, see `fedkern.data.load`.

    None for clients and partition means the data set's defaults.
    """

    root: str | Path | None = None
    clients: int | None = None
    partition: str | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    train_samples: int | None = None
    public_samples: int = 0
    test_samples: int = 0
    validation_samples: int = 0
    cache: str | Path | None = None
    progress: Callable[[str], None] | None = None


def client_label(names: Sequence[str] | None, client: int) -> str:
    """Return a client's number, with its name if clients have names: ``1 (Berlin)``."""
    return str(client) if names is None else f"{client} ({names[client]})"


def memory_source(
    data: str,
    train: Labelled,
    test: Labelled,
    held_out: int,
    classes: tuple[str, ...],
    scale: Scale,
    *,
    order: Sequence[int] | None = None,
    augment: str = "none",
) -> Source:
    """Return a data set in memory.

    The last ``held_out`` training images in ``order`` are the validation set; the default order is random, but the same
    for every seed.
    """
    count = len(train[1])
    order = stream(0, f"split/{data}").permutation(count).tolist() if order is None else order
    training, validation = (memory_pool(*train, "train", rows) for rows in fixed_rows(order, count - held_out))
    return Source(classes, training, validation, {"": memory_pool(*test, "test")}, *scale, augment)


@dataclass(frozen=True)
class FederatedData:
    """Data set shared out among clients, in splits of one kind: `AnySplit`.

    Attributes:
        name: the data set's name in `fedkern.data.DATASETS`.
        classes: class names, in label order.
        clients: one training split per client.  Images may be larger than the form's: a network sees a window.
        validation: same distribution as the clients' data, never trained on; the only set for choosing settings.
        tests: ``{"": split}`` for one test set (metric ``accuracy``), or ``{"id": ..., "ood": ...}`` (``id_accuracy``,
            ``ood_accuracy``).
        form: how samples enter a network.
        statistics: number of samples of each class per client.
        image_ids: names of all images of the data set, used or not; a boxes file may name any of these.
        public: training images that no client holds and all participants may see, or None.
        client_tests: own test split of every client, or empty (captions; site folders; `fedkern.data.sharing.holdout`).
        drawn_validation: whether the validation images are clients' data, which no noise of a private run covers, see
            `Source.drawn_validation`.
        client_names: name of every client of the partition, such as its hospital; None if the data name none, and
            messages then show numbers.
        identity: hashes of the data set, independent of seed and partition (:func:`fedkern.data.identity.identity`);
            empty unless asked for.
        sights: inspection results of data sets of items, by their ``id``, once a run has inspected them
            (:mod:`fedkern.data.sources.items`).

    Raises:
        ValueError: images whose dtype is not the form's.
        UserError: a name of a client, test set or class that is not UTF-8.
    """

    name: str
    classes: tuple[str, ...]
    clients: tuple[Any, ...]
    validation: Any
    tests: dict[str, Any]
    form: Any  # ImageForm or SampleForm
    statistics: PartitionStatistics
    image_ids: frozenset[str] = field(default=frozenset(), repr=False)
    public: Any = None
    client_tests: tuple[Any, ...] = ()
    client_names: tuple[str, ...] | None = None
    drawn_validation: bool = False
    identity: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    sights: Mapping[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for split in (*self.clients, self.validation, *self.tests.values()) if self.form.offers else ():
            if str(split.images.dtype) != f"torch.{self.form.dtype}":
                raise ValueError(f"images: expected {self.form.dtype} [n, C, H, W], got {describe(split.images)}")
        named = {"client": self.client_names or (), "test set": self.tests, "class": self.classes}
        for kind, names in named.items():
            for name in names:
                check_text(str(name), f"the {kind}", "give it another name")

    def __repr__(self) -> str:
        return f"<fedkern.FederatedData {self._about()}>"

    def _repr_html_(self) -> str:
        statistics = self.statistics
        words = 1 + (statistics.names is not None)
        notes = [f"partition: {statistics.partition}", *([SKEW] if statistics.classes else [])]
        return Table(statistics.header(), statistics.rows(LISTED), self._about(), words, notes).html()

    def _about(self) -> str:
        clients, validation = len(self.clients), len(self.validation)
        sizes = [f"{sum(self.client_sizes):,} training", *([f"{validation:,} validation"] if validation else [])]
        sizes += [f"{len(split):,} {f'{name} ' if name else ''}test" for name, split in self.tests.items()]
        samples_text = f"{', '.join(sizes)} {self.form.noun}{self.form.size_text()}"
        return f"{self.name}: {clients} client{'s' * (clients != 1)}, {samples_text}"

    def client_label(self, client: int) -> str:
        """Return a training client in messages, see `client_label`.

        The single client of `pooled` data has no name.
        """
        named = self.client_names is not None and len(self.client_names) == len(self.clients)
        return client_label(self.client_names if named else None, client)

    @property
    def task(self) -> Task:
        """Task of the data."""
        task: Task = self.validation.task
        return task

    @property
    def offers(self) -> frozenset[str]:
        """Data offered to methods (`fedkern.tasks.Task.offers`)."""
        return frozenset(self.task.offers - (ImageForm.offers - self.form.offers))

    @property
    def splits(self) -> list[Any]:
        """All splits: clients, validation, tests, public and the clients' own tests."""
        public = [] if self.public is None else [self.public]
        return [*self.clients, self.validation, *self.tests.values(), *public, *self.client_tests]

    def with_splits(self, change: Callable[[Any], Any]) -> FederatedData:
        """Return the data with ``change`` applied to every split."""
        return replace(
            self,
            clients=tuple(map(change, self.clients)),
            validation=change(self.validation),
            tests={name: change(split) for name, split in self.tests.items()},
            public=None if self.public is None else change(self.public),
            client_tests=tuple(map(change, self.client_tests)),
        )

    @property
    def client_sizes(self) -> tuple[int, ...]:
        """Number of training samples of every client."""
        return tuple(len(client) for client in self.clients)

    @classmethod
    def from_arrays(
        cls,
        clients: Mapping[str, ArrayPair] | Sequence[ArrayPair],
        test: ArrayPair | Mapping[str, ArrayPair] | None = None,
        *,
        validation: ArrayPair | None = None,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str = "none",
        task: str = "auto",
    ) -> FederatedData:
        """Make federated data from arrays in memory.

        Args:
            clients: pairs (images, labels) by client name, or in client order.  Images are NumPy arrays or tensors,
                uint8 or floats in [0, 1], ``[n, C, H, W]``, ``[n, H, W, C]`` or ``[n, H, W]``.  Labels are whole
                numbers from 0, ``[n]``, or for segmentation ``[n, H, W]``, negative where the class is unknown; for
                several labels per image 0 and 1 of any dtype, ``[n, L]`` with L of at least 2.
            test: a pair, or pairs by name of the test set; at least one is required.
            validation: a pair for choosing settings.
            classes: names of the classes, or of the L labels; default: their numbers.
            mean, std: per channel, of images in [0, 1]; default 0.5 and 0.25.
            augment: augmentation of training batches: a name in `fedkern.data.images.transforms.AUGMENTATIONS`.
            task: name of a task with such labels: ``"multilabel"`` where every image has exactly one of labels
                ``[n, L]``.

        Returns:
            Data with a client for every pair, for :func:`fedkern.simulate`.

        Raises:
            UserError: shapes or dtypes that do not fit, a class below 0, class names that are too few, empty or equal,
                or one-hot labels without ``task``; the message names the client or set.

        Warns:
            UserWarning: floats are no multiples of 1/255, and are rounded to these.
        """
        parts: dict[str, Any] = parts_of_arrays(clients, test, validation, classes, mean, std, augment, task)
        return cls(**parts)

    @classmethod
    def from_datasets(cls, clients: Sets, test: Sets, **about: Any) -> FederatedData:
        """Make federated data from map-style PyTorch data sets, whose samples are read when a batch needs them.

        Args:
            clients: data sets by client name, or in client order; or a single one, which is shared out.
            test: a data set, or data sets by name.  If these are the names of all clients, the sets are the clients'
                own, and together the test set.
            about: by keyword

                - ``validation``: a data set for choosing settings, or several by name, which are joined (with clients'
                  names, a private run reports no metric on them); ``public``: a data set that no client owns;
                - ``loss_fn`` or ``batch_loss``, ``metrics``, ``main``, ``better``: see :class:`fedkern.tasks.OwnTask`.
                  Default: cross-entropy and the metrics of classification, where targets are classes;
                - ``collate_fn``: makes a batch of a list of samples, as for ``torch.utils.data.DataLoader``;
                - ``task``: instead of a loss an object of a class derived from ``fedkern.tasks.Task``;
                - ``classes``: their names, or their number; default: the number of the network's outputs;
                - ``normalize``: ``(mean, std)``, two numbers or one of each per channel.  For float images: the values
                  of the data set's transform, which convert images back to pixels.  For uint8 images: the values that
                  normalise them for fedkern's networks (default 0.5 and 0.25);
                - ``groups``: patient or site of every sample, a text or a number, None where unknown: the name of an
                  attribute of the data sets with a value for every item, of a column, or of a key of items; or a
                  function of an item's index in the data set below ``Subset`` and ``ConcatDataset``;
                - ``partition`` (``"iid"``), ``count`` (5), ``seed`` (0): how a single data set is shared out, by the
                  classes in its ``targets``, ``labels`` or last of ``tensors``, or else read item by item.  Groups stay
                  whole; under ``"attribute"`` every group is a client of its name;
                - ``samples``: number of training samples to use instead of all.

        Returns:
            Data with a client for every data set, for :func:`fedkern.simulate`.

        Raises:
            UserError: a data set is not map-style, there is no loss for such targets, or a group is missing or neither
                a text nor a number; the message names it.

        Warns:
            UserWarning: all items are read for their classes or groups, as no attribute states these.
        """
        parts: dict[str, Any] = parts_of_datasets(clients, test, **about)
        return cls(**parts)

    def pooled(self) -> FederatedData:
        """Return the data with one client that holds all training samples.

        Statistics and names remain those of the partition.
        """
        return replace(self, clients=(self.clients[0].plus(self.clients[1:]),))


def fixed_rows(order: Sequence[int], *counts: int) -> list[Tensor]:
    """Cut ``order`` into consecutive sorted pieces of ``counts``, and the rest."""
    rows = torch.as_tensor(order, dtype=torch.int64)
    pieces = torch.split(rows, [*counts, len(rows) - sum(counts)])
    return [torch.sort(piece).values for piece in pieces]
