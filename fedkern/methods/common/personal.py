"""Networks of the clients' own: kept from round to round, and judged in the place of one global network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedkern.methods.base import Method
from fedkern.methods.protocol import ClientId, Message
from fedkern.methods.roles import Client, TestSet
from fedkern.models.state import personal_parts
from fedkern.ops import FlatParameters
from fedkern.tasks.user_tasks import inner


def own_network(client: Client, key: str, fresh: nn.Module) -> nn.Module:
    """Return a network with the tensors that :func:`keep_network` kept under ``key``, or as ``fresh`` as it is."""
    if key in client.state:
        fresh.load_state_dict(client.state[key])
    return fresh


def keep_network(client: Client, key: str, network: nn.Module) -> None:
    """Keep a network's tensors in the client's state."""
    client.state[key] = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def with_vectors(network: nn.Module, message: Message, client: Client) -> FlatParameters:
    """Write a message's vectors, and what the client keeps to itself, into a network.

    Returns it as flat vectors.
    """
    flat = personal_parts.flatten(network)
    flat.load_vectors(message)
    personal_parts.write(personal_parts.tensors(inner(network)), client.personal)
    return flat


class Personal(nn.Module):
    """The clients' own networks.

    The joint prediction is the mean of their logits.

    Args:
        members: networks by client id.
    """

    def __init__(self, members: Mapping[ClientId, nn.Module]) -> None:
        super().__init__()
        self.clients = tuple(members)
        self.members = nn.ModuleList(members.values())

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images."""
        return torch.stack([member(images) for member in self.members]).mean(0)


class OfClient:
    """A test set as one client of several answers to it.

    Args:
        data: the test set.
        client: the client; None: nothing of the answers is kept.
    """

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
    """Means of the figures of the clients' networks on a test set."""
    return means([figures(network, OfClient(data, client)) for client, network in networks])


def means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every figure over the clients, at least one, which all have the same figures."""
    return {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]}


class ClientsNetworks:
    """Figures of the clients' own networks, in the place of those of a method's global network.

    All clients count, also those that a round left out.

    Args:
        method: gives the figures of a network.
        clients: ids of all clients.
        network: a client's own network, in eval mode; the next call may overwrite the network.
    """

    def __init__(self, method: Method, clients: Collection[ClientId], network: Callable[[ClientId], nn.Module]) -> None:
        self._method, self._clients, self._network = method, clients, network

    def evaluate(self, model: nn.Module, data: TestSet) -> dict[str, float]:
        """Return the mean over all clients' networks."""
        return mean_figures(self._method.evaluate, ((k, self._network(k)) for k in self._clients), data)
