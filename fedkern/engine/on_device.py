"""What a process has on a run's device: networks, recorded steps, and the vector that clients were sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedkern.engine.captured import Graphs
from fedkern.engine.first_steps import FirstSteps
from fedkern.engine.network import Network


class OnDevice:
    """Networks by name, of which each lane (`fedkern.engine.lanes`) trains one of its own; made on first use.

    Attributes:
        lane: the one that the host speaks of.
        networks: by name and lane.
        graphs: recorded steps of local training by lane; None on the CPU.
        first_steps: watches over this process's first steps, by name of the round and exchange.
        received: the vector that clients were sent last, its version and the vector on the device.
    """

    def __init__(self, device: torch.device, build: Callable[[], torch.nn.Module]) -> None:
        self._device, self._build = device, build
        self.lane = 0
        self.networks: dict[tuple[str, int], Network] = {}
        self.graphs: dict[int, Graphs | None] = {}
        self.first_steps: dict[tuple[str, str], FirstSteps] = {}
        self.received: tuple[Tensor, int, Tensor] | None = None

    @contextmanager
    def on_lane(self, lane: int) -> Iterator[None]:
        """Inside, the network that trains and its recorded steps are the lane's."""
        self.lane = lane
        try:
            yield
        finally:
            self.lane = 0

    def recorded(self) -> Graphs | None:
        """The lane's recorded steps."""
        if self.lane not in self.graphs:
            self.graphs[self.lane] = Graphs(self._device) if self._device.type == "cuda" else None
        return self.graphs[self.lane]

    def network(self, name: str) -> Network:
        """The network called ``"local"`` (that of the lane), ``"frozen"`` or ``"server"``."""
        key = name, self.lane if name == "local" else 0
        if key not in self.networks:
            network = Network(self._build(), self._device)
            if name != "local":
                network.freeze()
            self.networks[key] = network
        return self.networks[key]

    def there(self, vector: Tensor) -> Tensor:
        """A message's vector on the device, for reading; what all clients of a round get is sent once."""
        if self._device.type == "cpu" or vector.device.type != "cpu" or vector.is_inference():
            return vector.to(self._device)
        last = self.received
        if last is None or last[0] is not vector or last[1] != vector._version:
            self.received = last = vector, vector._version, vector.to(self._device)
        return last[2]
