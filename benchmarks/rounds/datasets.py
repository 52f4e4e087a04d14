"""Rounds of FedAvg on a user's Dataset: by fedkern, and by the loop around a DataLoader that its author would write.

``python -m benchmarks.rounds.datasets FOLDER OUT THREADS WORKERS PROGRAM`` runs the trial in ``FOLDER``, see
:class:`Trial`, with ``PROGRAM`` "fedkern", "arrays" (fedkern with the same images as its own data) or "loop".
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fedkern
from fedkern.data import FederatedData
from fedkern.listeners.events import Listener

from .task import CLASSES

CASES = {
    "python": "64 numbers by `__getitem__`",
    "python-short": "64 numbers by `__getitem__`",
    "tensors": "64 numbers of a TensorDataset",
    "tensors-short": "64 numbers of a TensorDataset",
    "draws": "64 numbers by `__getitem__`, with noise",
    "images": "images 3 × 32 × 32 by `__getitem__`",
}
"""What a Dataset gives, by kind; clients with fewer samples show what a client costs beside its batches."""
OTHERS = {"loop": "loop around a DataLoader", "arrays": "fedkern's own data"}
TEST = 1000


class Own(Dataset[tuple[Tensor, int]]):
    """Samples and classes by position, as people write them, with ``noise`` added anew each time."""

    def __init__(self, x: NDArray[Any], y: NDArray[np.int64], noise: float = 0.0) -> None:
        self.x, self.y, self.noise = x, y, noise

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = torch.from_numpy(self.x[index])
        return (x + self.noise * torch.randn(64) if self.noise else x), int(self.y[index])


@dataclass
class Trial:
    """Trial in a folder.

    Attributes:
        kind: which Dataset, one of :data:`CASES`.
        rounds: how many are played; the last has no end.
        samples: of every client.
    """

    folder: Path
    kind: str
    rounds: int
    clients: int
    samples: int

    @classmethod
    def write(cls, folder: Path, kind: str, small: bool) -> "Trial":
        """Write a trial into an empty folder."""
        clients, samples, rounds = (10, 200, 30) if kind == "images" or "short" in kind else (4, 2000, 15)
        sizes = {"clients": clients, "samples": 40 if small else samples, "rounds": 3 if small else rounds + 1}
        (folder / "trial.json").write_text(json.dumps({"kind": kind, **sizes}))
        return cls.load(str(folder))

    @classmethod
    def load(cls, folder: str) -> "Trial":
        """Read the trial that a folder has."""
        return cls(Path(folder), **json.loads((Path(folder) / "trial.json").read_text()))

    @property
    def case(self) -> str:
        """Return the row's name."""
        network = "cnn/8" if self.kind == "images" else "MLP"
        return f"{network}, {CASES[self.kind]}, {self.clients} clients × {self.samples}"

    def arrays(self) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Return samples and classes of every client, and of the test set at the end."""
        draw = np.random.default_rng(0)
        shape = (3, 32, 32) if self.kind == "images" else (64,)
        means = draw.uniform(64, 192, (CLASSES, *shape))
        parts = []
        for count in (*[self.samples] * self.clients, TEST):
            y = draw.integers(0, CLASSES, count)
            x = (means[y] + draw.normal(0, 64, (count, *shape))).clip(0, 255)
            parts.append((x.astype(np.uint8) if len(shape) > 1 else (x / 64 - 2).astype(np.float32), y))
        return parts

    def dataset(self, x: NDArray[Any], y: NDArray[np.int64]) -> Dataset[Any]:
        """Return a client's samples as a Dataset."""
        if "tensors" in self.kind:
            return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        return Own(x, y, 0.1 if self.kind == "draws" else 0.0)

    def network(self) -> nn.Module:
        """Return the network for numbers."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))

    def accuracy(self, state: Mapping[str, Tensor]) -> float:
        """Return the recorded accuracy of a program on the test set."""
        return float(state["accuracy"])


class Marked(Listener):
    """Listener that notes when a round begins."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        self.marks.append(time.monotonic())


def fedkern_run(trial: Trial, out: Path, arrays: bool, marked: Marked) -> float:
    """Play the rounds with fedkern, and return the accuracy."""
    *clients, test = trial.arrays()
    if arrays:
        data: dict[str, Any] = {"data": FederatedData.from_arrays(clients, test)}
    else:
        data = {"data": [trial.dataset(*part) for part in clients], "test": trial.dataset(*test)}
    network: dict[str, Any] = {"model": "cnn", "width": 8} if trial.kind == "images" else {"model": trial.network()}
    settings = {"local_epochs": 1, "batch_size": 32, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}
    how = {"threads": 1, "workers": 1, "pictures": False, "progress": False, "listener": marked}
    ending = {"rounds": trial.rounds, "eval_every": trial.rounds, "out": out / "run"}
    run = fedkern.simulate("fedavg", **data, **network, **settings, **how, **ending)
    return run.metrics["accuracy"]


def loop(trial: Trial, marked: Marked) -> float:
    """Play the rounds with a DataLoader for every client, and return the accuracy."""
    *clients, test = trial.arrays()
    loaders = [DataLoader(trial.dataset(*part), batch_size=32, shuffle=True) for part in clients]
    server, module = trial.network(), trial.network()
    for round in range(trial.rounds):
        marked.on_round_start(round, "", ())
        states = []
        for loader in loaders:
            module.load_state_dict(server.state_dict())
            optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(module(x), y).backward()
                optimizer.step()
            states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        server.load_state_dict({name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]})
    with torch.no_grad():
        return float((server(torch.from_numpy(test[0])).argmax(1) == torch.from_numpy(test[1])).float().mean())


def main() -> None:
    """Play the trial."""
    trial, out, program = Trial.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[5]
    torch.set_num_threads(1)
    marked = Marked()
    if program == "loop":
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports torch's compiler, for seconds
        accuracy = loop(trial, marked)
    else:
        accuracy = fedkern_run(trial, out, program == "arrays", marked)
    torch.save({"accuracy": torch.tensor(accuracy)}, out / "final.pt")
    (out / "marks.json").write_text(json.dumps({"marks": marked.marks, "said": {}}))


if __name__ == "__main__":
    main()
