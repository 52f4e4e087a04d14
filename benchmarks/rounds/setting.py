"""Writer of a task's folder with fedkern's own networks, streams and data (see task.Task)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkern import models
from fedkern.data import load, normalise
from fedkern.streams import stream
from fedkern.tasks.user_tasks import user_module

from .task import CLASSES, NETWORKS

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10
SEED = 0
TEST = 2000
NOISE = 64.0  # of the synthetic images, in grey levels


NAMES = {
    "lenet": "LeNet", "mcmahan": "McMahan's CNN", "own-resnet8": "a user's ResNet-8/{1}",
    "own-resnet8-gn": "a user's ResNet-8/{1} with group norm",
}  # fmt: skip
"""Networks as users write them, by their names in tables."""


@dataclass(frozen=True)
class Setting:
    """Size of the benchmark.

    Attributes:
        model: one of :data:`NAMES`, or a network of fedkern's that task.py knows too.
        width: channels of its first stage.
        rounds: those that are timed; the first counts apart, and one more is played behind them.
        repeats: processes that every program gets.
    """

    model: str
    width: int
    clients: int
    samples: int = 200
    rounds: int = 5
    repeats: int = 5
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.02
    momentum: float = 0.9

    @property
    def case(self) -> str:
        """Return the row's name."""
        network = NAMES.get(self.model, "{}/{}").format(self.model, self.width)
        return f"{network}, {self.clients} clients × {self.samples}"


def write(setting: Setting, folder: Path, data_root: str | None = None) -> None:
    """Write the task into an empty folder: CIFAR-10 from ``data_root``, or synthetic images of its shape."""
    count = setting.clients * setting.samples
    images, labels, test_images, test_labels = (
        synthetic(count, TEST) if data_root is None else cifar10(data_root, count, TEST)
    )
    shape = (setting.clients, setting.samples)
    np.save(folder / "raw_images.npy", images.numpy().reshape(*shape, *images.shape[1:]))
    np.save(folder / "raw_test_images.npy", test_images.numpy())
    for name, pictures, lead in (("images", images, shape), ("test_images", test_images, (TEST,))):
        # NHWC, so that a network with channels-last weights needs no copy of its batches.
        rows = normalise(pictures, MEAN, STD, channels_last=True).permute(0, 2, 3, 1).contiguous()
        np.save(folder / f"{name}.npy", rows.numpy().reshape(*lead, *rows.shape[1:]))
    np.save(folder / "labels.npy", labels.numpy().reshape(shape))
    np.save(folder / "test_labels.npy", test_labels.numpy())
    rounds = setting.rounds + 1  # where the last timed one ends, another begins
    orders = np.empty((rounds, setting.clients, setting.epochs, setting.samples), np.int64)
    for round in range(rounds):
        for client in range(setting.clients):
            rng = stream(SEED, "batches", round=round, client=client)  # as the engine's clients draw them
            for epoch in range(setting.epochs):
                orders[round, client, epoch] = rng.permutation(setting.samples)
    np.save(folder / "orders.npy", orders)
    torch.save(first_weights(setting), folder / "initial.pt")
    content = {name: getattr(setting, name) for name in ("model", "width", "clients", "samples", "epochs")}
    content |= {name: getattr(setting, name) for name in ("batch_size", "lr", "momentum")}
    (folder / "task.json").write_text(json.dumps({**content, "rounds": rounds, "seed": SEED}))


def register(model: str) -> None:
    """Register a network that is not fedkern's, as its author would."""
    if model in NAMES and model not in models.MODELS:
        models.register_model(model)(lambda width: NETWORKS[model](width))


def first_weights(setting: Setting) -> dict[str, Tensor]:
    """Return the state dict that a run of fedkern's with this seed begins with."""
    register(setting.model)
    module = models.build(setting.model, classes=CLASSES, channels=3, image_size=32, seed=SEED, width=setting.width)
    return dict(user_module(module).state_dict())


def cifar10(root: str, count: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first ``count`` training images in a fixed random order, and the first ``test`` test images."""
    data = load("cifar10", root=root, clients=1, partition="iid", seed=SEED, train_samples=count)
    (train,) = data.clients
    split = data.tests[""]
    order = torch.from_numpy(stream(SEED, "rounds/order").permutation(len(train.labels)))
    return train.images[order], train.labels[order], split.images[:test], split.labels[:test]


def synthetic(count: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return uint8 ``[n, 3, 32, 32]`` of a smooth picture per class under noise, with labels, for speed alone."""
    rng = stream(SEED, "rounds/synthetic")
    coarse = torch.from_numpy(rng.uniform(64, 192, (CLASSES, 3, 4, 4))).float()
    pictures = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    labels = torch.from_numpy(rng.integers(CLASSES, size=count + test))
    images = torch.empty(count + test, 3, 32, 32, dtype=torch.uint8)
    for start in range(0, count + test, 1000):
        rows = slice(start, min(start + 1000, count + test))
        noise = torch.from_numpy(rng.normal(0, NOISE, (rows.stop - rows.start, 3, 32, 32)).astype(np.float32))
        images[rows] = (pictures[labels[rows]] + noise).clamp(0, 255).to(torch.uint8)
    return images[:count], labels[:count], images[count:], labels[count:]
