"""Strategies for Flower apps, with the names and arguments of those of ``flwr.serverapp.strategy``.

`docs/flower-reference.md` compares the two.
"""

from fedkern.flower.adapter import Result, streaming
from fedkern.flower.strategies.averaging import FedAvg, FedProx, LeftOut, mean_of_metrics
from fedkern.flower.strategies.private_average import DPFedAvg
from fedkern.flower.strategies.robust_strategies import FedMedian, FedTrimmedAvg, GeometricMedian, Krum, MultiKrum
from fedkern.flower.strategies.server_optimisers import FedAdagrad, FedAdam, FedAvgM, FedYogi

__all__ = [
    "DPFedAvg", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedProx", "FedTrimmedAvg", "FedYogi",
    "GeometricMedian", "Krum", "LeftOut", "MultiKrum", "Result", "mean_of_metrics", "streaming",
]  # fmt: skip
