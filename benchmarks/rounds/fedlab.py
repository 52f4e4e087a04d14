"""FedLab's standalone pipeline: SyncServerHandler and a serial trainer, one process, flat parameters."""

from __future__ import annotations

from typing import Any

import torch

from .without_torchvision import install

SAID = install()

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer  # noqa: E402
from fedlab.contrib.algorithm.basic_server import SyncServerHandler  # noqa: E402
from fedlab.core.standalone import StandalonePipeline  # noqa: E402

from .task import Contest, Task, contest  # noqa: E402


class Trainer(SGDSerialClientTrainer):
    """Trainer of every client with the function of all programs."""

    task: Task
    contested: Contest

    def local_process(self, payload: Any, id_list: Any) -> None:
        for k in id_list:
            self.set_model(payload[0])
            self.task.train(self._model, k, len(self.contested.marks) - 1)
            self.cache.append([self.model_parameters])


class Marked(SyncServerHandler):
    """Server that notes when a round begins."""

    contested: Contest

    def sample_clients(self) -> Any:
        self.contested.begin()
        return super().sample_clients()


class Quiet(StandalonePipeline):
    """Pipeline without evaluation between rounds."""

    def evaluate(self) -> None:
        pass


def main() -> None:
    """Play the task's rounds.

    FedLab averages parameters alone: batch norm's running statistics stay those of the client that trained last.
    """
    contested = contest()
    task = Trainer.task = contested.task
    Trainer.contested = Marked.contested = contested
    module = task.network(torch.contiguous_format)  # FedLab flattens parameters by view(-1)
    handler = Marked(module, task.rounds, 1.0)
    trainer = Trainer(module, task.clients)
    Quiet(handler, trainer).main()
    state = {**trainer.model.state_dict(), **dict(handler.model.named_parameters())}
    contested.finish(state, note=SAID)


if __name__ == "__main__":
    main()
