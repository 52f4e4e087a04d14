"""ops.tree on lists of NumPy arrays and on state dicts, against what Flower's strategies and plain loops do with them.

Models have the entries of a ResNet-18 (122, of 11 million numbers) and of a small network (10, of 60 thousand).
Everybody allocates a new result.  Model bytes: every model read once, the result written once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from harness import compare
from torch import Tensor

from fedkern import ops
from fedkern.models import build

State = dict[str, Tensor]
CLIENTS = 11  # odd: every median is then the middle value
MODELS = {"ResNet-18": ("resnet18", 64), "CNN": ("cnn", 8)}


def states(name: str) -> list[State]:
    model, width = MODELS[name]
    made = []
    for seed in range(CLIENTS):
        network = build(model, classes=10, channels=3, image_size=32, seed=seed, width=width)
        made.append({key: tensor.clone() for key, tensor in network.state_dict().items()})
    return made


def arrays_of(models: list[State]) -> list[list[Any]]:
    return [[tensor.numpy() for tensor in model.values()] for model in models]


def weights() -> list[float]:
    return [float(100 + 7 * m) for m in range(CLIENTS)]


def state_dict_loop(models: list[State], shares: list[float]) -> Callable[[], State]:
    """Average state dicts key by key, as most scripts do."""
    total = sum(shares)

    def run() -> State:
        mean = {key: tensor.clone() for key, tensor in models[0].items()}
        for key in mean:
            if mean[key].is_floating_point():
                mean[key].mul_(shares[0] / total)
                for model, share in zip(models[1:], shares[1:], strict=True):
                    mean[key].add_(model[key], alpha=share / total)
        return mean

    return run


def flower_mean(models: list[list[Any]], shares: list[float]) -> Callable[[], list[Any]]:
    """``aggregate``, with FedAvg(inplace=False): weight every array, add them up layer by layer, divide."""
    total = sum(shares)

    def run() -> list[Any]:
        weighted = [[layer * share for layer in model] for model, share in zip(models, shares, strict=True)]
        return [reduce(np.add, updates) / total for updates in zip(*weighted, strict=True)]

    return run


def flower_median(models: list[list[Any]]) -> Callable[[], list[Any]]:
    """FedMedian: the median of every layer's stack."""
    return lambda: [np.median(np.asarray(layer), axis=0) for layer in zip(*models, strict=True)]


def bytes_of(models: list[State]) -> int:
    return (CLIENTS + 1) * sum(tensor.nbytes for tensor in models[0].values() if tensor.is_floating_point())


@pytest.mark.parametrize("name", MODELS)
def test_weighted_mean(node: str, name: str, threads: int) -> None:
    models, shares = states(name), weights()
    arrays = arrays_of(models)
    runs = {
        "fedkern": lambda: ops.tree.weighted_mean(arrays, shares),
        "fedkern, state dicts": lambda: ops.tree.weighted_mean(models, shares),
        "loop over state dicts": state_dict_loop(models, shares),
        "Flower, inplace=False": flower_mean(arrays, shares),
    }
    case = f"weighted_mean of {CLIENTS} × {name}"
    compare(node, "tree", case, runs, model_bytes=bytes_of(models), threads=threads)


@pytest.mark.parametrize("name", MODELS)
def test_median(node: str, name: str, threads: int) -> None:
    models = states(name)
    arrays = arrays_of(models)
    runs = {
        "fedkern": lambda: ops.tree.median(arrays),
        "stack and torch.median": lambda: {
            key: torch.stack([m[key] for m in models]).median(0)[0] for key in models[0]
        },
        "Flower": flower_median(arrays),
    }
    case = f"median of {CLIENTS} × {name}"
    compare(node, "tree", case, runs, model_bytes=bytes_of(models), threads=threads, pairs=5)
