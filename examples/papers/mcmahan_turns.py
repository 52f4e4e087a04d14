"""FedAvg's first table with one thing changed at a time: initial weights, inputs, order of samples, shards.

    python -m benchmarks.studies.run mcmahan_turns --data-root DIR

The paper (McMahan et al., AISTATS 2017, arXiv 1602.05629) says none of these things. The table itself is
``fedkern/comparison/papers/mcmahan2017.toml``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedkern import FederatedData, register, register_data
from fedkern.comparison.papers.mcmahan2017 import SHARDS, TwoNN, shares
from fedkern.comparison.papers.pixel_mnist import pixel_mnist
from fedkern.methods import Client, FedAvg, Message, Phase


class Glorot(TwoNN):
    """The 2NN with uniform weights as Glorot's and biases of 0, TensorFlow's later default."""

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        super().__init__(classes, channels, image_size)
        for layer in list(self)[1::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class Normal(TwoNN):
    """The 2NN with normal weights of deviation 0.1, cut at two deviations, and biases of 0.1: a tutorial of 2016."""

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        super().__init__(classes, channels, image_size)
        for layer in list(self)[1::2]:
            nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
            nn.init.constant_(layer.bias, 0.1)


class Fan(TwoNN):
    """The 2NN with normal weights of deviation 1 / sqrt(inputs) and biases of 0: another tutorial of 2016."""

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        super().__init__(classes, channels, image_size)
        for layer in list(self)[1::2]:
            deviation = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            nn.init.zeros_(layer.bias)


class Narrow(nn.Sequential):
    """A 2NN of half the width."""

    def __init__(self, classes: int = 10, channels: int = 1, image_size: int = 28) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(channels * image_size**2, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
            nn.Linear(100, classes),
        )  # fmt: skip


class Standardised(TwoNN):
    """The 2NN on inputs of mean 0 and deviation 1."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images - 0.1307) / 0.3081)


class Centred(TwoNN):
    """The 2NN on pixels of [-0.5, 0.5]."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - 0.5)


@register("fedavg-fixed-batches")
class FixedBatches(FedAvg):
    """FedAvg whose clients cut their samples into batches once, in stored order."""

    requires = frozenset({"loss"})

    def client_update(self, client: Client, phase: Phase, message: Message) -> Message:
        network = client.model(message)
        optimiser = torch.optim.SGD(network.parameters(), lr=client.lr)
        for _ in range(client.epochs):
            for batch in client.in_order(client.batch_size):
                optimiser.zero_grad()
                batch.task.loss(network, batch).backward()
                optimiser.step()
        return client.upload(network)


@register_data("mnist-far-shards", clients=100, partition="classes:2")
def far_shards(root: str | Path | None, *, clients: int, seed: int) -> FederatedData:
    """MNIST where client k has the sorted shards k and k + clients, and thus two digits five apart."""

    def deal(labels: Tensor) -> list[Tensor]:
        shards = np.array_split(torch.sort(labels, stable=True).indices.numpy(), SHARDS * clients)
        return [torch.from_numpy(np.concatenate([shards[k], shards[k + clients]])) for k in range(clients)]

    return pixel_mnist(root, deal)


@register_data("mnist-mixed-shards", clients=100, partition="classes:2")
def mixed_shards(root: str | Path | None, *, clients: int, seed: int) -> FederatedData:
    """MNIST with the paper's shards, whose samples are shuffled at every client before batches are cut once."""

    def deal(labels: Tensor) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return [rows[torch.randperm(len(rows), generator=draw)] for rows in shares(labels, clients, "classes:2", seed)]

    return pixel_mnist(root, deal)
