"""Partition statistics: class counts and label skew of every client, for the partition table and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PartitionStatistics:
    """Client x class counts of a partition.

    Attributes:
        counts: int64 ``[clients, classes]``, number of training samples.
        classes: class names, in label order.
        partition: specification of the partition, for example ``"dirichlet:0.5"``.
    """

    counts: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    partition: str

    @staticmethod
    def of(labels: Sequence[npt.NDArray[np.int64]], classes: tuple[str, ...], partition: str) -> PartitionStatistics:
        """Counts the ``labels`` (one int64 array per client)."""
        counts = np.stack([np.bincount(one, minlength=len(classes)) for one in labels]).astype(np.int64)
        return PartitionStatistics(counts, classes, partition)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of every client, int64 ``[clients]``."""
        return self.counts.sum(axis=1)

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Class shares inside every client, float64 ``[clients, classes]`` (rows sum to 1)."""
        shares: npt.NDArray[np.float64] = self.counts / np.maximum(self.sizes[:, None], 1)
        return shares

    @property
    def skew(self) -> npt.NDArray[np.float64]:
        """Total variation distance of every client's class shares from the overall class shares, in [0, 1]."""
        overall = self.counts.sum(axis=0) / max(int(self.counts.sum()), 1)
        distance: npt.NDArray[np.float64] = np.abs(self.shares - overall).sum(axis=1) / 2
        return distance

    def header(self) -> list[str]:
        """Column names of `rows`."""
        return ["client", "samples", "skew", *self.classes]

    def rows(self, limit: int | None = None) -> list[list[str]]:
        """One row of strings per client and a closing row of totals; at most ``limit`` clients are listed."""
        shown = len(self.counts) if limit is None else min(limit, len(self.counts))
        rows = [
            [str(k), str(self.sizes[k]), f"{self.skew[k]:.2f}", *(str(count) for count in self.counts[k])]
            for k in range(shown)
        ]
        if shown < len(self.counts):
            rows.append([f"... {len(self.counts) - shown} more", "", "", *("" for _ in self.classes)])
        totals = self.counts.sum(axis=0)
        mean_skew = float(self.skew.mean()) if len(self.counts) else 0.0
        rows.append(["all", str(totals.sum()), f"{mean_skew:.2f}", *(str(total) for total in totals)])
        return rows
