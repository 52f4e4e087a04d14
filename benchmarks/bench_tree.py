"""ops.tree's mean of lists of NumPy arrays and of state dicts against a loop over state dicts.

Models have the entries of a ResNet-18 (122, of 11 million numbers) and of a small network (10, of 60 thousand).
Everybody allocates a new result.  Model bytes: every model read once, the result written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks.harness import compare
from fedkern import ops
from fedkern.models import build

State = dict[str, Tensor]
CLIENTS = 11
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
    }
    case = f"weighted_mean of {CLIENTS} × {name}"
    compare(node, "tree", case, runs, model_bytes=bytes_of(models), threads=threads)
