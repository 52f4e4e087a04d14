"""aggregate: the rules of server optimisers, by name and number, with their hyperparameters."""

from __future__ import annotations

from typing import NamedTuple

# The numbers are those of csrc/include/fedkern/aggregate_server.h.
RULES = ("mean", "momentum", "adam", "yogi", "adagrad")


class ServerRule(NamedTuple):
    """A server optimiser: the index of its rule in :data:`RULES`, and its hyperparameters."""

    rule: int
    learning_rate: float
    beta1: float
    beta2: float
    tau: float


# Flower's defaults for FedAvg, FedAvgM, FedAdam, FedYogi and FedAdagrad.
DEFAULTS = {
    "mean": ServerRule(0, 1.0, 0.0, 0.0, 0.0),
    "momentum": ServerRule(1, 1.0, 0.0, 0.0, 0.0),
    "adam": ServerRule(2, 0.1, 0.9, 0.99, 1e-9),
    "yogi": ServerRule(3, 0.01, 0.9, 0.99, 1e-3),
    "adagrad": ServerRule(4, 0.1, 0.0, 0.0, 1e-9),
}
