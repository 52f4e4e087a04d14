"""fedkern's own engine on the task: ``fedavg`` as ``python -m fedkern.run`` plays it, from images in memory.

The run folder, its checkpoints after every round and its records are what a user gets; only the evaluation waits for
the end, as it does for every program.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedkern.data.forms import ImageForm
from fedkern.data.split import Split
from fedkern.data.types import FederatedData
from fedkern.engine.run import run
from fedkern.listeners.events import Listener
from fedkern.settings.config import RunConfig
from fedkern.tasks.partition_statistics import PartitionStatistics

from .setting import MEAN, STD, register
from .task import CLASSES, Contest, Task, contest


def federated_data(task: Task) -> FederatedData:
    """Return the task's images as the engine takes them."""
    images, labels = np.load(task.folder / "raw_images.npy"), task.labels.cpu()
    clients = tuple(Split(torch.from_numpy(rows), classes) for rows, classes in zip(images, labels, strict=True))
    test = Split(
        torch.from_numpy(np.load(task.folder / "raw_test_images.npy")),
        torch.from_numpy(np.load(task.folder / "test_labels.npy")),
    )
    no_samples = Split(test.images[:0], test.labels[:0])
    names = tuple(str(k) for k in range(CLASSES))
    return FederatedData(
        name="cifar10",
        classes=names,
        clients=clients,
        validation=no_samples,
        tests={"": test},
        form=ImageForm(tuple(test.images.shape[1:]), MEAN, STD),
        statistics=PartitionStatistics.of(list(labels.numpy()), names, "iid"),
    )


class Marked(Listener):
    """Listener that notes when a round begins."""

    def __init__(self, contested: Contest) -> None:
        self.contested = contested

    def on_round_start(self, round: int, name: str, participants: Sequence[int]) -> None:
        self.contested.begin()


def settings(task: Task, threads: int, workers: str) -> RunConfig:
    """Return the run's settings."""
    return RunConfig.make(
        "fedavg",
        data="cifar10",
        clients=task.clients,
        partition="iid",
        rounds=task.rounds,
        local_epochs=task.epochs,
        batch_size=task.batch_size,
        lr=task.lr,
        momentum=task.momentum,
        model=task.model,
        width=task.width,
        augment="none",
        eval_every=task.rounds,
        grad_cam=0,
        seed=task.seed,
        device=task.device.type,
        threads=threads,
        workers=workers,
    )


def main() -> None:
    """Play the task's rounds."""
    contested = contest(optimizer=False)
    register(contested.task.model)
    workers = sys.argv[5]
    with tempfile.TemporaryDirectory(prefix="rounds-", dir=contested.out) as folder:
        out = Path(folder) / "run"
        config = settings(contested.task, contested.threads, workers)
        run(config, out=out, listener=Marked(contested), data=federated_data(contested.task))
        state = read_state(out)
    contested.finish(state)


def read_state(out: Path) -> dict[str, torch.Tensor]:
    """Return the last global state dict of a finished run."""
    from safetensors.torch import load_file

    return load_file(out / "model.safetensors")


if __name__ == "__main__":
    main()
