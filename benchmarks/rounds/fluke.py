"""fluke's FedAVG: clients and server in one process, each client with a network of its own."""

from __future__ import annotations

from typing import Any

from .without_torchvision import install

SAID = install()

from fluke.algorithms.fedavg import FedAVG  # noqa: E402
from fluke.client import Client  # noqa: E402
from fluke.config import OptimizerConfigurator  # noqa: E402
from fluke.data import FastDataLoader  # noqa: E402
from fluke.server import Server  # noqa: E402
from torch import nn  # noqa: E402

from .task import CLASSES, Contest, Task, contest  # noqa: E402


class Trainer(Client):
    """Client that trains with the function of all programs."""

    task: Task

    def fit(self, override_local_epochs: int = 0) -> float:
        self.task.train(self.model, self.index, self._last_round)
        return 0.0


class Marked(Server):
    """Server that notes when a round begins."""

    contested: Contest

    def get_eligible_clients(self, eligible_perc: float) -> Any:
        self.contested.begin()
        return super().get_eligible_clients(eligible_perc)


def main() -> None:
    """Play the task's rounds."""
    contested = contest()
    task = Trainer.task = contested.task
    Marked.contested = contested
    optimizer = OptimizerConfigurator({"name": "SGD", "lr": task.lr, "momentum": task.momentum})
    clients = [
        Trainer(
            index=k,
            train_set=FastDataLoader(task.images[k], task.labels[k], num_labels=CLASSES, batch_size=task.batch_size),
            test_set=None,
            optimizer_cfg=optimizer,
            loss_fn=nn.CrossEntropyLoss(),
            local_epochs=task.epochs,
        )
        for k in range(task.clients)
    ]
    server = Marked(model=task.network(), test_set=None, clients=clients, weighted=True)
    FedAVG(task.clients, None, {}, clients=clients, server=server).run(task.rounds, 1.0)
    contested.finish(server.model.state_dict(), note=SAID)


if __name__ == "__main__":
    main()
