"""Class counts and label skew of every client, for the partition table and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkern.tasks import CLASSIFICATION, Task

SKEW = "skew: share of a client's samples that would need another class to give it the class shares of all clients"
"""Explanation of `PartitionStatistics.skew` for displays."""


@dataclass(frozen=True)
class PartitionStatistics:
    """Client x class counts of a partition.

    Attributes:
        counts: int64 ``[clients, classes]``, number of training samples; for images with several labels, of every
            label.
        classes: class names, in label order.
        partition: specification of the partition, for example ``"dirichlet:0.5"``.
        names: name of every client, or None if the data name none.
        own_tests: samples of every client's own test set, which the client does not train on; empty if the table does
            not list them.
        held_out: name (or number before it was taken out) and number of samples of the client that never trains; None
            if all clients train.
        colours: uint8 ``[clients, classes, 3]``, the background colour that most of a client's images of a class have;
            None if backgrounds have no such colours.
        tied: share of the images that have that colour; the others have random ones.
        samples: training samples of every client; None if they are the sums of ``counts``.
    """

    counts: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    partition: str
    names: tuple[str, ...] | None = None
    own_tests: tuple[int, ...] = ()
    held_out: tuple[str, int] | None = None
    colours: npt.NDArray[np.uint8] | None = None
    tied: float = 0.0
    samples: tuple[int, ...] | None = None

    @staticmethod
    def of(
        labels: Sequence[np.ndarray], classes: tuple[str, ...], partition: str, task: Task = CLASSIFICATION
    ) -> PartitionStatistics:
        """Count ``labels``, an array per client."""
        counts = np.stack([task.counts(values, len(classes)) for values in labels]).astype(np.int64)
        return PartitionStatistics(counts, classes, partition, samples=tuple(map(len, labels)))

    @staticmethod
    def of_table(table: Mapping[str, Any]) -> PartitionStatistics:
        """Return the statistics stored as a JSON table.

        Raises:
            KeyError, TypeError, ValueError: the table does not hold statistics.
        """
        values: dict[str, Any] = {name: tuple(cell) if isinstance(cell, list) else cell for name, cell in table.items()}
        counts = np.array(table["counts"], dtype=np.int64).reshape(len(table["counts"]), len(table["classes"]))
        colours = None if table["colours"] is None else np.array(table["colours"], dtype=np.uint8)
        return PartitionStatistics(**values | {"counts": counts, "colours": colours})

    def recounted(self, splits: Sequence[Any], own_tests: Sequence[int] | None = None) -> PartitionStatistics:
        """Return the same partition with new sample counts, after some samples were set aside.

        Args:
            splits: a `fedkern.data.Split` of every client.
            own_tests: samples of every client's own test set; None keeps the table's.
        """
        test_sizes = self.own_tests if own_tests is None else tuple(own_tests)
        samples = tuple(map(len, splits))
        if not self.classes:
            return replace(self, samples=samples, own_tests=test_sizes)
        labels = [split.image_labels.numpy() for split in splits]
        recount = PartitionStatistics.of(labels, self.classes, self.partition, splits[0].task)
        return replace(self, counts=recount.counts, samples=samples, own_tests=test_sizes)

    def without(self, client: int, samples: int) -> PartitionStatistics:
        """Return the same partition with one client held out, whose ``samples`` are a test set."""
        staying = [k for k in range(len(self.counts)) if k != client]
        return replace(
            self,
            counts=self.counts[staying],
            names=None if self.names is None else tuple(self.names[k] for k in staying),
            own_tests=tuple(self.own_tests[k] for k in staying) if self.own_tests else (),
            held_out=(self.labels[client], samples),
            colours=None if self.colours is None else self.colours[staying],
            samples=None if self.samples is None else tuple(self.samples[k] for k in staying),
        )

    @property
    def title(self) -> str:
        """The partition in words, such as ``label skew, Dirichlet(0.1)``."""
        name, *values = self.partition.strip().split(":")
        number = float(values[0]) if name in ("dirichlet", "classes", "quantity", "domain") else 0.0
        return {
            "iid": "equal random shares",
            "stratified": "equal shares of every class",
            "dirichlet": ", ".join([f"label skew, Dirichlet({number:g})", *values[1:]]),
            "classes": f"label skew, {number:.0f} classes a client",
            "quantity": ", ".join([f"quantity skew, Dirichlet({number:g})", *values[1:]]),
            "attribute": "attribute skew",
            "domain": f"domain skew, {number:g} of 1 mixed",
        }.get(name, self.partition)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of every client, int64 ``[clients]``."""
        return self.counts.sum(axis=1) if self.samples is None else np.array(self.samples, dtype=np.int64)

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Class shares inside every client, float64 ``[clients, classes]`` (rows sum to 1)."""
        shares: npt.NDArray[np.float64] = self.counts / np.maximum(self.counts.sum(axis=1)[:, None], 1)
        return shares

    @property
    def skew(self) -> npt.NDArray[np.float64]:
        """Total variation distance of every client's class shares from the overall class shares, in [0, 1]."""
        overall = self.counts.sum(axis=0) / max(int(self.counts.sum()), 1)
        distance: npt.NDArray[np.float64] = np.abs(self.shares - overall).sum(axis=1) / 2
        return distance

    @property
    def labels(self) -> list[str]:
        """The name of every client, or its number if clients have no names."""
        return list(self.names) if self.names is not None else [str(k) for k in range(len(self.counts))]

    def spread(self, limit: int) -> npt.NDArray[np.int64]:
        """Return the clients to show in a picture, int64: all in order, or ``limit`` of them by size.

        With more clients than ``limit``, clients are evenly spaced in the order of their samples, the largest first and
        the smallest last.
        """
        count = len(self.counts)
        if count <= limit:
            return np.arange(count)
        places = np.linspace(0, count - 1, limit).round().astype(np.int64)
        return np.argsort(-self.sizes, kind="stable")[places]

    @property
    def untrained(self) -> bool:
        """True if the table has the column ``own test``: samples of clients that no client trains on."""
        return bool(self.own_tests) or self.held_out is not None

    def header(self) -> list[str]:
        """Return the column names of `rows`."""
        return self._row("client", "name", "samples", "own test", "skew", self.classes)

    def _row(self, head: str, name: str, size: object, test: object, skew: str, counts: Sequence[object]) -> list[str]:
        """Return the cells of a row, without the columns that the table does not have."""
        named = [name] if self.names is not None else []
        test_cells = [str(test)] if self.untrained else []
        cells = [skew, *map(str, counts)] if self.classes else []
        return [head, *named, str(size), *test_cells, *cells]

    def rows(self, limit: int | None = None) -> list[list[str]]:
        """Return a row of strings per client, one for a held-out client and one of totals.

        ``limit``: most clients listed.
        """
        clients = len(self.counts) if limit is None else min(limit, len(self.counts))
        tests = [*self.own_tests] or [0] * len(self.counts)
        totals = self.counts.sum(axis=0)
        mean_skew = float(self.skew.mean()) if len(self.counts) else 0.0
        nothing = [""] * len(self.classes)
        rows = [
            self._row(str(k), self.labels[k], self.sizes[k], tests[k], f"{self.skew[k]:.2f}", list(self.counts[k]))
            for k in range(clients)
        ]
        if clients < len(self.counts):
            rows.append(self._row(f"... {len(self.counts) - clients} more", "", "", "", "", nothing))
        if self.held_out is not None:
            title = "held out" if self.names is not None else f"held out ({self.held_out[0]})"
            rows.append(self._row(title, self.held_out[0], "", self.held_out[1], "", nothing))
        untrained = sum(tests) + (self.held_out[1] if self.held_out is not None else 0)
        rows.append(self._row("all", "", self.sizes.sum(), untrained, f"{mean_skew:.2f}", list(totals)))
        return rows
