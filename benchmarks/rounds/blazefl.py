"""BlazeFL's FedAvg on a pool of processes with shared memory, as many as there are workers.

Its package says that it needs Python 3.12 (3.14 from version 3); version 2 also runs on 3.11, installed with
``pip install --no-deps --ignore-requires-python blazefl==2.0.3``.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from blazefl.contrib.fedavg import (
    FedAvgBaseServerHandler,
    FedAvgDownlinkPackage,
    FedAvgProcessPoolClientTrainer,
    FedAvgProcessPoolUplinkPackage,
)
from blazefl.core import IPCMode, SHMHandle, deserialize_model, serialize_model

from .task import Contest, Task, contest


@dataclass
class Config:
    """Configuration of a client's process, which was forked with the task."""

    client: int
    round: int


class Selector:
    """Selector of the task's network, since BlazeFL flattens parameters by view(-1)."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def select_model(self, model_name: str) -> torch.nn.Module:
        return self.task.network(torch.contiguous_format)


class Marked(FedAvgBaseServerHandler):
    """Server that notes when a round begins."""

    contested: Contest

    def sample_clients(self) -> list[int]:
        self.contested.begin()
        return super().sample_clients()


class Trainer(FedAvgProcessPoolClientTrainer):
    """Trainer of every client with the function of all programs."""

    contested: Contest

    def progress_fn(self, it: Any) -> Any:
        return it

    def get_client_config(self, cid: int) -> Any:
        return Config(cid, len(self.contested.marks) - 1)

    @staticmethod
    def worker(config: Any, payload: Any, device: str, stop_event: Any, *, shm_buffer: Any = None) -> Any:
        torch.set_num_threads(Trainer.contested.threads)
        task = Trainer.contested.task
        module = task.network(torch.contiguous_format)
        deserialize_model(module, payload.model_parameters)
        task.train(module, config.client, config.round)
        shm_buffer.model_parameters.copy_(serialize_model(module))
        return FedAvgProcessPoolUplinkPackage(config.client, SHMHandle(), task.samples)


def main() -> None:
    """Play the task's rounds."""
    contested = contest()
    task = contested.task
    Marked.contested = Trainer.contested = contested
    mp.set_start_method("fork")  # a pool is made every round; forked, it has torch already
    selector = Selector(task)
    handler = Marked(
        model_selector=selector, model_name="", dataset=None, global_round=task.rounds, num_clients=task.clients,
        sample_ratio=1.0, device="cpu", batch_size=task.batch_size, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="blazefl-", dir=contested.out) as folder:
        trainer = Trainer(
            model_selector=selector, model_name="", share_dir=Path(folder) / "share", state_dir=Path(folder) / "state",
            dataset=None, device="cpu", num_clients=task.clients, epochs=task.epochs, batch_size=task.batch_size,
            lr=task.lr, seed=0, num_parallels=contested.workers, ipc_mode=IPCMode.SHARED_MEMORY,
        )  # fmt: skip
        while not handler.if_stop():
            sampled = handler.sample_clients()
            package: FedAvgDownlinkPackage = handler.downlink_package()
            trainer.local_process(package, sampled)
            for upload in trainer.uplink_package():
                handler.load(upload)
    contested.finish(handler.model.state_dict())


if __name__ == "__main__":
    main()
