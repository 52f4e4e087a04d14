"""Network and data of NIID-Bench's MNIST rows (Li et al., ICDE 2022, arXiv 2102.02079, sections III and V)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedkern.comparison.papers.pixel_mnist import pixel_mnist
from fedkern.data.sharing import partition as splits
from fedkern.data.types import FederatedData
from fedkern.errors import UserError
from fedkern.streams import stream


class CNN(nn.Sequential):
    """5x5 convolutions with 6 and 16 channels, each before a 2x2 max pooling, and 120 and 84 units with ReLU.

    44,426 parameters on MNIST. The convolutions do not pad their input, as in the released code.
    """

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        convolutions = []
        for before, after in ((channels, 6), (6, 16)):
            convolutions += [nn.Conv2d(before, after, 5), nn.ReLU(), nn.MaxPool2d(2)]
        features = 16 * (((image_size - 4) // 2 - 4) // 2) ** 2
        super().__init__(
            *convolutions, nn.Flatten(), nn.Linear(features, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, classes),
        )  # fmt: skip


def mnist(root: str | Path | None, clients: int, partition: str, seed: int) -> FederatedData:
    """Load MNIST with all 60,000 training images at the clients, pixels in [0, 1], without validation set.

    ``partition`` is ``classes:S`` for the released code's own split, or one of fedkern's, such as ``dirichlet:0.5``
    and ``quantity:0.5``, which balance as the released code and have at least 10 samples of every client.
    """
    return pixel_mnist(root, lambda labels: shares(labels, clients, partition, seed))


def shares(labels: Tensor, clients: int, partition: str, seed: int) -> list[Tensor]:
    """Return the rows of every client, int64.

    With ``classes:S`` client i holds digit i and S - 1 other random digits, and the holders of a digit share its images
    equally. Unlike in fedkern's own ``classes:S``, a digit may have many holders.
    """
    spec, rng, classes = splits.parse_partition(partition), stream(seed, "partition"), int(labels.max()) + 1
    if spec.name != "classes":
        return [torch.from_numpy(rows) for rows in splits.partition(partition, labels.numpy(), clients, seed)]
    if clients < classes:
        raise UserError(
            f"the paper's {partition} needs a client for every digit, not {clients}: use --clients {classes}."
        )
    other_digits = spec.classes_per_client - 1
    hands = [{own, *(own + 1 + rng.choice(classes - 1, other_digits, replace=False)) % classes}
             for own in np.arange(clients) % classes]  # fmt: skip
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for digit in range(classes):
        holders = [client for client, hand in enumerate(hands) if digit in hand]
        rows = rng.permutation(np.flatnonzero(labels.numpy() == digit))
        for client, piece in zip(holders, np.array_split(rows, len(holders)), strict=True):
            parts[client].append(torch.from_numpy(piece))
    return [torch.cat(part) for part in parts]
