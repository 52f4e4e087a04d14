"""Personal networks of clients, evaluated instead of one global network."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.methods.base import Method
from fedkern.methods.protocol import ClientId, Message
from fedkern.methods.roles import Client, TestSet
from fedkern.models.state import freezing
from fedkern.ops import FlatParameters
from fedkern.tasks.user_tasks import user_module


def own_network(client: Client, key: str, fresh: nn.Module) -> nn.Module:
    """Return ``fresh`` with the tensors kept under ``key``, if any."""
    if key in client.state:
        fresh.load_state_dict(client.state[key])
    return fresh


def keep_network(client: Client, key: str, network: nn.Module) -> None:
    client.state[key] = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def with_vectors(network: nn.Module, message: Message, client: Client) -> FlatParameters:
    """Write a message's vectors and the client's personal parts into a network."""
    flat = freezing.flatten(network)
    flat.load_vectors(message)
    freezing.write(freezing.tensors(user_module(network)), client.personal)
    return flat


class Personal(nn.Module):
    """The clients' own networks, with the mean of their logits as joint prediction."""

    def __init__(self, members: Mapping[ClientId, nn.Module]) -> None:
        super().__init__()
        self.clients = tuple(members)
        self.members = nn.ModuleList(members.values())

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(0)


class OfClient:
    """Test set for one of several clients, or None to keep no answers."""

    def __init__(self, data: TestSet, client: ClientId | None) -> None:
        keep = getattr(data, "keep", None)
        self._data, self.keep = data, None if keep is None or client is None else partial(keep, client=client)

    def record(self, predictions: Tensor) -> None:
        """Record nothing: no single network made the predictions."""

    def __len__(self) -> int:
        return len(self._data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


def mean_figures(
    figures: Callable[[nn.Module, TestSet], Mapping[str, float]],
    networks: Iterable[tuple[ClientId, nn.Module]],
    data: TestSet,
) -> dict[str, float]:
    return average_figures([figures(network, OfClient(data, client)) for client, network in networks])


def average_figures(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]}


class ClientsNetworks:
    """Figures of all clients' own networks, instead of a global network's.

    The next call of ``network(client)`` may overwrite the network.
    """

    def __init__(self, method: Method, clients: Collection[ClientId], network: Callable[[ClientId], nn.Module]) -> None:
        self._method, self._clients, self._network = method, clients, network

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        return mean_figures(self._method.evaluate, ((k, self._network(k)) for k in self._clients), data)
