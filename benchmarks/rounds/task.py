"""Shared parts of all programs: one folder of data, batches and first weights, networks, and a client's training.

``python -m benchmarks.rounds.ADAPTER FOLDER OUT THREADS WORKERS`` runs one program on the task in ``FOLDER`` (see
setting.py) and writes ``OUT/marks.json`` and ``OUT/final.pt``.  Where the environment's
:data:`DEVICE` is "cuda", networks and data are on the GPU.  Torch and NumPy are all this file needs.
"""

import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
DEVICE = "FEDKERN_ROUNDS_DEVICE"


class LeNet(nn.Module):
    """Two 5x5 convolutions, each with a 2x2 maximum, and three linear layers (62,006 parameters for 3x32x32)."""

    def __init__(self, classes: int = CLASSES, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, channels, 32, 32]`` to ``[B, classes]``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


class McMahan(nn.Module):
    """Two 5x5 convolutions, each with a 2x2 maximum, and two linear layers (McMahan et al. 2017), for 3x32x32."""

    def __init__(self, classes: int = CLASSES, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 8 * 8, 512)
        self.fc2 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, channels, 32, 32]`` to ``[B, classes]``."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class Staged(nn.Module):
    """Stages, the mean over positions and a linear classifier, named as fedkern names them: weights are exchanged."""

    def __init__(self, stages: list[nn.Module], width: int, classes: int) -> None:
        super().__init__()
        for i, stage in enumerate(stages, 1):
            self.add_module(f"layer{i}", stage)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for name, stage in self.named_children():
            x = stage(x if name != "head" else x.mean((2, 3)))
        return x


def cnn(width: int, classes: int = CLASSES) -> nn.Module:
    """Return three stages of 3x3 convolution, batch norm, ReLU and 2x2 maximum: fedkern's ``--model cnn``."""
    sizes = (3, width, 2 * width, 4 * width)
    stages: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False),
            nn.BatchNorm2d(sizes[i + 1]),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        for i in range(3)
    ]
    return Staged(stages, sizes[-1], classes)


Norm = Callable[[int], nn.Module]


class Block(nn.Module):
    """Two 3x3 convolutions, each with a norm, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict({"0": convolution, "1": norm(outputs)}))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], width: int, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """Return fedkern's ``--model resnet8`` or ``resnet18`` for images of up to 64 pixels and widths from 16."""
    stages: list[nn.Module] = []
    current = width
    for i, count in enumerate(blocks):
        layers: list[nn.Module] = []
        if i == 0:
            layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
        for j in range(count):
            layers.append(Block(current, width * 2**i, 2 if i > 0 and j == 0 else 1, norm))
            current = width * 2**i
        stages.append(nn.Sequential(*layers))
    return Staged(stages, current, CLASSES)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "lenet": lambda width: LeNet(),
    "cnn": cnn,
    "resnet8": lambda width: resnet((1, 1, 1), width),
    "resnet18": lambda width: resnet((2, 2, 2, 2), width),
    "mcmahan": lambda width: McMahan(),
    "own-resnet8": lambda width: resnet((1, 1, 1), width),
    "own-resnet8-gn": lambda width: resnet((1, 1, 1), width, partial(nn.GroupNorm, 8)),
}


