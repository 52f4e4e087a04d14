"""The means that Flower's FedAvg takes, in NumPy: a model is a list of arrays, one per layer.

Written from the algorithm that Flower documents (flwr.server.strategy.aggregate), not from its code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from contestants import Absent
from torch import Tensor

LAYERS = 62  # arrays per model, as in ResNet-18
Arrays = list[Any]


def layers(vector: Tensor) -> Arrays:
    """The vector's memory as arrays, one per layer."""
    return np.array_split(vector.numpy(), LAYERS)


def inplace_mean(
    vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor | None = None
) -> Callable[[], Arrays] | Absent:
    """``aggregate_inplace``, FedAvg's default: scale the first client's arrays, then scale each other's and add it.

    Flower scales the arrays that it received in place, which spoils them.  A benchmark calls again, so what is scaled
    goes elsewhere: the first client's arrays to ``out`` (None: to new memory), the others' to the memory of one layer,
    made once.  That costs no pass over memory that Flower does not make, and saves it writing the uploads.
    """
    if vectors[0].device.type != "cpu":
        return Absent("NumPy computes on the CPU")
    shares = [weight / sum(weights) for weight in weights]
    clients = [layers(vector) for vector in vectors]
    round_cache = np.empty(len(clients[0][0]), clients[0][0].dtype)  # the first layers are the longest
    rooms = [round_cache[: len(layer)] for layer in clients[0]]
    held = [None] * LAYERS if out is None else layers(out)

    def run() -> Arrays:
        mean = [np.multiply(layer, shares[0], out=into) for layer, into in zip(clients[0], held, strict=True)]
        for client, share in zip(clients[1:], shares[1:], strict=True):
            for layer, room, total in zip(client, rooms, mean, strict=True):
                np.add(total, np.multiply(layer, share, out=room), out=total)
        return mean

    return run


def fresh_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Callable[[], Arrays] | Absent:
    """``aggregate``, with FedAvg(inplace=False): weight every array, add them up layer by layer, divide."""
    if vectors[0].device.type != "cpu":
        return Absent("NumPy computes on the CPU")
    total = sum(weights)
    clients = [layers(vector) for vector in vectors]

    def run() -> Arrays:
        weighted = [[layer * weight for layer in client] for client, weight in zip(clients, weights, strict=True)]
        return [reduce(np.add, updates) / total for updates in zip(*weighted, strict=True)]

    return run
