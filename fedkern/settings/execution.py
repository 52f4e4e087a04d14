"""Settings of the run as a program: seed, device, threads, processes, checkpoints, pictures."""

from dataclasses import dataclass
from typing import Self

import torch

from fedkern.errors import UserError
from fedkern.settings.federation import FederationSettings
from fedkern.settings.section import Values
from fedkern.typed_option import option

MOST_WORKERS = 1024


@dataclass(frozen=True)
class ExecutionSettings(FederationSettings):
    """Settings of the program."""

    checkpoint_every: int = option(1, "write a checkpoint every N rounds", low=1)
    grad_cam: int = option(200, "test images for the fraction of Grad-CAM inside the object; 0: no Grad-CAM", low=0)
    seed: int = option(0, "seed of all random streams")
    device: str = option(
        "auto", "device to run on; auto: cuda if there is a GPU", choices=("auto", "cpu", "cuda", "cuda:N")
    )
    threads: int = option(0, "CPU threads of the server and of evaluations; 0: PyTorch's choice", low=0, high=1024)
    client_threads: int = option(
        0, "CPU threads of a client; 0: --threads divided by the clients of a round, at least 1", low=0,
        high=1024,
    )  # fmt: skip
    workers: str = option(
        "auto",
        "processes that train clients in parallel, with the same bits for any number; auto: by threads, cores, "
        "memory and length of the run",
    )

    def resolve(self) -> Values:
        values = super().resolve()
        if self.device == "auto":
            values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        if self.threads == 0:
            values["threads"] = torch.get_num_threads()
        return values

    def check(self) -> None:
        super().check()
        if self.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device} needs a CUDA GPU and PyTorch sees none; use --device cpu.")
        if (number := self.device.partition(":")[2]) and int(number) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device {self.device}: PyTorch sees {count} GPUs, the last is cuda:{count - 1}.")
        if self.workers != "auto" and not (self.workers.isdecimal() and 1 <= int(self.workers) <= MOST_WORKERS):
            raise UserError(f'--workers must be auto, or a number in [1, {MOST_WORKERS}], not "{self.workers}".')

    def with_client_threads(self) -> Self:
        """Return the settings with ``client_threads`` by the number of clients in the data."""
        if self.client_threads:
            return self
        return self.replace(client_threads=max(1, self.threads // self.clients_of_a_round))