@dataclass
class Task:
    """Task of a folder.

    Attributes:
        model, width: which of :data:`NETWORKS`.
        clients: their number; each has ``samples`` samples.
        rounds: how many are played.
        images: fp32 ``[clients, samples, C, H, W]``, normalised, channels-last, mapped from the folder.
        labels: int64 ``[clients, samples]``.
        orders: int64 ``[rounds, clients, epochs, samples]``, the order of a client's samples in an epoch.
        initial: the first global state dict, on the CPU.
        device: where networks, images, labels and orders are.
    """

    folder: Path
    model: str
    width: int
    clients: int
    samples: int
    rounds: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    seed: int
    images: Tensor
    labels: Tensor
    orders: Tensor
    initial: dict[str, Tensor]
    device: torch.device

    @classmethod
    def load(cls, folder: str | Path) -> "Task":
        """Read the files of setting.py.

        On the CPU the images are mapped, so that the processes of a program share them.  A GPU gets all of them at
        once, as every program has its data in memory.
        """
        device = torch.device(os.environ.get(DEVICE, "cpu"))
        folder = Path(folder)
        # Mapped copy-on-write: torch wants memory that it may write to.
        stored = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))
        return cls(
            folder=folder,
            images=stored.to(device).permute(0, 1, 4, 2, 3),
            labels=torch.from_numpy(np.load(folder / "labels.npy")).to(device),
            orders=torch.from_numpy(np.load(folder / "orders.npy")).to(device),
            device=device,
            initial=torch.load(folder / "initial.pt", weights_only=True),
            **json.loads((folder / "task.json").read_text()),
        )

    def network(self, layout: torch.memory_format = torch.channels_last) -> nn.Module:
        """Return the network with the first weights, contiguous for frameworks that cannot send others."""
        module = NETWORKS[self.model](self.width)
        module.load_state_dict(self.initial)
        return module.to(self.device, memory_format=layout)  # type: ignore[call-overload]

    def batches(self, client: int, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of the client's batches in a round, counted from 0."""
        images, labels = self.images[client], self.labels[client]
        for order in self.orders[round, client]:
            for chosen in order.split(self.batch_size):
                yield images.index_select(0, chosen), labels[chosen]

    def train(self, module: nn.Module, client: int, round: int) -> None:
        """Train a client's round: SGD on the cross-entropy, from the weights that ``module`` holds.

        Every framework's adapter calls this in place of that framework's own example of a training loop.
        """
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=self.lr, momentum=self.momentum)
        for images, labels in self.batches(client, round):
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()

    def accuracy(self, state: Mapping[str, Tensor]) -> float:
        """Return the accuracy of a global state dict on the task's test images, 500 at a time.

        Batch norm takes the statistics of these images: some frameworks average the running statistics, others leave
        those of the client that trained last, which says nothing of the weights.
        """
        module = self.network()
        module.load_state_dict(state)
        module.train()
        images = torch.from_numpy(np.load(self.folder / "test_images.npy")).to(self.device).permute(0, 3, 1, 2)
        labels = torch.from_numpy(np.load(self.folder / "test_labels.npy")).to(self.device)
        with torch.no_grad():
            right = [
                (module(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)
            ]
        return int(sum(right)) / len(labels)


class Contest:
    """Request to a program's process, and its answer.

    Attributes:
        task: the task.
        out: where the answer goes.
        threads: torch's threads in each process that trains.
        workers: how many processes train at once.
    """

    def __init__(self, words: list[str]) -> None:
        self.task = Task.load(words[0])
        self.out, self.threads, self.workers = Path(words[1]), int(words[2]), int(words[3])
        self.marks: list[float] = []
        torch.set_num_threads(self.threads)

    def begin(self) -> None:
        """Note that the server begins a round, by the machine's monotonic clock, which the parent can read."""
        if self.task.device.type == "cuda":
            torch.cuda.synchronize()  # what the round before has queued belongs to it
        self.marks.append(time.monotonic())

    def finish(self, state: Mapping[str, Any], **said: str) -> None:
        """Write the last global state dict (tensors or arrays), the rounds' marks and further facts (``said``).

        Raises:
            RuntimeError: not as many rounds began as the task has.
        """
        if len(self.marks) != self.task.rounds:
            raise RuntimeError(f"{len(self.marks)} rounds began, expected {self.task.rounds}")
        tensors = {name: torch.as_tensor(value).detach().cpu().clone() for name, value in state.items()}
        torch.save({name: tensors[name] for name in self.task.initial if name in tensors}, self.out / "final.pt")
        (self.out / "marks.json").write_text(json.dumps({"marks": self.marks, "said": said}))


def contest(*, optimizer: bool = True) -> Contest:
    """Return the request of this process's command line.

    Args:
        optimizer: whether this process trains with torch's optimisers, the first of which imports torch's compiler, for
            seconds: they belong to the start and not to the first round.
    """
    if optimizer:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return Contest(sys.argv[1:])
