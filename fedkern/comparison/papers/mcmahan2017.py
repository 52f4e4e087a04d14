"""Networks and data of FedAvg's first table (McMahan et al., AISTATS 2017, arXiv 1602.05629, section 3)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.comparison.papers.pixel_mnist import pixel_mnist
from fedkern.data.types import FederatedData
from fedkern.errors import UserError
from fedkern.streams import stream

SHARDS = 2
"""Shards of a client if the data are sorted."""


class TwoNN(nn.Sequential):
    """Two hidden layers of 200 units with ReLU: 199,210 parameters on MNIST."""

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(channels * image_size**2, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(),
            nn.Linear(200, classes),
        )  # fmt: skip


class CNN(nn.Sequential):
    """Two 5x5 convolutions with 32 and 64 channels, each before a 2x2 max pooling, and 512 units with ReLU.

    1,663,370 parameters on MNIST, which shows that the convolutions keep the size of their input.
    """

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        convolutions = []
        for before, after in ((channels, 32), (32, 64)):
            convolutions += [nn.Conv2d(before, after, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(
            *convolutions, nn.Flatten(), nn.Linear(64 * (image_size // 4) ** 2, 512), nn.ReLU(), nn.Linear(512, classes)
        )


def mnist(root: str | Path | None, clients: int, partition: str, seed: int) -> FederatedData:
    """Load MNIST with all 60,000 training images at clients of equal size, pixels in [0, 1], without validation set.

    ``partition`` is ``iid``, or ``classes:2`` for the paper's own split: sorted by digit and cut into two shards a
    client, of 300 images with 100 clients.
    """
    return pixel_mnist(root, lambda labels: shares(labels, clients, partition, seed))


def shares(labels: Tensor, clients: int, partition: str, seed: int) -> list[Tensor]:
    """Return the rows of every client, int64."""
    draw = stream(seed, "partition").permutation
    if partition == "iid":
        return [torch.from_numpy(rows) for rows in np.array_split(draw(len(labels)), clients)]
    if partition != f"classes:{SHARDS}":
        raise UserError(f'the paper has the partitions iid and classes:{SHARDS}, not "{partition}".')
    shards = np.array_split(torch.sort(labels, stable=True).indices.numpy(), SHARDS * clients)
    deal = draw(SHARDS * clients).reshape(clients, SHARDS)
    return [torch.from_numpy(np.concatenate([shards[number] for number in hand])) for hand in deal]
