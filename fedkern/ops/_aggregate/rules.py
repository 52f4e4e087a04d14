"""aggregate: rules and hyperparameters of the server optimisers, and the arguments of a step."""

from typing import NamedTuple

from torch import Tensor

from fedkern.ops._aggregate.checks import Vectors, Weights

# The numbers are those of csrc/include/fedkern/aggregate_server.h.
RULES = ("mean", "momentum", "adam", "yogi", "adagrad")


class ServerRule(NamedTuple):
    """Index of a server optimiser in :data:`RULES`, and its hyperparameters."""

    rule: int
    learning_rate: float
    beta1: float
    beta2: float
    tau: float


class ServerCall(NamedTuple):
    """Arguments of :func:`fedkern.ops.server_step`.

    Attributes:
        first, second: ``[P]``, fp32 or fp64 of unit stride, updated in place; None if the rule has no such state.
        out: tensor ``[P]`` that receives the new model; None: a new tensor of the vectors' dtype.
        similarities: whether norms and cosines are computed; else they are empty.
    """

    global_: Tensor
    vectors: Vectors
    weights: Weights
    rule: ServerRule
    first: Tensor | None = None
    second: Tensor | None = None
    out: Tensor | None = None
    similarities: bool = True


# Flower's defaults for FedAvg, FedAvgM, FedAdam, FedYogi and FedAdagrad.
DEFAULTS = {
    "mean": ServerRule(0, 1.0, 0.0, 0.0, 0.0),
    "momentum": ServerRule(1, 1.0, 0.0, 0.0, 0.0),
    "adam": ServerRule(2, 0.1, 0.9, 0.99, 1e-9),
    "yogi": ServerRule(3, 0.01, 0.9, 0.99, 1e-3),
    "adagrad": ServerRule(4, 0.1, 0.0, 0.0, 1e-9),
}
